"""Expert groups over axes of the batch: tokens travel to experts, and nothing changes but where things are computed."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from small_models import compiled

from deepseek_v4 import MeshError, Placement, Rules, make_mesh
from deepseek_v4.dispatch import MOST_GATHERED, Exchange, exchange_of, ragged_all_to_all
from deepseek_v4.formats import simulate_fp8
from pallas_kernels.grouped_matmul import expert_mlp

TESTS = Path(__file__).resolve().parent
EXPERTS, CHOICES, WIDTH, HIDDEN = 8, 3, 256, 64


def placed(mesh="data=2,expert=4", fsdp=False, **exchange):
    return Placement(make_mesh(mesh), Rules.expert_parallel(fsdp), Exchange(**exchange))


def inputs(tokens=48, ids=None, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    if ids is None:
        ids = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)])
    x = jnp.asarray(rng.normal(size=(tokens, WIDTH)), dtype)
    routing = jnp.asarray(rng.random((tokens, CHOICES)), jnp.float32)
    shapes = ((EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    weights = tuple(jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32) for shape in shapes)
    return x, jnp.asarray(ids, jnp.int32), routing, weights


def run(placement, x, ids, routing, weights):
    call = functools.partial(expert_mlp, limit=1.0)
    pairs = tuple((w, None) for w in weights)
    if placement is None:
        return call(x, ids, routing, *pairs)
    axes = [(("experts", *names), None) for names in (("expert_width", "embed"), ("embed", "expert_width"))]
    axes = [axes[0], axes[1], axes[0]]

    def local(x, ids, routing, layer, *weights, **moved):
        return call(x, ids, routing, *weights, **moved)

    return placement.run_experts(local, x, ids, routing, jnp.asarray(0), pairs, axes)


ROUTINGS = {
    "mixed": None,
    "one expert": np.full((48, CHOICES), 5),
    "one device": np.tile([6, 7, 6], (48, 1)),
    "nothing for some": np.tile(np.arange(48)[:, None] % 2, (1, CHOICES)),
}


@pytest.mark.parametrize("rows", [7, 1 << 14], ids=["many rounds", "one round"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_has_the_bits_of_one_device(routing, rows):
    arguments = inputs(ids=ROUTINGS[routing])
    expected = compiled(functools.partial(run, None))(*arguments)
    found = compiled(functools.partial(run, placed(form="dispatch", rows=rows)))(*arguments)
    np.testing.assert_array_equal(found, expected)


def test_gathered_tokens_give_the_same_sums():
    arguments = inputs()
    expected = compiled(functools.partial(run, None))(*arguments)
    for mesh in ("data=2,expert=4", "data=2,expert=2,tensor=2"):
        for form in ("gather", "dispatch"):
            found = compiled(functools.partial(run, placed(mesh, form=form)))(*arguments)
            # Sums of at most 2 * 3 float32 numbers of order 1, in another order.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("routing", ["mixed", "one device"])
def test_gradients_are_those_of_one_device(routing):
    x, ids, routing_weights, weights = inputs(ids=ROUTINGS[routing])

    def loss(placement, x, routing_weights, weights):
        return jnp.sum(jnp.sin(run(placement, x, ids, routing_weights, weights)))

    def gradient(placement):
        return compiled(jax.grad(functools.partial(loss, placement), argnums=(0, 1, 2)))(x, routing_weights, weights)

    expected = gradient(None)
    found = gradient(placed(form="dispatch", rows=20))
    # Rows and routing weights have one device's bits; a matrix sums its rows in rounds, float32 in another order.
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    for a, b in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_rows_sent_in_fp8_are_those_that_are_simulated():
    x, ids, routing, weights = inputs(dtype=jnp.bfloat16)
    expected = compiled(functools.partial(run, None))(simulate_fp8(x, 128), ids, routing, weights)
    fp8 = placed(form="dispatch", sent="fp8")
    np.testing.assert_array_equal(compiled(functools.partial(run, fp8))(x, ids, routing, weights), expected)
    rounded = compiled(functools.partial(run, placed(form="dispatch", sent="fp8", returned="bfloat16")))
    # Each of the three results of a token is rounded to 8 bits.
    atol = CHOICES * 2**-8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(rounded(x, ids, routing, weights), expected, rtol=0, atol=atol)


def test_gradients_of_rows_sent_in_fp8_are_those_of_simulated_rows():
    x, ids, routing, weights = inputs(dtype=jnp.bfloat16)

    def gradient(placement, x):
        def loss(x, routing, weights):
            return jnp.sum(jnp.sin(run(placement, x, ids, routing, weights)))

        return compiled(jax.grad(loss, argnums=(0, 1, 2)))(x, routing, weights)

    expected = gradient(placed(form="dispatch"), simulate_fp8(x, 128))
    found = gradient(placed(form="dispatch", sent="fp8"), x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_precisions_of_rows_that_do_not_travel_are_refused():
    assert exchange_of("exact", False) == Exchange()
    assert exchange_of("fp8-bfloat16", True) == Exchange(sent="fp8", returned="bfloat16")
    with pytest.raises(ValueError, match="no rows travel"):
        exchange_of("fp8", False)


def test_the_twin_of_the_ragged_exchange_moves_what_it_says():
    rng = np.random.default_rng(1)
    group, rows, room = 4, 12, 24
    sizes = rng.integers(0, 4, (group, group))  # by sender and receiver
    sizes[2] = 0
    first = np.cumsum(sizes, axis=1) - sizes
    begin = np.cumsum(sizes, axis=0) - sizes + 3
    operand = rng.normal(size=(group, rows, 2)).astype(np.float32)
    output = rng.normal(size=(group, room, 2)).astype(np.float32)
    expected = output.copy()
    for sender in range(group):
        for receiver in range(group):
            a, b, n = first[sender, receiver], begin[sender, receiver], sizes[sender, receiver]
            expected[receiver, b : b + n] = operand[sender, a : a + n]
    # Two mesh axes, counted as the mesh does.
    mesh = Mesh(np.array(jax.devices()[:group]).reshape(2, 2), ("a", "b"))
    spec = PartitionSpec(("a", "b"))

    def move(*arrays):
        arrays = [array[0] for array in arrays]
        return ragged_all_to_all(*arrays, axis_name=("a", "b"), native=False)[None]

    arguments = operand, output, first, sizes, begin, sizes.T
    moved = jax.shard_map(move, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False)
    np.testing.assert_array_equal(compiled(moved)(*map(jnp.asarray, arguments)), expected)


def compiled_for(chip, *programs):
    """Collectives by kind, and kernels, of every program: see compile_dispatch.py."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "compile_dispatch.py"), chip, *programs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def compiles(chip, package, *programs, slow=False):
    missing = importlib.util.find_spec(package) is None
    marks = [pytest.mark.skipif(missing, reason=f"{package} is not installed"), *([pytest.mark.slow] if slow else [])]
    return pytest.param(chip, programs, marks=marks, id=f"{chip}-{'-'.join(programs)}")


