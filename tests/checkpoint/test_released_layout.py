"""The layout derived from the parameter descriptions is that of the four releases."""

import json
from collections import Counter

import pytest
from checkpoint_cases import inventory_shards, tiny_config
from released import DTYPE_NAMES, released_tensors

from deepseek_v4 import RELEASED, RELEASED_BASE, Config, Storage
from deepseek_v4.checkpoint.inspection import logical_parameters
from deepseek_v4.checkpoint.layout import item_tensors, items, shards
from deepseek_v4.checkpoint.safetensors import build_header
from deepseek_v4.nn.variables import MASTER

RELEASES = {
    "flash": (RELEASED, ()),
    "pro": (RELEASED, ()),
    "flash-base": (RELEASED_BASE, ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")),
    "pro-base": (RELEASED_BASE, ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")),
}


@pytest.mark.parametrize("name", RELEASES)
def test_inventory_is_reproduced(name, shared_dir):
    inventory = json.loads((shared_dir / "fixtures/checkpoint" / f"{name}.tensors.json").read_text())
    config = Config.from_file(shared_dir / "fixtures/configs" / f"{name}.json")
    storage, copies = RELEASES[name]
    derived = list(shards(config, storage, copies))
    expected = list(inventory_shards(inventory, config.n_routed_experts))
    assert [shard.filename for shard in derived] == [filename for filename, _, _ in expected]
    dtypes, elements, total, file_bytes = Counter(), 0, 0, 0
    for shard, (filename, tensors, size) in zip(derived, expected, strict=True):
        found = {tensor_name: (tensor.dtype, tensor.shape) for tensor_name, tensor in shard.tensors.items()}
        assert found == tensors, filename
        _, entries, derived_size = build_header(found)
        assert derived_size == size, filename
        file_bytes += derived_size
        for entry in entries:
            dtypes[entry.dtype] += 1
            total += entry.size_bytes
            count = 1
            for n in entry.shape:
                count *= n
            elements += count
    assert sum(dtypes.values()) == inventory["tensor_count"]
    assert dtypes == inventory["dtype_tensor_counts"]
    assert (total, file_bytes, elements) == (
        inventory["total_size"],
        inventory["file_bytes"],
        inventory["stored_elements"],
    )


# Published: checkpoint reference section 2, totals.
@pytest.mark.parametrize(("name", "whole", "main"), [("flash", 290.94, 284.33), ("pro", 1598.84, 1573.00)])
def test_logical_parameters(name, whole, main, shared_dir):
    config = Config.from_file(shared_dir / "fixtures/configs" / f"{name}.json")
    for storage in (RELEASED, RELEASED_BASE):
        without, draft = logical_parameters(config, storage)
        assert round(without / 1e9, 2) == main
        assert round((without + draft) / 1e9, 2) == whole


@pytest.mark.parametrize("storage", [RELEASED, RELEASED_BASE, MASTER, Storage("bfloat16", "bfloat16")])
def test_helper_and_descriptions_agree(storage):
    """tests/released.py is written from the published tables; the descriptions come from the model's modules."""
    config = tiny_config()
    written = {
        name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in released_tensors(config, storage).items()
    }
    derived = {t.name: (t.dtype, t.shape) for item in items(config) for t in item_tensors(item, config, storage)}
    assert written == derived
