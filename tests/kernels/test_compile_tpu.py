"""Kernels at V4 shapes through the real TPU compilers: they compile, stay within their limits and copy no cache.

Each target compiles in a process of its own: libtpu takes environment variables and hands out its devices once.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.compile_table import copies_of, devices_needed, used_fast_memory
from pallas_kernels.implementation import choose, default_name
from pallas_kernels.registry import Cost, cases_matching, operations

ROOT = Path(__file__).resolve().parents[2]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra [tpu])"
)


def _compile(*options):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e", "v7x"])
def test_representative_shapes_compile(target):
    _compile("--targets", target, "--representative")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "v7x"])
def test_every_shape_compiles(target):
    _compile("--targets", target)


def test_every_operation_has_cases_with_distinct_names_and_ci_shapes():
    for name, operation in operations().items():
        cases = operation.cases()
        assert len({case.name for case in cases}) == len(cases), name
        assert any(case.representative for case in cases), f"{name}: no case is compiled in CI"
        on_gpus = [case.on(targets.chip("h200")) for case in cases]
        assert [case.name for case in on_gpus] == [case.name for case in cases]
        for case in (*cases, *on_gpus):
            assert case.traced(), case.name
            assert set(case.protected) <= set(case.traced()), case.name
            assert set(case.split) <= set(case.traced()), case.name


def test_attention_costs_are_hand_sums():
    cases = {case.name: case for case in operations()["compressed_attention"].cases()}
    csa = cases["flash/csa/decode/64x128K"].cost
    row = 512 * 2
    assert csa.bytes_read == 64 * (64 * row + 512 * row + 512 * 4 + 128 * row) + 64 * 4
    assert csa.bytes_written == 64 * 64 * row
    assert csa.operations == {"bfloat16": 64 * 64 * (512 + 128) * 512 * 2 * 2}
    # Released bytes cross in whole rows of words, two per entry.
    assert cases["flash/csa-fp8/decode/64x128K"].cost == csa
    hca = cases["pro/hca/decode/1x1M"].cost
    assert hca.bytes_read == 128 * row + 8192 * row + 4 + 128 * row + 128 * 4
    chunk = cases["flash/hca/prefill/2048x8K"].cost
    visible = sum((t + 1) // 128 for t in range(8192 - 2048, 8192))
    assert chunk.operations == {"bfloat16": 4 * 64 * 512 * (visible + 2048 * 128)}


def test_roofline_is_the_slower_of_memory_and_products():
    chip = targets.chip("v6e")
    assert Cost(1640, 1640, {"bfloat16": 1}).roofline_seconds(chip) == pytest.approx(2e-9)
    assert Cost(0, 1, {"bfloat16": 918_000}).roofline_seconds(chip) == pytest.approx(1e-9)
    assert Cost(0, 1, {"bfloat16": 918_000, "vector": 10**9}).roofline_seconds(chip) == pytest.approx(1e-9)


def test_a_cache_too_large_for_a_chip_is_shared():
    case = {c.name: c for c in operations()["compressed_attention"].cases()}["flash/csa/decode/256x1M"]
    # Two layers of 256 x 262,144 entries of 1 KiB: 128 GiB.
    assert devices_needed(case, targets.chip("v5e")) == 16
    assert devices_needed(case, targets.chip("v6e")) == 8
    assert devices_needed(case, targets.chip("v7x")) == 2


def test_patterns_pick_cases():
    operation = operations()["compressed_attention"]
    assert {c.name for c in cases_matching(operation, ["flash,swa"])} == {
        "flash/swa/decode/64x8K",
        "flash/swa/prefill/2048x8K",
    }


def test_copies_and_fast_memory_are_read_from_a_program():
    text = """
  %copy.1 = u32[2,8,256]{2,1,0:T(8,128)} copy(%p.0)
  %slice.1 = u32[1,8,256]{2,1,0:T(8,128)} dynamic-slice(%p.0, %i)
  %copy-done = u32[2,8,256]{2,1,0:T(8,128)S(1)} copy-done(%copy-start)
  %x = u32[2,8,256]{2,1,0:T(8,128)} bitcast(%p.0)
  %y = s32[2,8,256]{2,1,0:T(8,128)} add(%a, %b)
  %z = bf16[4] custom-call(%p.0), "used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"24576"}]
"""
    found = copies_of(text, [jax.ShapeDtypeStruct((2, 8, 256), jnp.uint32)])
    assert found == ("copy.1 = u32[2,8,256] copy", "slice.1 = u32[1,8,256] dynamic-slice")
    assert used_fast_memory(text) == 24576


def test_chips_know_themselves():
    for name, chip in targets.CHIPS.items():
        assert targets.chip_of_kind(chip.device_kind) is chip, name
    assert targets.chip_of_kind("TPU v4") is None
    assert targets.current_chip() is None
    with pytest.raises(targets.TargetError, match="unknown target 'v9'; known: v5e, v5p"):
        targets.chip("v9")


def test_nothing_is_chosen_but_the_twin_on_a_cpu():
    implementations = {"xla": min, "tpu": max}
    assert choose("op", implementations, None) is min
    assert default_name(implementations, {}) == "xla"
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.set_mesh(mesh):
        assert default_name(implementations, {}) == "xla"


def test_alternatives_are_tried_in_order_and_refusals_say_why():
    implementations = {"xla": min, "tpu_interpret": max}
    small = {"tpu_interpret": lambda chip: "too small"}
    assert choose("op", implementations, "tpu_interpret|xla") is max
    assert choose("op", implementations, "gpu|xla") is min
    assert choose("op", implementations, "tpu_interpret|xla", small) is min
    with pytest.raises(ValueError, match="'gpu': there is none; 'tpu_interpret': too small"):
        choose("op", implementations, "gpu|tpu_interpret", small)
    with pytest.raises(ValueError, match="no implementation 'cpu'; available: tpu_interpret, xla"):
        choose("op", implementations, "cpu|xla")
