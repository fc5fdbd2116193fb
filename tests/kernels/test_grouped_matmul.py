"""The expert MLP of every implementation against float64: edge cases, gradients, independence of the batch."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4 import formats
from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul import cost, expert_mlp, operation, tpu
from pallas_kernels.grouped_matmul import xla as grouped_xla
from pallas_kernels.grouped_matmul.blocks import merge_repeats, sort_into_blocks

IMPLEMENTATIONS = ("xla", "tpu_interpret", "gpu_interpret")
KINDS = ("fp4", "fp8", "bf16")
HIDDEN, WIDTH, EXPERTS, TOKENS, CHOICES, LIMIT = 512, 256, 4, 6, 3, 10.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

# Routings of six tokens: everything that a sort by expert can meet.
ROUTINGS = {
    "mixed": [[0, 2, 3], [2, 0, 1], [3, 2, 0], [1, 3, 2], [0, 1, 2], [2, 3, 1]],
    "empty experts": [[0, 2, 0], [2, 0, 2], [0, 2, 0], [2, 2, 2], [0, 0, 0], [2, 0, 2]],
    "one expert": [[3, -1, 9]] * 6,
    "other shards": [[-1, 4, 7], [100, -5, 4], [0, 4, -1], [4, 4, 4], [-3, 3, 5], [5, 6, 7]],
    "nothing here": [[-1, 4, 9]] * 6,
}


def stored(rng, kind: str, out: int, inputs: int, experts: int = EXPERTS):
    """Random bytes of a format, scales that vary over 2^5, and what they mean in float64 [E, out, inputs]."""
    if kind == "fp4":
        packed = rng.integers(0, 256, (experts, out, inputs // 2), dtype=np.uint8)
        scale = rng.integers(119, 124, (experts, out, inputs // 32), dtype=np.uint8)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(experts, out, inputs)
        value = E2M1[codes] * np.repeat(2.0 ** (scale.astype(int) - 127), 32, axis=-1)
        return (jnp.asarray(packed), jnp.asarray(scale.view(ml_dtypes.float8_e8m0fnu))), value
    if kind == "fp8":
        codes = np.clip(rng.normal(size=(experts, out, inputs)) * 100, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        scale = rng.integers(116, 121, (experts, out // 128, inputs // 128), dtype=np.uint8)
        spread = np.repeat(np.repeat(2.0 ** (scale.astype(int) - 127), 128, axis=1), 128, axis=2)
        value = codes.astype(np.float64) * spread
        return (jnp.asarray(codes), jnp.asarray(scale.view(ml_dtypes.float8_e8m0fnu))), value
    weight = (rng.normal(size=(experts, out, inputs)) * 0.3).astype(ml_dtypes.bfloat16)
    return (jnp.asarray(weight), None), weight.astype(np.float64)


@functools.cache
def weights(kind: str):
    """(w1, w2, w3) as stored and in float64."""
    rng = np.random.default_rng(0)
    shapes = ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    return tuple(zip(*(stored(rng, kind, *shape) for shape in shapes), strict=True))


def rows(seed: int, tokens: int = TOKENS, choices: int = CHOICES, size: float = 0.3):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(tokens, HIDDEN)) * size).astype(ml_dtypes.bfloat16)
    return jnp.asarray(x), jnp.asarray(rng.uniform(0.1, 1.0, (tokens, choices)), jnp.float32)


def oracle(x, ids, routing, values, limit: float = LIMIT):
    """float64 result, and the sum of magnitudes that a relative error of the hidden activations multiplies."""
    w1, w2, w3 = values
    out = np.zeros((x.shape[0], w2.shape[1]))
    magnitude = np.zeros_like(out)
    for t, row in enumerate(np.asarray(x, np.float64)):
        for expert, r in zip(np.asarray(ids)[t], np.asarray(routing, np.float64)[t], strict=True):
            if not 0 <= expert < w1.shape[0]:
                continue
            gate = np.minimum(w1[expert] @ row, limit)
            up = np.clip(w3[expert] @ row, -limit, limit)
            hidden = gate / (1 + np.exp(-gate)) * up * r
            out[t] += w2[expert] @ hidden
            magnitude[t] += np.abs(w2[expert]) @ np.abs(hidden)
    return out, magnitude


@functools.cache
def compiled(implementation: str, **static):
    return jax.jit(functools.partial(expert_mlp, implementation=implementation, limit=LIMIT, **static))


def run(implementation, x, ids, routing, packed, **static):
    out = compiled(implementation, **static)(x, jnp.asarray(ids, jnp.int32), routing, *packed)
    assert out.dtype == jnp.float32
    return np.asarray(out)


def check(out, x, ids, routing, values):
    expected, magnitude = oracle(x, ids, routing, values)
    assert np.isfinite(expected).all()
    assert np.isfinite(out).all()
    # Decoded weights are exact; the hidden activations are rounded to bfloat16 (2^-8 relative), and float32 sums of a
    # few hundred terms stay far below 2^-10.
    np.testing.assert_array_less(np.abs(out - expected), (2.0**-8 + 2.0**-10) * magnitude + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_routing_matches_float64(implementation, kind):
    packed, values = weights(kind)
    x, routing = rows(1)
    for name, ids in ROUTINGS.items():
        out = run(implementation, x, ids, routing, packed)
        check(out, x, ids, routing, values)
        if name == "nothing here":
            assert not out.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clamps_gate_from_above_and_up_from_both_sides(implementation):
    packed, values = weights("fp4")
    x, routing = rows(2, size=4.0)
    gate, up = (np.einsum("tk,emk->tem", np.asarray(x, np.float64), values[i]) for i in (0, 2))
    for beyond in (gate > LIMIT, gate < -LIMIT, up > LIMIT, up < -LIMIT):
        assert beyond.mean() > 0.05
    check(run(implementation, x, ROUTINGS["mixed"], routing, packed), x, ROUTINGS["mixed"], routing, values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token(implementation):
    packed, values = weights("fp4")
    x, routing = rows(3, tokens=1)
    check(run(implementation, x, [[2, 0, 3]], routing, packed), x, [[2, 0, 3]], routing, values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_calls_split_a_crowded_expert(implementation):
    # More rows than one block holds: all tokens but one on expert 1, and products of the prefill size.
    packed, values = weights("fp4")
    tokens = tpu.DEFAULT_TILES.rows + 40
    x, routing = rows(4, tokens=tokens, choices=1)
    ids = np.full((tokens, 1), 1)
    ids[7] = 3
    check(run(implementation, x, ids, routing, packed), x, ids, routing, values)


def test_two_cores_split_the_width():
    rng = np.random.default_rng(5)
    shapes = ((2 * WIDTH, HIDDEN), (HIDDEN, 2 * WIDTH), (2 * WIDTH, HIDDEN))
    packed, values = zip(*(stored(rng, "fp4", *shape) for shape in shapes), strict=True)
    x, routing = rows(5)
    out = tpu.expert_mlp(
        x,
        jnp.asarray(ROUTINGS["mixed"], jnp.int32),
        routing,
        *packed,
        limit=LIMIT,
        simulate_activations=False,
        layer=None,
        interpret=True,
        cores=2,
    )
    check(np.asarray(out), x, ROUTINGS["mixed"], routing, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_stacked_weights_is_that_layer(implementation, kind):
    packed, _ = weights(kind)
    other = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), packed)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), packed, other)
    x, routing = rows(6)
    ids = jnp.asarray(ROUTINGS["mixed"], jnp.int32)
    for layer, expected in enumerate((packed, other)):
        out = expert_mlp(x, ids, routing, *stacked, limit=LIMIT, layer=jnp.int32(layer), implementation=implementation)
        np.testing.assert_array_equal(out, run(implementation, x, ids, routing, expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_does_not_depend_on_its_batch(implementation):
    packed, _ = weights("fp4")
    x, routing = rows(7)
    ids = np.asarray(ROUTINGS["mixed"])
    out = run(implementation, x, ids, routing, packed)
    order = np.array([4, 2, 0, 5, 1, 3])
    permuted = run(implementation, x[order], ids[order], routing[order], packed)
    np.testing.assert_array_equal(permuted, out[order])
    # Token 1 beside others that hold nothing but NaN, go elsewhere, or crowd its experts.
    for others in (ids, np.full_like(ids, -1), np.broadcast_to(ids[1], ids.shape)):
        ids_beside = others.copy()
        ids_beside[1] = ids[1]
        beside = run(implementation, jnp.full_like(x, jnp.nan).at[1].set(x[1]), ids_beside, routing, packed)
        np.testing.assert_array_equal(beside[1], out[1])


def test_the_kernel_gives_a_token_the_same_bits_in_any_batch_size():
    # Forty tokens that all go to experts 1 and 2: three products per block, where one token alone needs one.
    packed, _ = weights("fp4")
    x, routing = rows(8, tokens=40)
    ids = np.tile([[2, 1, 9]], (40, 1))
    out = run("tpu_interpret", x, ids, routing, packed)
    for token in (3, 38):
        one = slice(token, token + 1)
        alone = run("tpu_interpret", x[one], ids[one], routing[one], packed)
        np.testing.assert_array_equal(alone[0], out[token])


GRADIENT_ROUTING = [[0, 2, 3], [2, 0, 2], [-1, 9, 0], [4, 4, 4], [3, 3, 3], [2, 3, 0]]


def gradients(function, x, routing, packed, adapters=None, ids=GRADIENT_ROUTING, simulate=False, layer=None):
    """Cotangents of (x, routing, plain matrices, adapters) for one random cotangent."""
    plain = packed[0][1] is None
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)

    def loss(x, routing, matrices, adapters):
        w = [(m, None) for m in matrices] if plain else packed
        given = {} if adapters is None else {"adapters": adapters}
        out = function(
            x, jnp.asarray(ids), routing, *w, limit=LIMIT, simulate_activations=simulate, layer=layer, **given
        )
        return jnp.sum(out * cotangent)

    matrices = [w for w, _ in packed] if plain else []
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=quick)(x, routing, matrices, adapters)


def compare(expected, found, tolerance):
    expected, found = jax.tree.leaves(expected), jax.tree.leaves(found)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert a.any()
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * np.abs(a).max())


def some_adapters(rank=3):
    """Adapters of the down and up projections; the gate has none."""
    rng = np.random.default_rng(10)

    def adapter(out, inputs):
        shapes = ((EXPERTS, rank, inputs), (EXPERTS, out, rank))
        return tuple(jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32) for shape in shapes)

    return (None, adapter(HIDDEN, WIDTH), adapter(WIDTH, HIDDEN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_twin(implementation, kind):
    packed, _ = weights(kind)
    x, routing = rows(9)
    expected = gradients(grouped_xla.expert_mlp, x, routing, packed)
    found = gradients(functools.partial(expert_mlp, implementation=implementation), x, routing, packed)
    # Both round cotangents of bfloat16 operands to bfloat16, in different orders of summation.
    compare(expected, found, 2e-2)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["fp4", "bf16"])
def test_gradients_in_float32_are_exact(kind, adapted):
    # Against plain differentiation of the twin, which shares the forward pass and nothing of the backward one: more
    # rows than a block holds, an expert that no token visits, repeated experts, those of other shards.
    packed, _ = weights(kind)
    packed = tuple((w.astype(jnp.float32), None) for w, _ in packed) if kind == "bf16" else packed
    x, routing = rows(17, tokens=700)
    x = x.astype(jnp.float32)
    ids = np.random.default_rng(17).choice([0, 2, 2, 3, 9, -1], (700, CHOICES))
    ids[:600, 0] = 2
    adapters = some_adapters() if adapted else None
    expected = gradients(grouped_xla.expert_mlp, x, routing, packed, adapters, ids)
    found = gradients(expert_mlp, x, routing, packed, adapters, ids)
    # float32 sums of 700 terms in another order.
    compare(expected, found, 1e-5)
    for total in jax.tree.leaves(found[2:]):
        assert not np.asarray(total)[1].any()
        assert np.asarray(total)[2].any()


def test_gradients_of_a_stack_reach_its_layer_alone():
    packed, _ = weights("bf16")
    x, routing = rows(18)
    stacked = tuple((jnp.stack([jnp.roll(w, 1, axis=0), w]), None) for w, _ in packed)
    expected = gradients(expert_mlp, x, routing, packed)
    found = gradients(expert_mlp, x, routing, stacked, layer=jnp.int32(1))
    for a, b in zip(expected[2], found[2], strict=True):
        np.testing.assert_array_equal(b[1], a)
        assert not b[0].any()


def test_rounded_activations_pass_gradients_straight_through():
    packed, _ = weights("fp4")
    x, routing = rows(19)
    expected = gradients(grouped_xla.expert_mlp, x, routing, packed, simulate=True)
    compare(expected, gradients(expert_mlp, x, routing, packed, simulate=True), 2e-2)


def equations(jaxpr):
    """Every equation of a traced function, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_packed_experts_are_decoded_one_at_a_time():
    packed, _ = weights("fp4")
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    x, routing = rows(21)

    def loss(x, routing, adapters):
        out = expert_mlp(
            x, jnp.zeros((TOKENS, CHOICES), int), routing, *stacked, limit=LIMIT, layer=0, adapters=adapters
        )
        return jnp.sum(out)

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, routing, some_adapters())
    shapes = [v.aval for e in equations(traced.jaxpr) for v in e.outvars if hasattr(v.aval, "shape")]
    one = WIDTH * HIDDEN
    decoded = [a for a in shapes if math.prod(a.shape) >= one and a.dtype != jnp.uint8]
    assert any(a.dtype == x.dtype for a in decoded)
    assert max(math.prod(a.shape) for a in decoded) == one