GRADIENT_KERNELS = {
    "gradient": ["expert_mlp_bf16", "expert_mlp_weight_gradient_bf16", "expert_weight_gradient"],
    "gradient-packed": ["expert_mlp_fp4", "expert_mlp_gradient_fp4"],
}
"""What TPUs run: float32 masters rounded, and packed weights as they are stored."""


@pytest.mark.parametrize(
    ("chip", "programs"),
    [
        compiles("v6e", "libtpu", "fp8-bfloat16"),
        compiles("v6e", "libtpu", "exact", "fp8", "gradient", "gradient-packed", slow=True),
        compiles("h200", "jax_cuda13_plugin", "fp8-bfloat16", "exact", "fp8", "gradient"),
    ],
)
def test_real_compilers_keep_the_ragged_exchange_and_gather_no_experts(chip, programs):
    compiled_programs = compiled_for(chip, *programs)
    assert set(compiled_programs) == set(programs)
    # A round of 4 * 640 * 4 rows of 1,024 numbers, on TPUs filled up to 512 bytes, and their weights; results, which
    # are added where they came from, of 640 * 4.
    rows, results, tile = 4 * 640 * 4, 640 * 4 * 1024, 512 if chip == "v6e" else 4
    sizes = {"exact": (2048, 4), "fp8": (1032, 4), "fp8-bfloat16": (1032, 2)}
    for name, program in compiled_programs.items():
        found = program["collectives"]
        # All that is gathered is how many rows every device has for every expert.
        assert set(found) == {"all-gather", "ragged-all-to-all"}, name
        assert found["all-gather"]["bytes"] == 4 * 16 * 4, name
        moved = found["ragged-all-to-all"]
        if name.startswith("gradient"):
            # Rows, weights and results; again rows and weights, with gradients, and both of theirs back.
            assert moved["times"] == 8
            if chip == "v6e":
                assert program["kernels"] == GRADIENT_KERNELS[name]
        else:
            sent, returned = sizes[name]
            assert moved["times"] == 3, name
            assert moved["bytes"] == rows * (-(-sent // tile) * tile + tile) + returned * results, name


@pytest.mark.parametrize(("chip", "programs"), [compiles("v6e", "libtpu", "scattered")])
def test_sums_of_experts_over_all_chips_are_scattered(chip, programs):
    (program,) = compiled_for(chip, *programs).values()
    found = program["collectives"]
    # Half of a row's float32 sums, then a quarter of them; one all-reduce would be all of them.
    assert set(found) == {"reduce-scatter"}
    assert (found["reduce-scatter"]["times"], found["reduce-scatter"]["bytes"]) == (2, 2560 * 1024 * 4 * 3 / 4)


def test_few_tokens_are_gathered_and_many_dispatched():
    assert Exchange().form_for(MOST_GATHERED) == "gather"
    assert Exchange().form_for(MOST_GATHERED + 1) == "dispatch"
    assert Exchange("dispatch").form_for(1) == "dispatch"


def test_rounds_bound_what_a_device_receives():
    """Whatever the routing: no array of the program has more rows than a round or a device's own assignments."""
    arguments = inputs(tokens=512)
    text = compiled(functools.partial(run, placed(form="dispatch", rows=64))).lower(*arguments).as_text()
    assert "stablehlo.all_gather" in text
    own = 512 // 8 * CHOICES
    rows = {int(n) for n in re.findall(rf"tensor<(\d+)x{WIDTH}xf32>", text)}
    assert max(rows - {512}) == own, rows


def test_groups_of_half_an_expert_axis_are_refused():
    with pytest.raises(MeshError, match="some but not all"):
        Rules(batch=("data",), experts=("data", "expert"), vocab=())
