"""The expert MLP's gradient to weights that are trained: every implementation against float64, and what it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh
from test_grouped_matmul import (
    EXPERTS,
    HIDDEN,
    LIMIT,
    ROUTINGS,
    WIDTH,
    compare,
    equations,
    gradients,
    rows,
    some_adapters,
    weights,
)
from test_grouped_matmul_gradient import cotangent

from deepseek_v4.dispatch import Dispatch, Exchange
from deepseek_v4.formats import simulate_fp8
from pallas_kernels.grouped_matmul import cost, expert_mlp, expert_mlp_gradient, expert_mlp_weight_gradient, operation
from pallas_kernels.grouped_matmul import xla as grouped_xla
from pallas_kernels.grouped_matmul.tpu_weight_gradient import BlockRows, WeightTiles, weight_gradients

IMPLEMENTATIONS = ("xla", "tpu_interpret")
SHAPES = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN))


@functools.cache
def compiled(implementation: str, **static):
    return jax.jit(functools.partial(expert_mlp_weight_gradient, implementation=implementation, limit=LIMIT, **static))


def run(implementation, x, ids, routing, packed, totals=None, **static):
    arguments = (cotangent(x), x, jnp.asarray(ids, jnp.int32), routing, *packed)
    dx, drouting, found = compiled(implementation, **static)(*arguments, totals=totals)
    assert {a.dtype for a in (dx, drouting, *found)} == {jnp.dtype("float32")}
    return dx, drouting, found


def oracle(gradient, x, ids, routing, values, simulate=False):
    """float64 gradients of w1, w2, w3, and of each the sum of magnitudes that relative errors of roundings multiply."""
    w1, w2, w3 = values
    x, gradient, routing = (np.asarray(a, np.float64) for a in (x, gradient, routing))
    found, sizes = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    for t, k in np.ndindex(routing.shape):
        expert = int(np.asarray(ids)[t, k])
        if not 0 <= expert < EXPERTS:
            continue
        gate, up = w1[expert] @ x[t], w3[expert] @ x[t]
        through_gate, through_up = gate < LIMIT, np.abs(up) < LIMIT
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up * routing[t, k]
        if simulate:
            rounded = simulate_fp8(jnp.asarray(hidden, jnp.float32).astype(jnp.bfloat16), 128)
            hidden = np.asarray(rounded, np.float64)
        slopes = (
            through_gate * up * sigmoid * (1 + gate * (1 - sigmoid)) * routing[t, k],
            through_up * gate * sigmoid * routing[t, k],
        )
        of_hidden, size = w2[expert].T @ gradient[t], np.abs(w2[expert]).T @ np.abs(gradient[t])
        for i, slope in zip((0, 2), slopes, strict=True):
            found[i][expert] += np.outer(of_hidden * slope, x[t])
            sizes[i][expert] += np.outer(size * np.abs(slope), np.abs(x[t]))
        found[1][expert] += np.outer(gradient[t], hidden)
        sizes[1][expert] += np.outer(np.abs(gradient[t]), np.abs(hidden))
    return found, sizes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_routing_matches_float64(implementation):
    packed, values = weights("bf16")
    for number, (name, ids) in enumerate(ROUTINGS.items()):
        x, routing = rows(50)
        # Tokens that no expert here serves hold NaN.
        served = (np.asarray(ids) >= 0) & (np.asarray(ids) < EXPERTS)
        x = jnp.where(served.any(axis=1)[:, None], x, jnp.nan)
        dx, drouting, found = run(implementation, x, ids, routing, packed)
        expected, sizes = oracle(cotangent(x), x, ids, routing, values)
        for ours, theirs, size in zip(found, expected, sizes, strict=True):
            # Two of the factors of a product are rounded to bfloat16, each by at most 2^-8; float32 sums add little.
            np.testing.assert_array_less(np.abs(ours - theirs), (2.0**-7 + 2.0**-10) * size + 1e-6)
            for expert in set(range(EXPERTS)) - set(np.asarray(ids)[served].tolist()):
                assert not np.asarray(ours)[expert].any(), name
        if number == 0:
            # Rows and routing weights have the bits of the gradient through constants.
            alone = jax.jit(functools.partial(expert_mlp_gradient, implementation=implementation, limit=LIMIT))
            theirs = alone(cotangent(x), x, jnp.asarray(ids, jnp.int32), routing, *packed)
            jax.tree.map(np.testing.assert_array_equal, (dx, drouting), theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_of_w2_are_rounded_as_activations_are_simulated(implementation):
    packed, values = weights("bf16")
    x, routing = rows(51)
    ids = ROUTINGS["mixed"]
    _, _, found = run(implementation, x, ids, routing, packed, simulate_activations=True)
    expected, sizes = oracle(cotangent(x), x, ids, routing, values, simulate=True)
    # The gradient is rounded to bfloat16; a number at the edge of two codes of E4M3 may take the other, 2^-3 away.
    error = np.abs(np.asarray(found[1]) - expected[1])
    assert (error > 2.0**-8 * sizes[1] + 1e-6).mean() < 0.01
    np.testing.assert_array_less(error, 2.0**-3 * sizes[1] + 1e-6)
    _, _, plain = run(implementation, x, ids, routing, packed)
    assert np.abs(np.asarray(found[1]) - np.asarray(plain[1])).max() > 2.0**-8 * sizes[1].max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_added_to_totals(implementation):
    packed, _ = weights("bf16")
    x, routing = rows(52)
    rng = np.random.default_rng(52)
    totals = tuple(jnp.asarray(rng.normal(size=shape) * 100, jnp.float32) for shape in SHAPES)
    ids = ROUTINGS["empty experts"]
    _, _, alone = run(implementation, x, ids, routing, packed)
    _, _, found = run(implementation, x, ids, routing, packed, totals)
    for ours, theirs, total in zip(found, alone, totals, strict=True):
        np.testing.assert_allclose(ours, theirs + total, rtol=2e-7, atol=2e-7 * float(jnp.abs(theirs).max() + 500))
        np.testing.assert_array_equal(np.asarray(ours)[[1, 3]], np.asarray(total)[[1, 3]])


def test_a_layer_of_stacked_weights_is_that_layer():
    packed, _ = weights("bf16")
    stacked = tuple((jnp.stack([jnp.roll(w, 1, axis=0), w]), None) for w, _ in packed)
    x, routing = rows(53)
    found = run("tpu_interpret", x, ROUTINGS["mixed"], routing, stacked, layer=1)
    jax.tree.map(np.testing.assert_array_equal, found, run("tpu_interpret", x, ROUTINGS["mixed"], routing, packed))


@pytest.mark.parametrize("adds", [False, True])
def test_the_kernel_adds_up_blocks_whatever_lies_beyond_their_rows(adds):
    """Several tiles, two cores; full and partial blocks, experts without any, blocks not in use; NaN all around."""
    rng = np.random.default_rng(54)
    sizes, owners, experts = np.array([256, 41, 128, 0, 0]), np.array([1, 1, 3, 0, 0]), 5

    def block_rows(columns):
        values = rng.normal(size=(sizes.size, 256, columns))
        values[np.arange(256) >= sizes[:, None]] = np.nan
        return jnp.asarray(values, jnp.bfloat16)

    kept = BlockRows(*(block_rows(columns) for columns in (512, 512, 256, 256, 256)))
    shapes = ((experts, 256, 512), (experts, 512, 256), (experts, 256, 512))
    totals = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes) if adds else None
    expected = [np.asarray(t, np.float64) for t in totals] if adds else [np.zeros(shape) for shape in shapes]
    for block, (expert, size) in enumerate(zip(owners, sizes, strict=True)):
        x, gradient, of_gate, of_up, hidden = (np.asarray(a[block, :size], np.float64) for a in kept)
        for total, left, right in zip(expected, (of_gate, gradient, of_up), (x, hidden, x), strict=True):
            total[expert] += left.T @ right
    found = weight_gradients(
        kept,
        jnp.asarray(owners, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        experts,
        totals,
        tiles=WeightTiles(width=128, columns=256, rows=128, left=128, right=128),
        cores=2,
        interpret=True,
    )
    for ours, theirs in zip(found, expected, strict=True):
        # float32 sums of 297 products of order one.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def masters():
    """Weights that bfloat16 does not hold."""
    rng = np.random.default_rng(55)
    packed, _ = weights("bf16")
    return tuple(
        (w.astype(jnp.float32) * jnp.asarray(1 + 1e-3 * rng.normal(size=w.shape), jnp.float32), None) for w, _ in packed
    )


def test_float32_masters_are_rounded_and_trained_as_by_the_twin():
    x, routing = rows(55)
    found = gradients(functools.partial(expert_mlp, implementation="tpu_interpret"), x, routing, masters())
    assert {a.dtype for a in found[2]} == {jnp.dtype("float32")}
    # Both round cotangents of bfloat16 operands to bfloat16, in different orders of summation.
    compare(gradients(grouped_xla.expert_mlp, x, routing, masters()), found, 2e-2)


def training_kernels(function, *arguments) -> list[str]:
    """Names of the kernels that run for the gradients of ``function`` to all of its arguments."""
    every = tuple(range(len(arguments)))
    traced = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(function(*a)), argnums=every))(*arguments)
    return [e.params["name"] for e in equations(traced.jaxpr) if e.primitive.name == "pallas_call"]


TRAINED = ["expert_mlp_bf16", "expert_mlp_weight_gradient_bf16", "expert_weight_gradient"]
TPU = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")


def test_training_runs_on_kernels_by_default_on_a_tpu():
    x, routing = rows(56)
    ids = jnp.asarray(ROUTINGS["mixed"])

    def layer(x, routing, *matrices, **options):
        return expert_mlp(x, ids, routing, *((m, None) for m in matrices), limit=LIMIT, **options)

    matrices = tuple(w for w, _ in masters())
    assert training_kernels(layer, x, routing, *matrices) == []
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=TPU)):
        assert training_kernels(layer, x, routing, *matrices) == TRAINED
        assert training_kernels(layer, x, routing, *(m.astype(x.dtype) for m in matrices)) == TRAINED
        assert training_kernels(layer, x.astype(jnp.float32), routing, *matrices) == []
        assert training_kernels(functools.partial(layer, adapters=some_adapters()), x, routing, *matrices) == []
    packed, _ = weights("fp4")
    with pytest.raises(ValueError, match="packed weights are constants"):
        expert_mlp_weight_gradient(cotangent(x), x, ids, routing, *packed, limit=LIMIT, implementation="tpu_interpret")


def test_experts_whose_rows_travel_are_trained_by_the_kernels():
    x, routing = rows(57, tokens=8)
    ids = jnp.asarray(np.random.default_rng(57).integers(0, 2 * EXPERTS, (8, 3)), jnp.int32)
    matrices = tuple(jnp.concatenate([w, w]) for w, _ in masters())
    exchange = Dispatch(("device",), Exchange("dispatch"), native=True)

    def local(x, routing, ids, *matrices):
        return expert_mlp(x, ids, routing, *((m, None) for m in matrices), limit=LIMIT, exchange=exchange)

    mesh, split = AbstractMesh((2,), ("device",), abstract_device=TPU), PartitionSpec("device")
    layer = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 6, out_specs=split, check_vma=False)
    with use_abstract_mesh(mesh):
        found = training_kernels(lambda x, routing, *m: layer(x, routing, ids, *m), x, routing, *matrices)
    assert found == TRAINED


def test_costs_are_hand_sums():
    case = next(c for c in operation.weight_gradient_cases() if c.name == "flash/bf16/train/4096/8-experts")
    assert case.cost.operations == {"bfloat16": 8 * 2 * 4096 * 6 * 4096 * 2048}
    matrices = 3 * 8 * 4096 * 2048
    assert case.cost.bytes_read == 2 * matrices + 4096 * 4096 * (2 + 4) + 8 * 4096 * 6
    assert case.cost.bytes_written == 4 * matrices + 4 * 4096 * (4096 + 6)
    assert cost.kept_row_bytes(4096, 2048) == 2 * (4096 + 4096 + 3 * 2048)