def test_a_remat_policy_keeps_the_products_of_experts():
    packed, _ = weights("bf16")
    x, routing = rows(22)

    def layer(x, policy=None):
        def run(x):
            out = expert_mlp(jnp.tanh(x), jnp.zeros((TOKENS, CHOICES), int), routing, *packed, limit=LIMIT)
            return x + jnp.sin(out).astype(x.dtype)

        return jnp.sum(run(x) if policy is None else jax.checkpoint(run, policy=policy)(x))

    def products(policy):
        traced = jax.make_jaxpr(jax.grad(functools.partial(layer, policy=policy)))(x)
        return sum(e.primitive.name == "dot_general" for e in equations(traced.jaxpr))

    keep = jax.checkpoint_policies.save_only_these_names("expert_gate", "expert_up", "expert_out")
    assert products(keep) == products(None) == 9
    assert products(jax.checkpoint_policies.nothing_saveable) == 12


def test_adapters_are_an_addition_to_the_matrices():
    packed, values = weights("fp4")
    x, routing = rows(20)
    adapters = some_adapters()
    ids = jnp.asarray(ROUTINGS["mixed"])
    out = expert_mlp(x, ids, routing, *packed, limit=LIMIT, adapters=adapters)
    added = [
        value if adapter is None else value + np.asarray(adapter[1], np.float64) @ np.asarray(adapter[0], np.float64)
        for value, adapter in zip(values, adapters, strict=True)
    ]
    expected, magnitude = oracle(x, ids, routing, added)
    # Besides the hidden activations, the adapters and their inner products are rounded to bfloat16.
    np.testing.assert_array_less(np.abs(np.asarray(out) - expected), 4 * 2.0**-8 * magnitude.max())
    without, _ = oracle(x, ids, routing, values)
    assert np.abs(expected - without).max() > 16 * 2.0**-8 * magnitude.max()
    with pytest.raises(ValueError, match="the kernel has no adapters"):
        expert_mlp(x, ids, routing, *packed, limit=LIMIT, adapters=adapters, implementation="tpu_interpret")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_simulated_activations(implementation):
    packed, values = weights("fp4")
    x, routing = rows(11)
    out = run(implementation, x, ROUTINGS["mixed"], routing, packed, simulate_activations=True)
    expected, magnitude = oracle(x, ROUTINGS["mixed"], routing, values)
    # E4M3 keeps three mantissa bits: at most 2^-4 relative, for values that are normal beside their block's largest.
    np.testing.assert_array_less(np.abs(out - expected), 2.0**-4 * magnitude)
    plain = run(implementation, x, ROUTINGS["mixed"], routing, packed)
    assert np.abs(out - plain).max() > 2.0**-8 * magnitude.max()


