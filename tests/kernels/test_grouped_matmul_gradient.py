"""The expert MLP's gradient to rows and routing weights: every implementation against float64, and what it promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh
from test_grouped_matmul import (
    EXPERTS,
    HIDDEN,
    KINDS,
    LIMIT,
    ROUTINGS,
    WIDTH,
    equations,
    rows,
    some_adapters,
    stored,
    weights,
)

from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul import cost, expert_mlp, expert_mlp_gradient, operation, tpu_backward

IMPLEMENTATIONS = ("xla", "tpu_interpret")


def cotangent(x, seed: int = 0):
    return jnp.asarray(np.random.default_rng(100 + seed).normal(size=x.shape), jnp.float32)


def oracle(gradient, x, ids, routing, values, limit: float = LIMIT):
    """float64 (dx, drouting), and of each the sum of magnitudes that the relative errors of roundings multiply.

    At a clamp's very edge the twin's convention: half of the gradient passes.
    """
    w1, w2, w3 = values
    x, gradient, routing = (np.asarray(a, np.float64) for a in (x, gradient, routing))
    dx, drouting = np.zeros_like(x), np.zeros_like(routing)
    size_x, size_routing = np.zeros_like(x), np.zeros_like(routing)
    for t, k in np.ndindex(routing.shape):
        expert = int(np.asarray(ids)[t, k])
        if not 0 <= expert < w1.shape[0]:
            continue
        gate, up = w1[expert] @ x[t], w3[expert] @ x[t]
        passes_gate = (gate < limit) + 0.5 * (gate == limit)
        passes_up = (np.abs(up) < limit) + 0.5 * (np.abs(up) == limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        sigmoid = 1 / (1 + np.exp(-gate))
        active = gate * sigmoid * up
        slopes = (
            passes_gate * up * sigmoid * (1 + gate * (1 - sigmoid)) * routing[t, k],
            passes_up * gate * sigmoid * routing[t, k],
        )
        dhidden = w2[expert].T @ gradient[t]
        size = np.abs(w2[expert]).T @ np.abs(gradient[t])
        drouting[t, k] = dhidden @ active
        size_routing[t, k] = size @ np.abs(active)
        for slope, matrix in zip(slopes, (w1[expert], w3[expert]), strict=True):
            dx[t] += matrix.T @ (dhidden * slope)
            size_x[t] += np.abs(matrix).T @ (size * np.abs(slope))
    return (dx, drouting), (size_x, size_routing)


@functools.cache
def compiled(implementation: str, limit: float = LIMIT):
    return jax.jit(functools.partial(expert_mlp_gradient, implementation=implementation, limit=limit))


def run(implementation, gradient, x, ids, routing, packed, limit: float = LIMIT, **options):
    found = compiled(implementation, limit)(gradient, x, jnp.asarray(ids, jnp.int32), routing, *packed, **options)
    assert [a.dtype for a in found] == [jnp.float32, jnp.float32]
    return [np.asarray(a) for a in found]


def check(found, gradient, x, ids, routing, values, limit: float = LIMIT):
    expected, sizes = oracle(gradient, x, ids, routing, values, limit)
    # The gradient is rounded to bfloat16 before W2, those of gate and up before W1 and W3, each by at most 2^-9;
    # float32 sums of a few hundred terms stay far below 2^-10.
    for ours, theirs, size in zip(found, expected, sizes, strict=True):
        assert np.isfinite(theirs).all()
        assert np.isfinite(ours).all()
        np.testing.assert_array_less(np.abs(ours - theirs), (2.0**-8 + 2.0**-10) * size + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_routing_matches_float64(implementation, kind):
    packed, values = weights(kind)
    for name, ids in ROUTINGS.items():
        x, routing = rows(30)
        gradient = cotangent(x)
        found = run(implementation, gradient, x, ids, routing, packed)
        check(found, gradient, x, ids, routing, values)
        served = (np.asarray(ids) >= 0) & (np.asarray(ids) < EXPERTS)
        # Tokens that no expert here serves, padding among them, and choices of experts elsewhere: zeros, not small.
        assert not found[0][~served.any(axis=1)].any(), name
        assert not found[1][~served].any(), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_passes_a_clamp(implementation):
    packed, values = weights("fp4")
    x, routing = rows(31, size=4.0)
    gate, up = (np.einsum("tk,emk->tem", np.asarray(x, np.float64), values[i]) for i in (0, 2))
    for beyond in (gate > LIMIT, gate < -LIMIT, up > LIMIT, up < -LIMIT):
        assert beyond.mean() > 0.05
    gradient = cotangent(x)
    found = run(implementation, gradient, x, ROUTINGS["mixed"], routing, packed)
    check(found, gradient, x, ROUTINGS["mixed"], routing, values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_passes_at_the_edge_of_a_clamp(implementation):
    # A row that is one at a single input meets the codes of a column; 6 is the largest of them and the limit.
    packed = tuple((w, jnp.full_like(scale, 1.0)) for w, scale in weights("fp4")[0])
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = [
        codes[np.stack([w & 15, w >> 4], -1)].reshape(*w.shape[:2], -1) for w in (np.asarray(w) for w, _ in packed)
    ]
    places = np.array([3, 64, 255, 256, 400, 511])
    x = jnp.zeros((6, HIDDEN), jnp.bfloat16).at[np.arange(6), places].set(1)
    for matrix in (values[0], np.abs(values[2])):
        assert (matrix[:, :, places] == 6).any()
    _, routing = rows(32)
    gradient = cotangent(x)
    found = run(implementation, gradient, x, ROUTINGS["mixed"], routing, packed, limit=6.0)
    check(found, gradient, x, ROUTINGS["mixed"], routing, values, limit=6.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_stacked_weights_is_that_layer(implementation):
    packed, _ = weights("fp8")
    stacked = jax.tree.map(lambda a: jnp.stack([jnp.roll(a, 1, axis=0), a]), packed)
    x, routing = rows(33)
    expected = run(implementation, cotangent(x), x, ROUTINGS["mixed"], routing, packed)
    found = run(implementation, cotangent(x), x, ROUTINGS["mixed"], routing, stacked, layer=jnp.int32(1))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_crowded_expert_takes_several_blocks_the_last_of_them_partial():
    packed, values = weights("fp4")
    tokens = 2 * 128 + 40
    x, routing = rows(34, tokens=tokens, choices=1)
    ids = np.full((tokens, 1), 1)
    ids[7], ids[9], ids[11] = 3, -1, EXPERTS
    gradient = cotangent(x)
    small = tpu_backward.GradientTiles(rows=(256,), products=(128,))
    arguments = (gradient, x, jnp.asarray(ids), routing, *packed)
    found = tpu_backward.expert_mlp_gradient(*arguments, limit=LIMIT, layer=None, tiles=small, interpret=True)
    found = [np.asarray(a) for a in found]
    check(found, gradient, x, ids, routing, values)
    assert not found[0][[9, 11]].any()
    assert not found[1][[9, 11]].any()


def test_two_cores_split_the_width():
    rng = np.random.default_rng(35)
    shapes = ((2 * WIDTH, HIDDEN), (HIDDEN, 2 * WIDTH), (2 * WIDTH, HIDDEN))
    packed, values = zip(*(stored(rng, "fp4", *shape) for shape in shapes), strict=True)
    x, routing = rows(35)
    gradient = cotangent(x)
    arguments = (gradient, x, jnp.asarray(ROUTINGS["mixed"], jnp.int32), routing, *packed)
    found = tpu_backward.expert_mlp_gradient(*arguments, limit=LIMIT, layer=None, interpret=True, cores=2)
    check([np.asarray(a) for a in found], gradient, x, ROUTINGS["mixed"], routing, values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_does_not_depend_on_its_batch(implementation):
    packed, _ = weights("fp4")
    x, routing = rows(36)
    ids = np.asarray(ROUTINGS["mixed"])
    gradient = cotangent(x)
    found = run(implementation, gradient, x, ids, routing, packed)
    order = np.array([4, 2, 0, 5, 1, 3])
    permuted = run(implementation, gradient[order], x[order], ids[order], routing[order], packed)
    # Token 1 among others that hold nothing but NaN and crowd its experts.
    beside = run(
        implementation,
        jnp.full_like(gradient, jnp.nan).at[1].set(gradient[1]),
        jnp.full_like(x, jnp.nan).at[1].set(x[1]),
        np.broadcast_to(ids[1], ids.shape),
        jnp.broadcast_to(routing[1], routing.shape),
        packed,
    )
    for ours, theirs, other in zip(found, permuted, beside, strict=True):
        np.testing.assert_array_equal(theirs, ours[order])
        np.testing.assert_array_equal(other[1], ours[1])


def gradient_kernels(function, *arguments) -> list[str]:
    """Names of the kernels that a gradient of ``function`` to its first argument runs."""
    traced = jax.make_jaxpr(jax.grad(lambda x, *rest: jnp.sum(function(x, *rest)), argnums=0))(*arguments)
    names = [e.params["name"] for e in equations(traced.jaxpr) if e.primitive.name == "pallas_call"]
    return [name for name in names if "gradient" in name]


def test_training_differentiates_by_the_kernel_where_it_serves():
    """By default on a TPU; where adapters keep the forward kernel from serving, the twin does both."""
    packed, _ = weights("fp4")
    x, routing = rows(37)
    ids = jnp.asarray(ROUTINGS["mixed"])

    def layer(x, routing, **options):
        return expert_mlp(x, ids, routing, *packed, limit=LIMIT, **options)

    interpreted = functools.partial(layer, implementation="tpu_interpret")
    assert gradient_kernels(interpreted, x, routing) == ["expert_mlp_gradient_fp4"]
    assert gradient_kernels(layer, x, routing) == []
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        assert gradient_kernels(layer, x, routing) == ["expert_mlp_gradient_fp4"]
        assert gradient_kernels(functools.partial(layer, adapters=some_adapters()), x, routing) == []
        assert gradient_kernels(layer, x.astype(jnp.float32), routing) == []

    def loss(function, x, routing):
        return jnp.sum(function(x, ids, routing, *packed, limit=LIMIT) * cotangent(x))

    found = jax.jit(
        jax.grad(functools.partial(loss, functools.partial(expert_mlp, implementation="tpu_interpret")), (0, 1))
    )
    for ours, theirs in zip(
        found(x, routing),
        expert_mlp_gradient(cotangent(x), x, ids, routing, *packed, limit=LIMIT, implementation="tpu_interpret"),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


def test_on_a_mesh_every_device_differentiates_by_the_kernel():
    """Where axes are manual; where the partitioner may have split what it cannot see into, the twin does."""
    packed, _ = weights("fp4")
    x, routing = rows(40)
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("device",), abstract_device=device)

    def layer(x, ids, routing):
        return expert_mlp(x, ids, routing, *packed, limit=LIMIT)

    split = PartitionSpec("device")
    local = jax.shard_map(layer, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    arguments = (x, jnp.asarray(ROUTINGS["mixed"]), routing)
    with use_abstract_mesh(mesh):
        assert gradient_kernels(local, *arguments) == ["expert_mlp_gradient_fp4"]
        assert gradient_kernels(layer, *arguments) == []


def test_the_decoders_order_is_undone_exactly():
    x = np.random.default_rng(38).normal(size=(8, 512)).astype(np.float32)
    dealt = x.reshape(8, 2, 128, 2).swapaxes(2, 3).reshape(8, 512)

    def kernel(dealt, out):
        out[...] = tpu_decode.join_even_odd(dealt[...])

    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    found = pl.pallas_call(kernel, out_shape=out, interpret=pltpu.InterpretParams())(dealt)
    np.testing.assert_array_equal(found, x)


def test_costs_are_hand_sums():
    case = next(c for c in operation.gradient_cases() if c.name == "flash/fp4/train/4096/16-experts")
    assert case.cost.operations == {"bfloat16": 5 * 2 * 4096 * 6 * 4096 * 2048}
    layers = case.arguments["w1"].shape[0]
    packed = sum(math.prod(a.shape) * a.dtype.itemsize // layers for n, a in case.traced().items() if n.startswith("w"))
    others = sum(
        math.prod(case.arguments[n].shape) * case.arguments[n].dtype.itemsize
        for n in ("x", "gradient", "expert_ids", "expert_weights")
    )
    assert case.cost.bytes_read == packed + others
    assert case.cost.bytes_written == 4 * 4096 * (4096 + 6)
    # Rows of one choice, with each of 16 experts in two blocks: twice the weights; words are written and read beside
    # what has to be, and the sums cleared.
    sizes = {"kind": "fp4", "tokens": 16384, "choices": 1, "hidden": 4096, "width": 2048, "experts": 16}
    rows_moved = 16384 * 4096 * (2 + 4 + 4 + 4 + 4 + 4)
    moved = cost.kernel_gradient_bytes(**sizes, blocks=32)
    assert moved == 32 * cost.expert_bytes("fp4", 4096, 2048) + rows_moved + 20 * 16384
    # On no chip does the kernel's traffic take longer than its products.
    assert moved / 0.819e12 < 10 * 16384 * 4096 * 2048 / 197e12


def test_repeats_of_an_expert_share_its_gradient():
    packed, values = weights("bf16")
    x, routing = rows(39)
    ids = [[2, 0, 2], [1, 1, 1], [-1, 3, 3], [9, 9, 2], [0, 1, 2], [4, -1, 0]]
    gradient = cotangent(x)
    found = run("tpu_interpret", gradient, x, ids, routing, packed)
    check(found, gradient, x, ids, routing, values)
    assert found[1][1, 0] == found[1][1, 1] == found[1][1, 2] != 0
