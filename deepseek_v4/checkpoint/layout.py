"""The released layout, derived from the parameter descriptions: items, tensor names, shapes, dtypes, shards.

An item is what is converted, resumed and restored as a unit: the shell around the layers, one layer, or one draft
block. Its tree is that of ``deepseek_v4.parameters``; a released tensor is a leaf of it, or row e of a leaf for the
routed expert e.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from deepseek_v4.checkpoint.safetensors import DTYPES
from deepseek_v4.config import Config
from deepseek_v4.layer_spec import LayerSpec, draft_specs, layer_specs
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import ParameterSpec, Path, block_module, describe, draft_module, shell_module

DISK_DTYPES: dict[np.dtype, str] = {
    DTYPES["F32"]: "F32",
    DTYPES["BF16"]: "BF16",
    DTYPES["F8_E8M0"]: "F8_E8M0",
    DTYPES["F8_E4M3"]: "F8_E4M3",
    # Packed E2M1 is stored as I8, a container without arithmetic meaning; token tables are I64.
    DTYPES["U8"]: "I8",
    DTYPES["I32"]: "I64",
}
"""Element type in a released file of every element type in the parameter tree."""


@dataclasses.dataclass(frozen=True)
class Item:
    """The shell, a layer or a draft block: its name in an Orbax directory and its prefix among released tensors."""

    name: str
    prefix: str
    spec: LayerSpec | None
    draft: bool = False


@dataclasses.dataclass(frozen=True)
class ReleasedTensor:
    """One tensor of the release: element type and shape on disk, its leaf, and its row there if it is an expert's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    expert: int | None


def items(config: Config) -> tuple[Item, ...]:
    """The shell, the layers, the draft blocks."""
    layers = [Item(f"layers.{i:05d}", f"layers.{i}.", spec) for i, spec in enumerate(layer_specs(config))]
    drafts = [Item(f"drafts.{i}", f"mtp.{i}.", spec, draft=True) for i, spec in enumerate(draft_specs(config))]
    return (Item("shell", "", None), *layers, *drafts)


def item_specs(item: Item, config: Config, storage: Storage) -> dict[Path, ParameterSpec]:
    """The leaves of an item by path."""
    return _described(item.spec, item.draft, config, storage)


@functools.lru_cache(maxsize=64)
def _described(spec: LayerSpec | None, draft: bool, config: Config, storage: Storage) -> dict[Path, ParameterSpec]:
    if spec is None:
        return describe(shell_module(config, storage))
    return describe((draft_module if draft else block_module)(config, spec, storage))


def is_expert(path: Path) -> bool:
    """Whether a leaf stacks the routed experts, which are separate tensors in the release."""
    return path[:2] == ("ffn", "experts")


def disk_dtype(spec: ParameterSpec) -> str:
    """Element type of a leaf in a released file."""
    return DISK_DTYPES[np.dtype(spec.dtype)]


def expert_name(prefix: str, path: Path, expert: int) -> str:
    """Released name of one expert's row of a stacked leaf."""
    return f"{prefix}{'.'.join(path[:2])}.{expert}.{'.'.join(path[2:])}"


def item_tensors(item: Item, config: Config, storage: Storage) -> Iterator[ReleasedTensor]:
    """Every released tensor of an item."""
    for path, spec in item_specs(item, config, storage).items():
        dtype = disk_dtype(spec)
        if is_expert(path):
            for expert in range(spec.shape[0]):
                yield ReleasedTensor(expert_name(item.prefix, path, expert), dtype, spec.shape[1:], path, expert)
        else:
            yield ReleasedTensor(item.prefix + ".".join(path), dtype, spec.shape, path, None)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the release: its name, the item it belongs to, and its tensors by name."""

    filename: str
    item: Item
    tensors: dict[str, ReleasedTensor]


def shards(config: Config, storage: Storage, draft_copies: tuple[str, ...] = ()) -> Iterator[Shard]:
    """The files of a release: embedding, every layer, head with norm and hc_head, draft blocks (reference section 2).

    ``draft_copies`` are names of the draft block's copies of embedding and head, which the Base releases carry.
    """
    shell, *rest = items(config)
    layers = [item for item in rest if not item.draft]
    drafts = [item for item in rest if item.draft]
    surround = {tensor.name: tensor for tensor in item_tensors(shell, config, storage)}
    embedding = {name: tensor for name, tensor in surround.items() if tensor.path[0] == "embed"}
    head = {name: tensor for name, tensor in surround.items() if name not in embedding}
    files: list[tuple[Item, dict[str, ReleasedTensor] | None]] = [(shell, embedding)]
    files += [(item, None) for item in layers]
    files += [(shell, head)]
    files += [(item, None) for item in drafts]
    for index, (item, tensors) in enumerate(files, start=1):
        if tensors is None:
            tensors = {tensor.name: tensor for tensor in item_tensors(item, config, storage)}
        for name in draft_copies:
            if item.draft and name.startswith(item.prefix):
                tensors[name] = dataclasses.replace(surround[copied_tensor(name)], name=name)
        yield Shard(f"model-{index:05d}-of-{len(files):05d}.safetensors", item, tensors)


def is_draft_copy(name: str) -> bool:
    """Whether a draft tensor is a copy of the embedding or of the head, under any of the names loaders accept."""
    return name.startswith("mtp.") and ("emb" in name or name.endswith("head.weight"))


def copied_tensor(name: str) -> str:
    """The main model's tensor that a draft copy repeats."""
    return "head.weight" if name.endswith("head.weight") else "embed.weight"