def test_the_kernel_rounds_activations_as_the_format_does():
    rng = np.random.default_rng(12)
    x = rng.normal(size=(64, 256)) * 2.0 ** rng.integers(-30, 30, (64, 1))
    x[0], x[1, :128] = 0, 448 * 2.0**-3
    x[2, 0], x[3, 0], x[4] = 448, 448 * (1 + 2.0**-7), 1e-6
    x = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(tpu.simulate_fp8(x), np.float32), np.asarray(formats.simulate_fp8(x, 128), np.float32)
    )


@pytest.mark.parametrize("groups", [8, 128])
def test_every_fp4_byte_decodes_exactly(groups):
    # All 256 bytes times all scales that bfloat16 can hold beside them; both orders in which scales lie in memory.
    inputs = groups * 32
    rng = np.random.default_rng(13)
    packed = rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (inputs // 2, 1)), axis=1).T
    scale = rng.integers(2, 241, (256, groups), dtype=np.uint8)
    exchanged = groups % 128 != 0

    def kernel(packed, scale, out, words):
        tpu_decode.fp4_scale_words(scale, words, exchanged)
        tpu_decode.decode_fp4(packed, words, 0, out)

    words = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((128, inputs), jnp.uint32),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.uint32)],
        interpret=pltpu.InterpretParams(),
    )(packed, (scale.T if exchanged else scale).view(ml_dtypes.float8_e8m0fnu))
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(256, inputs)
    value = E2M1[codes] * np.repeat(2.0 ** (scale.astype(int) - 127), 32, axis=-1)
    chunks = value.reshape(256, -1, 128, 2).swapaxes(2, 3).reshape(256, inputs)
    np.testing.assert_array_equal(_unpair(words), chunks)


