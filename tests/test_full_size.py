"""The released models at full size through the real compilers, beside their plans: no chip, nothing timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v4 import Config
from deepseek_v4.layer_spec import draft_specs, layer_specs

_ROOT = Path(__file__).resolve().parents[1]
_MIB = 1 << 20


def needs(topology):
    """The package that has the compiler of a slice's chips, and the extra that has the package."""
    module, extra = ("jax_cuda13_plugin", "gpu") if topology[0] in "hb" else ("libtpu", "tpu")
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (extra: {extra})")


def case(model, topology, mesh, workload, batch, context, limit, slow=True):
    """``limit``: GiB of temporaries that the compiler may need."""
    name = f"{model}-{workload}-{topology}-{context >> 10}K"
    marks = [needs(topology), *([pytest.mark.slow] if slow else [])]
    return pytest.param(model, topology, mesh, workload, batch, context, limit, id=name, marks=marks)


CASES = [
    case("flash", "v6e:4x4", "expert=8,tensor=2", "decode", 1, 65536, 0.25, slow=False),
    case("flash", "v6e:4x4", "expert=8,tensor=2", "prefill", 2, 65536, 1.75),
    case("flash", "v6e:2x4", "expert=2,tensor=4", "decode", 1, 1 << 20, 0.75),
    case("flash", "v6e:2x4", "context=8", "prefill", 1, 1 << 20, 1.25),
    case("pro", "v7x:2x4x4", "data=4,expert=4,tensor=4", "decode", 8, 1 << 20, 4.0),
    case("flash", "h200:8", "data=4,tensor=2", "decode", 28, 1 << 20, 0.25),
    case("flash", "h200:8", "data=4,tensor=2", "prefill", 4, 1 << 20, 0.75),
    case("pro", "h200:8", "tensor=8", "decode", 2, 1 << 20, 0.25),
]


def _compiled(tmp_path, model, topology, mesh, workload, batch, context, *options):
    """What ``scripts/plan.py --compile`` reports of the plan and of the compiler, which must agree."""
    out = tmp_path / "plan.json"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, str(_ROOT / "scripts" / "plan.py"), "--model", model, "--topology", topology]
    command += ["--mesh", mesh, "--workload", workload, "--batch", str(batch), "--context", str(context)]
    command += ["--compile", "--json", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    # The exit code says that the plan fits, arguments agree to the byte and the peak within 15 %.
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(out.read_text())
    return report["plans"][0], report["compiled"]


@pytest.mark.parametrize(("model", "topology", "mesh", "workload", "batch", "context", "limit"), CASES)
def test_compiled_step_is_what_was_planned(tmp_path, model, topology, mesh, workload, batch, context, limit):
    planned, compiled = _compiled(tmp_path, model, topology, mesh, workload, batch, context)
    assert compiled["arguments"] == planned["argument_bytes"]
    # The cache is updated in place.
    assert compiled["aliased"] >= planned["arguments"]["cache"]
    assert compiled["temporaries"] < limit * 2**30, compiled

    # Partial sums, latents, inputs of sublayers, index queries and what they select are all that chips exchange, a few
    # times per layer: no expert, no cache entry, no index score, no residual stream travels.
    found = {collective["kind"]: collective for collective in compiled["collectives"]}
    sums = found.pop("all-reduce")
    config = Config.from_file(_ROOT / "configs" / model)
    specs = (*layer_specs(config), *draft_specs(config))
    if workload == "prefill" and "context" not in mesh:
        # Rows are split: attention, shared expert and routed experts of every layer scatter their sums, those of the
        # routed experts over one mesh axis after the other.
        most = (2 + sum(planned["mesh"][axis] > 1 for axis in ("expert", "tensor"))) * len(specs)
        assert set(found) <= {"all-gather", "all-to-all", "reduce-scatter", "collective-permute"}
        # The embedding's rows may be scattered too.
        assert 2 * len(specs) <= found["reduce-scatter"]["times"] <= most + 1
        assert sums["times"] + found["reduce-scatter"]["times"] <= most + 4
    else:
        assert set(found) <= {"all-gather", "all-to-all"}
    if workload == "decode":
        # Attention, shared expert and routed experts of every layer, the embedding's rows.
        expected = 3 * len(specs) + 1
        # XLA for GPUs joins the sums of shared and routed experts.
        least = 2 * len(specs) + 1 if topology[0] in "hb" else expected
        assert 0.9 * least <= sums["times"] <= expected
        rows = batch // planned["mesh"]["data"]
        assert sums["largest"] <= 2 * rows * 4 * config.hidden_size  # float32 rows of d
        # Heads of 128 bfloat16 and a float32 weight, or selected indices.
        queries = config.index_n_heads * (2 * config.index_head_dim + 4)
        for moved in found.values():
            assert moved["times"] <= sum(spec.indexer for spec in specs)
            assert moved["largest"] <= rows * max(queries, 4 * config.index_topk)
    assert max(moved["largest"] for moved in (sums, *found.values())) <= 64 * _MIB


@pytest.mark.slow
@needs("v6e:16x16")
@pytest.mark.parametrize(
    ("topology", "mesh", "batch", "options"),
    [
        ("v6e:16x16", "data=8,expert=32", 256, ["--expert-parallel"]),
        ("v6e:8x8", "data=32,expert=2", 64, ["--lora", "16"]),
    ],
    ids=["all weights", "adapters"],
)
def test_compiled_training_step_is_what_was_planned(tmp_path, topology, mesh, batch, options):
    planned, compiled = _compiled(tmp_path, "flash", topology, mesh, "train", batch, 4096, *options)
    assert compiled["arguments"] == planned["argument_bytes"]
    # What is trained is updated in place.
    assert compiled["aliased"] == planned["arguments"]["trained weights"] + planned["arguments"]["optimizer"]
