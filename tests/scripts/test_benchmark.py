"""scripts/benchmark.py: both sides run and every figure is there; what the figures are is nobody's assertion."""

import json

import jax
import pytest
from small_models import small_config

from deepseek_v4 import Model
from deepseek_v4.benchmarks.inference import decode_bytes


@pytest.mark.slow
def test_inference_is_measured_beside_transformers(script, hf_checkpoint, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs the 'parity' extra")
    sizes = ["--batches", "2", "--prompts", "8", "20", "--prefill", "40", "--new-tokens", "4"]
    sizes += ["--contexts", "128", "512"]
    files = ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "found.json")]
    assert script("benchmark").main(["inference", "--checkpoint", str(hf_checkpoint), *sizes, *files]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    for side in ("ours", "transformers"):
        assert {"prefill", "first", "decode 2 8", "decode 2 20"} <= set(found[side])
        assert all(value > 0 for key, value in found[side].items() if isinstance(value, float) and key != "acceptance")
    assert [row[0] for row in found["ours"]["sweep"]] == [128, 512]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("of host work") == 2


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_bytes_of_a_decode_step_are_those_of_the_arrays(batch):
    """From 32 sequences on every expert may be chosen: all that is read are the arrays themselves, but for rows."""
    config = small_config(mtp=False)
    model = Model(config)
    params = jax.tree.map(lambda leaf: leaf.size * leaf.dtype.itemsize, model.abstract_params())
    experts = sum(sum(jax.tree.leaves(m["ffn"]["experts"])) for members in params["groups"] for m in members)
    embedding = params["shell"]["embed"]["weight"]
    cache = sum(array.nbytes for array in jax.tree.leaves(model.init_cache(batch, 128)))
    idle = 1 - min(1, batch * config.num_experts_per_tok / config.n_routed_experts)
    rows = batch * embedding // config.vocab_size
    expected = sum(jax.tree.leaves(params)) - idle * experts - embedding + rows + cache
    assert decode_bytes(model, batch, 128) == pytest.approx(expected, abs=1)


def test_bad_sizes_are_explained(script, capsys):
    assert script("benchmark").main(["inference", "--new-tokens", "0"]) == 1
    assert "--new-tokens: expected at least 1" in capsys.readouterr().err