@pytest.mark.parametrize("native", [False, True])
def test_every_e4m3_code_decodes_exactly(native):
    rng = np.random.default_rng(14)
    finite = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    codes = rng.choice(finite, (256, 256)).astype(np.uint8)
    codes[:127, 0], codes[127:254, 128] = finite[:127], finite[127:]
    scale = np.array([[0.25, 1.0], [2.0**-20, 2.0**7]], np.float32)

    def kernel(codes, scale, out):
        tpu_decode.decode_fp8(codes, lambda i, j: scale[i, j], out, native=native)

    words = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_shape=jax.ShapeDtypeStruct((128, 256), jnp.uint32),
        interpret=pltpu.InterpretParams(),
    )(codes.view(ml_dtypes.float8_e4m3fn), scale)
    value = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(_unpair(words), value * np.repeat(np.repeat(scale, 128, 0), 128, 1))


def _unpair(words) -> np.ndarray:
    """uint32 [N/2, C] of bfloat16 row pairs to float64 [N, C]."""
    words = np.asarray(words)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=1).astype(np.uint16)
    return halves.reshape(-1, words.shape[1]).view(ml_dtypes.bfloat16).astype(np.float64)


def test_blocks_cover_every_assignment_once():
    rng = np.random.default_rng(15)
    for experts, tokens, choices, size in ((5, 40, 3, 16), (16, 1, 6, 16), (2, 100, 1, 16)):
        ids = jnp.asarray(rng.integers(-1, experts + 2, (tokens, choices)), jnp.int32)
        routing = jnp.asarray(rng.uniform(size=(tokens, choices)), jnp.float32)
        unique, merged = merge_repeats(ids, routing, experts)
        blocks = jax.tree.map(np.asarray, sort_into_blocks(unique, merged, experts=experts, rows=size))
        totals = np.zeros((tokens, experts))
        for b in range(int(blocks.used)):
            assert 0 < blocks.size[b] <= size
            for position in range(int(blocks.first[b]), int(blocks.first[b] + blocks.size[b])):
                totals[int(blocks.assignment[position]) // choices, int(blocks.expert[b])] += blocks.routing[position]
        assert not np.asarray(blocks.size)[int(blocks.used) :].any()
        expected = np.zeros((tokens, experts + 1))
        for t in range(tokens):
            for i, r in zip(np.asarray(ids)[t], np.asarray(routing)[t], strict=True):
                expected[t, i if 0 <= i < experts else experts] += r
        np.testing.assert_allclose(totals, expected[:, :-1], rtol=1e-6)


def test_refuses_what_it_does_not_serve():
    packed, _ = weights("fp4")
    x, routing = rows(16)
    with pytest.raises(ValueError, match="float32"):
        expert_mlp(
            x.astype(jnp.float32),
            jnp.zeros((TOKENS, CHOICES), jnp.int32),
            routing,
            *packed,
            limit=LIMIT,
            implementation="tpu_interpret",
        )


def test_costs_of_the_released_models():
    # One Flash expert: 3 * 4096 * 2048 weights of 4 bits, one scale byte per 32.
    assert cost.expert_bytes("fp4", 4096, 2048) == 3 * 4096 * 2048 * 17 // 32
    one = cost.expert_mlp_cost(kind="fp4", tokens=1, choices=6, hidden=4096, width=2048, experts=256)
    assert one.bytes_read == 6 * cost.expert_bytes("fp4", 4096, 2048) + 2 * 4096 + 6 * 8
    assert one.bytes_written == 4 * 4096
    assert one.operations == {"bfloat16": 2 * 6 * 3 * 4096 * 2048}
    # The bytes of a case are those of its arguments when every expert is touched.
    case = next(c for c in operation.cases() if c.name == "flash/fp4/decode/64")
    layers = case.arguments["w1"].shape[0]
    weights_of_a_layer = sum(
        math.prod(a.shape) * a.dtype.itemsize // layers for n, a in case.traced().items() if n.startswith("w")
    )
    others = sum(
        math.prod(case.arguments[n].shape) * case.arguments[n].dtype.itemsize
        for n in ("x", "expert_ids", "expert_weights")
    )
    assert case.cost.bytes_read == weights_of_a_layer + others
    # In decode the kernel moves less than a tenth more than the minimum, whatever the batch.
    for tokens in (1, 64, 256):
        shape = {"kind": "fp4", "tokens": tokens, "choices": 6, "hidden": 4096, "width": 2048, "experts": 256}
        assert cost.kernel_bytes(**shape) < 1.1 * cost.expert_mlp_cost(**shape).bytes_moved
