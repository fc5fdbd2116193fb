"""Adapters merged on the command line, on the built-in small model, as a user would."""

import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from deepseek_v4 import Execution, Model
from deepseek_v4.adapters import LoRA
from deepseek_v4.checkpoint import compare, open_checkpoint, open_source, to_hf
from deepseek_v4.default_model import RandomSource
from deepseek_v4.training import lora, merging

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts/convert_checkpoint.py"
LORA = LoRA(rank=4, alpha=8.0, patterns=("attn.w*", "ffn.shared_experts", "ffn.experts.w2"))


def run(*arguments) -> tuple[int, str]:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = io.StringIO()
    code = module.main([str(argument) for argument in arguments], Console(file=output, width=120))
    return code, output.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The built-in model in the released format, and adapters beside it that are no longer zero."""
    root = tmp_path_factory.mktemp("merge")
    to_hf(RandomSource(), root / "base")
    checkpoint = open_checkpoint(root / "base")
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32"), LORA)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda a: a if a.any() else jnp.asarray(rng.normal(size=a.shape) * 0.02, jnp.float32),
        lora.init_adapters(model, 0),
    )
    params = lora.attach(lora.load_base(checkpoint, model), adapters)
    lora.save_adapters(root / "adapters", model, params)
    code, text = run("merge", root / "base", root / "adapters", root / "merged")
    assert code == 0, text
    return root, model, params, text


def test_what_is_written_is_the_merge_of_the_model_in_memory(trained):
    root, model, params, text = trained
    merged_model, merged, report = merging.merge(model, params)
    checkpoint = open_checkpoint(root / "merged")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(merged_model), merged)
    assert (root / "merged" / "tokenizer.json").read_bytes() == (root / "base" / "tokenizer.json").read_bytes()

    rows = json.loads((root / "merged" / "merge_report.json").read_text())
    assert rows.keys() == {row.name for row in report}
    for row in report:
        np.testing.assert_allclose(rows[row.name]["lost"], row.lost, rtol=1e-4, atol=1e-6)
    # One line for the linears of a name in all layers.
    for name, layers in (("attn.wq_b", 6), ("ffn.experts.w2", 6)):
        line = next(line for line in text.splitlines() if f" {name} " in line)
        assert f" {layers} " in line
        assert "%" in line
    assert "is complete" in text


def test_to_orbax_it_is_the_same_checkpoint(trained):
    root, *_ = trained
    code, text = run("merge", root / "base", root / "adapters", root / "orbax", "--format", "orbax")
    assert code == 0, text
    assert compare(open_source(root / "merged"), open_source(root / "orbax")).equal


def test_adapters_of_another_base_are_refused(trained, capsys):
    root, *_ = trained
    to_hf(RandomSource(seed=1), root / "other")
    assert run("merge", root / "other", root / "adapters", root / "wrong")[0] == 1
    message = capsys.readouterr().err
    assert "trained beside other weights" in message
    assert "shell: not the one of that checkpoint" in message
    assert not (root / "wrong").exists()
    assert run("merge", root / "base", root / "base", root / "wrong")[0] == 1
    assert "adapter_config.json: not the description of adapters" in capsys.readouterr().err


def test_an_interrupted_merge_goes_on(trained, monkeypatch):
    root, *_ = trained
    merge = merging.MergedSource.leaves

    def interrupted(self, item):
        if item.name == "layers.00003":
            raise KeyboardInterrupt
        return merge(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(merging.MergedSource, "leaves", interrupted)
        assert run("merge", root / "base", root / "adapters", root / "again")[0] == 130
    first = root / "again" / "model-00002-of-00008.safetensors"
    written = first.stat().st_mtime_ns
    code, text = run("merge", root / "base", root / "adapters", root / "again")
    assert code == 0, text
    assert first.stat().st_mtime_ns == written
    for name in ("merge_report.json", first.name, "model-00005-of-00008.safetensors"):
        assert (root / "again" / name).read_bytes() == (root / "merged" / name).read_bytes(), name


def test_transformers_computes_the_same_logits(trained):
    torch = pytest.importorskip("torch", reason="needs the 'parity' extra")
    transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs the 'parity' extra")
    pytest.importorskip("accelerate", reason="needs the 'parity' extra")
    root, model, _, _ = trained
    checkpoint = open_checkpoint(root / "merged")
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, 200)
    forward = jax.jit(lora.base_model(model).forward, compiler_options={"xla_backend_optimization_level": 0})
    ours = forward(checkpoint.load(lora.base_model(model)), jnp.asarray(tokens)[None]).logits[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "merged", dtype=torch.float32).float().eval()
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    # float32 on both sides, logits of size one (as in tests/model/test_parity_transformers.py).
    np.testing.assert_allclose(ours, found, rtol=0, atol=1e-4)
