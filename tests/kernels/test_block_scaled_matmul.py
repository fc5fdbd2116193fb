"""Dense linears on E4M3 weights, every implementation against float64."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_v4.formats import ACTIVATION_BLOCK, simulate_fp8
from pallas_kernels.block_scaled_matmul import block_scaled_matmul, operation, tpu

IMPLEMENTATIONS = ("xla", "tpu_interpret")


def weight(rng, outputs: int, inputs: int, scales: str, layers: int | None = None):
    """(codes, scales) and their meaning in float64 [.., outputs, inputs]."""
    leading = () if layers is None else (layers,)
    codes = np.clip(rng.normal(size=(*leading, outputs, inputs)) * 100, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = 2.0 ** rng.integers(-12, -5, (*leading, outputs // 128, inputs // 128))
    if scales == "float32":
        scale = (scale * rng.uniform(1, 2, scale.shape)).astype(np.float32)
    value = codes.astype(np.float64) * np.repeat(np.repeat(scale.astype(np.float64), 128, -2), 128, -1)
    dtype = ml_dtypes.float8_e8m0fnu if scales == "e8m0" else np.float32
    return jnp.asarray(codes), jnp.asarray(scale.astype(dtype)), value


def activations(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def check(out, x, value, scales, equation="nk,mk->nm"):
    x = np.asarray(x, np.float64)
    magnitude = np.einsum(equation, np.abs(x), np.abs(value))
    expected = np.einsum(equation, x, value)
    # One rounding of the result to bfloat16 and, with float32 scales, one of every weight (2^-8 relative each);
    # float32 sums of a few hundred products stay far below 2^-14.
    bound = 2.0**-8 * np.abs(expected) + (2.0**-14 + (2.0**-8 if scales == "float32" else 0)) * magnitude
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - expected), bound + 1e-30)


@pytest.mark.parametrize("scales", ["e8m0", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_float64(implementation, scales):
    rng = np.random.default_rng(0)
    codes, scale, value = weight(rng, 384, 256, scales)
    function = jax.jit(functools.partial(block_scaled_matmul, implementation=implementation))
    for rows in (1, 20):
        x = activations(rng, rows, 256)
        out = function(x, codes, scale)
        assert out.dtype == jnp.bfloat16
        check(out, x, value, scales)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_dims(implementation):
    rng = np.random.default_rng(1)
    codes, scale, value = weight(rng, 128, 256, "e8m0")
    x = activations(rng, 2, 3, 256)
    out = block_scaled_matmul(x, codes, scale, implementation=implementation)
    check(out, x, value, "e8m0", "bsk,mk->bsm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_use_their_own_rows(implementation):
    rng = np.random.default_rng(2)
    codes, scale, value = weight(rng, 512, 128, "e8m0")
    x = activations(rng, 5, 2, 128)
    out = block_scaled_matmul(x, codes, scale, groups=2, implementation=implementation)
    check(out, x, value.reshape(2, 256, 128), "e8m0", "ngk,gmk->ngm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_beyond_one_tile(implementation, monkeypatch):
    # Several tiles of rows, the last of them partial, and several products per tile.
    monkeypatch.setattr(tpu, "DEFAULT_TILES", tpu.Tiles(rows=64, product=32))
    rng = np.random.default_rng(3)
    codes, scale, value = weight(rng, 256, 128, "e8m0")
    x = activations(rng, 150, 128)
    check(block_scaled_matmul(x, codes, scale, implementation=implementation), x, value, "e8m0")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_stacked_weights_is_that_layer(implementation):
    rng = np.random.default_rng(4)
    codes, scale, value = weight(rng, 256, 128, "e8m0", layers=3)
    x = activations(rng, 4, 128)
    for layer in (0, 2):
        out = block_scaled_matmul(x, codes, scale, layer=jnp.int32(layer), implementation=implementation)
        check(out, x, value[layer], "e8m0")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantised_activations_stay_exact(implementation):
    # E4M3 activations times E4M3 weights are exact in bfloat16 operands: only sums and the result round.
    rng = np.random.default_rng(5)
    codes, scale, value = weight(rng, 128, 256, "e8m0")
    x = simulate_fp8(activations(rng, 8, 256), ACTIVATION_BLOCK)
    check(block_scaled_matmul(x, codes, scale, implementation=implementation), x, value, "e8m0")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_the_others(implementation):
    rng = np.random.default_rng(6)
    codes, scale, _ = weight(rng, 256, 256, "e8m0")
    x = activations(rng, 20, 256)
    function = jax.jit(functools.partial(block_scaled_matmul, implementation=implementation))
    out = np.asarray(function(x, codes, scale))
    order = rng.permutation(20)
    np.testing.assert_array_equal(np.asarray(function(x[order], codes, scale)), out[order])
    beside = function(jnp.full_like(x, jnp.nan).at[7].set(x[7]), codes, scale)
    np.testing.assert_array_equal(np.asarray(beside)[7], out[7])


def test_the_kernel_gives_a_row_the_same_bits_in_any_batch_size():
    rng = np.random.default_rng(7)
    codes, scale, _ = weight(rng, 256, 256, "e8m0")
    x = activations(rng, 70, 256)
    results = [
        np.asarray(block_scaled_matmul(x[:n], codes, scale, implementation="tpu_interpret"))[0] for n in (1, 20, 70)
    ]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_reach_x_and_are_those_of_the_twin(groups):
    rng = np.random.default_rng(8)
    codes, scale, _ = weight(rng, 256, 128, "e8m0")
    x = activations(rng, *((6, 128) if groups == 1 else (6, groups, 128)))

    def loss(x, implementation):
        out = block_scaled_matmul(x, codes, scale, groups=groups, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    expected, found = (np.asarray(jax.grad(loss)(x, i), np.float64) for i in IMPLEMENTATIONS)
    assert expected.any()
    # The outputs, and with them the cotangents, differ by roundings to bfloat16.
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-2 * np.abs(expected).max())


def test_refuses_what_it_does_not_serve():
    x = jnp.zeros((4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="not quantised"):
        block_scaled_matmul(x, jnp.zeros((128, 128), jnp.bfloat16), None, implementation="tpu_interpret")
    codes, scale = jnp.zeros((192, 128), jnp.float8_e4m3fn), jnp.ones((2, 1), jnp.float32)
    with pytest.raises(ValueError, match="whole blocks"):
        block_scaled_matmul(x, codes, scale, implementation="tpu_interpret")


def test_costs_are_the_bytes_of_the_arguments():
    for case in operation.cases():
        weight, scale, x = (case.arguments[name] for name in ("weight", "scale", "x"))
        layer = (math.prod(weight.shape) + math.prod(scale.shape)) // weight.shape[0]
        rows = math.prod(x.shape) // (case.arguments["groups"] * weight.shape[-1])
        assert case.cost.bytes_read == layer + 2 * math.prod(x.shape)
        assert case.cost.bytes_written == 2 * rows * weight.shape[1]
        assert case.cost.operations["bfloat16"] == 2 * rows * math.prod(weight.shape[1:])
