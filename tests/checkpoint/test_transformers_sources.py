"""Checkpoints that went through transformers come back to the release they started from."""

import json

import numpy as np
import pytest
from checkpoint_cases import tiny_config
from released import released_tensors, write_released, write_safetensors

from deepseek_v4 import Storage
from deepseek_v4.checkpoint import compare, open_huggingface, open_source, to_hf, to_orbax
from deepseek_v4.checkpoint.names import translate

transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
torch = pytest.importorskip("torch", reason="the parity extra is not installed")

PLAIN = Storage("bfloat16", "bfloat16")
# transformers derives its own shapes from these two as the releases have them.
CONFIG = tiny_config(num_hidden_layers=4, compress_ratios=[0, 4, 128, 4], num_hash_layers=2, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The release, and what transformers makes of it in both of its formats."""
    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        pytest.skip("this transformers has no DeepSeek-V4")
    root = tmp_path_factory.mktemp("transformers")
    write_released(root / "released", CONFIG, PLAIN)
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        root / "released", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.save_pretrained(root / "transformers", save_original_format=False)
    model.save_pretrained(root / "hybrid")
    return root, model


@pytest.mark.parametrize(("kind", "naming"), [("transformers", "transformers"), ("hybrid", "transformers 5.23 hybrid")])
def test_values_come_back(kind, naming, sources, tmp_path):
    root, _ = sources
    source = open_huggingface(root / kind)
    assert source.naming == naming
    assert source.config == CONFIG
    # transformers keeps norms in float32; every other kind keeps its dtype.
    assert source.storage == Storage("bfloat16", "bfloat16", norms="float32")
    for target, convert in (("orbax", to_orbax), ("hf", to_hf)):
        assert convert(source, tmp_path / target)
        result = compare(open_source(root / "released"), open_source(tmp_path / target))
        assert result.equal, result.differences
        assert result.compared == len(released_tensors(CONFIG, PLAIN))
        assert result.widened == sum(name.endswith("norm.weight") for name in released_tensors(CONFIG, PLAIN))
    # No further step changes anything: released names, every byte.
    again = compare(source, open_source(tmp_path / "hf"))
    assert (again.equal, again.widened) == (True, 0)


def test_state_dict_names_are_all_known(sources):
    _, model = sources
    released = set(released_tensors(CONFIG, PLAIN))
    found = set()
    for name in model.state_dict():
        for target in translate(name)[0]:
            experts = range(CONFIG.n_routed_experts) if target.stacked else (None,)
            for expert in experts:
                found.add(target.name.replace("experts.", f"experts.{expert}.") if target.stacked else target.name)
    assert found == released


def test_quantised_transformers_names(tmp_path):
    """FP8 kept quantised: X.weight_scale_inv, and stacked scales. Renamed by hand; transformers needs a GPU for it."""
    config = tiny_config(
        num_hidden_layers=2,
        compress_ratios=[0, 4],
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        moe_intermediate_size=128,
    )
    storage = Storage("fp8", scales="float32")
    released = released_tensors(config, storage)
    renamed = {}
    modules = {"attn.wq_a": "q_a_proj", "attn.wq_b": "q_b_proj", "attn.wkv": "kv_proj", "attn.wo_a": "o_a_proj"}
    modules |= {"attn.wo_b": "o_b_proj"}
    for name, array in released.items():
        target = name
        for ours, theirs in modules.items():
            for kind, suffix in (("weight", "weight"), ("scale", "weight_scale_inv")):
                if name.startswith("layers.") and name.endswith(f".{ours}.{kind}") and "indexer" not in name:
                    target = f"model.{name.split('.attn.')[0]}.self_attn.{theirs}.{suffix}"
        if ".experts." not in name or "shared" in name:
            renamed[target] = array
    for layer in range(2):
        for kind, suffix in (("weight", ""), ("scale", "_scale_inv")):
            rows = {
                w: np.stack([released[f"layers.{layer}.ffn.experts.{e}.{w}.{kind}"] for e in range(12)])
                for w in ("w1", "w2", "w3")
            }
            prefix = f"model.layers.{layer}.mlp.experts."
            renamed[f"{prefix}gate_up_proj{suffix}"] = np.concatenate([rows["w1"], rows["w3"]], axis=1)
            renamed[f"{prefix}down_proj{suffix}"] = rows["w2"]
    (tmp_path / "a").mkdir()
    write_safetensors(tmp_path / "a/model.safetensors", renamed)
    write_released(tmp_path / "expected", config, storage)
    (tmp_path / "a/config.json").write_text((tmp_path / "expected/config.json").read_text())
    source = open_huggingface(tmp_path / "a")
    assert source.storage == storage
    assert to_hf(source, tmp_path / "c")
    assert json.loads((tmp_path / "c/config.json").read_text()) == json.loads((tmp_path / "a/config.json").read_text())
    for shard in sorted((tmp_path / "expected").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "c" / shard.name).read_bytes()
