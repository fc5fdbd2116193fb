"""Number formats against the published code tables, ml_dtypes, and closed forms."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4 import formats

TABLES = json.loads((Path(__file__).parents[1] / "data" / "number_tables.json").read_text())
BYTES = np.arange(256, dtype=np.uint8)


def table(name: str) -> np.ndarray:
    return np.array([float("nan") if v is None or isinstance(v, str) else v for v in TABLES[name]])


def test_every_e2m1_code() -> None:
    found = np.asarray(formats.e2m1_to_float(jnp.arange(16, dtype=jnp.uint8)))
    np.testing.assert_array_equal(found, table("e2m1"))
    np.testing.assert_array_equal(np.signbit(found), np.arange(16) >= 8)


def test_every_e4m3_code() -> None:
    codes = jnp.asarray(BYTES.view(ml_dtypes.float8_e4m3fn)).reshape(1, 256)
    found = formats.dequantize_fp8(codes, jnp.ones((1, 2), jnp.float32))
    np.testing.assert_array_equal(found[0], table("e4m3fn"))


def test_every_e8m0_code() -> None:
    # Taken apart in NumPy: 2^-127 is a subnormal that arithmetic on some backends flushes to zero.
    for scale in (jnp.asarray(BYTES), jnp.asarray(BYTES.view(ml_dtypes.float8_e8m0fnu))):
        found = np.asarray(formats.decode_e8m0(scale))
        np.testing.assert_array_equal(found.astype(np.float64), table("e8m0fnu"))
    powers = jnp.asarray(2.0 ** np.arange(-126, 128), jnp.float32)
    np.testing.assert_array_equal(np.asarray(formats.encode_e8m0(powers)).view(np.uint8), np.arange(1, 255))


def test_low_nibble_is_the_even_index() -> None:
    packed = jnp.asarray([[0x21, 0x43], [0xF0, 0x0F]], jnp.uint8)
    np.testing.assert_array_equal(formats.unpack_e2m1(packed), [[1, 2, 3, 4], [0, 15, 15, 0]])
    every = jnp.asarray(BYTES)[None]
    np.testing.assert_array_equal(formats.pack_e2m1(formats.unpack_e2m1(every)), every)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e8m0fnu, jnp.uint8, jnp.bfloat16, jnp.int32])
def test_bytes_come_back_as_what_they_were(dtype):
    every = jnp.arange(256, dtype=jnp.uint8)
    array = jax.lax.bitcast_convert_type(every, dtype) if jnp.dtype(dtype).itemsize == 1 else every.astype(dtype)
    for there in (formats.as_bytes, formats.sliceable):
        moved = there(array)
        assert moved.dtype == (jnp.uint8 if array.dtype.itemsize == 1 else dtype)
        back = formats.from_bytes(moved, dtype)
        assert back.dtype == dtype
        assert np.asarray(back).tobytes() == np.asarray(array).tobytes()


def test_fp4_weights_have_one_scale_per_row_and_32_inputs() -> None:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (3, 5, 48), dtype=np.uint8)
    scale = rng.integers(110, 140, (3, 5, 3), dtype=np.uint8)
    found = formats.dequantize(jnp.asarray(packed), jnp.asarray(scale.view(ml_dtypes.float8_e8m0fnu)))
    for e in range(3):
        for n in range(5):
            for k in range(96):
                code = packed[e, n, k // 2] >> 4 if k % 2 else packed[e, n, k // 2] & 15
                assert found[e, n, k] == TABLES["e2m1"][code] * 2.0 ** (int(scale[e, n, k // 32]) - 127)


@pytest.mark.parametrize("scale_dtype", [ml_dtypes.float8_e8m0fnu, np.float32])
def test_fp8_weights_have_one_scale_per_128_by_128(scale_dtype) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (300, 260), dtype=np.uint8)  # no NaN code
    exponents = rng.integers(110, 140, (3, 3), dtype=np.uint8)
    scale = exponents.view(scale_dtype) if scale_dtype != np.float32 else rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    values = 2.0 ** (exponents.astype(float) - 127) if scale_dtype != np.float32 else scale
    found = formats.dequantize(jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale))
    expected = np.float32(table("e4m3fn")[codes]) * np.float32(np.kron(values, np.ones((128, 128)))[:300, :260])
    np.testing.assert_array_equal(found, expected)


def test_dequantised_release_weights_are_exact_in_bfloat16() -> None:
    rng = np.random.default_rng(2)
    packed = jnp.asarray(rng.integers(0, 256, (4, 32), dtype=np.uint8))
    scale = jnp.asarray(rng.integers(100, 150, (4, 2), dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu))
    np.testing.assert_array_equal(
        formats.dequantize(packed, scale, jnp.bfloat16).astype(jnp.float32), formats.dequantize(packed, scale)
    )
    codes = jnp.asarray(np.r_[0:127, 128:255].astype(np.uint8).view(ml_dtypes.float8_e4m3fn))[None]
    scale = jnp.asarray(np.array([[100, 140]], np.uint8).view(ml_dtypes.float8_e8m0fnu))
    np.testing.assert_array_equal(
        formats.dequantize(codes, scale, jnp.bfloat16).astype(jnp.float32), formats.dequantize(codes, scale)
    )


def interesting(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every value, every midpoint between neighbours, their nearest float32 neighbours, values beyond the largest."""
    values = values.astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, middles, values[-1:] * 1.01, values[-1:] * 4, rng.uniform(0, values[-1], 1000)])
    points = points.astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return np.concatenate([points, -points])


def test_rounding_to_e2m1_is_to_nearest_even() -> None:
    x = interesting(oracle.E2M1, np.random.default_rng(0))
    found = np.asarray(formats.e2m1_to_float(formats.float_to_e2m1(jnp.asarray(x))))
    np.testing.assert_array_equal(found, oracle.round_to(oracle.E2M1, x.astype(np.float64)))
    inside = np.abs(x) <= 6
    expected = x[inside].astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(found[inside], expected)


def test_rounding_to_e4m3_is_to_nearest_even() -> None:
    x = interesting(oracle.E4M3, np.random.default_rng(0))
    found = np.asarray(formats.round_e4m3(jnp.asarray(x))).astype(np.float32)
    np.testing.assert_array_equal(found, oracle.round_to(oracle.E4M3, x.astype(np.float64)))
    inside = np.abs(x) <= 448
    np.testing.assert_array_equal(found[inside], x[inside].astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    amax=st.floats(2.0**-100, 2.0**100, width=32),
    maximum=st.sampled_from([formats.E2M1_MAX, formats.E4M3_MAX]),
)
def test_scales_are_rounded_up_to_powers_of_two(amax: float, maximum: float) -> None:
    scale = float(formats.power_of_two_scale(jnp.float32(amax), maximum))
    mantissa, _ = np.frexp(scale)
    assert mantissa == 0.5
    ratio = float(np.float32(amax) / np.float32(maximum))
    assert ratio <= scale < 2 * ratio


def test_exact_powers_of_two_are_their_own_scale() -> None:
    powers = 2.0 ** np.arange(-60, 60)
    np.testing.assert_array_equal(formats.power_of_two_scale(jnp.asarray(powers * 448, jnp.float32), 448.0), powers)
    np.testing.assert_array_equal(formats.power_of_two_scale(jnp.asarray(powers * 6, jnp.float32), 6.0), powers)


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of very different size, zeros, and outliers."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-30, 30, (*shape[:-1], 1))
    x[..., ::7] *= 100
    x[0] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("width", [128, 192, 320, 48])
def test_simulated_activations_equal_the_closed_form(width: int) -> None:
    x = spread(np.random.default_rng(width), (40, width))
    found = formats.simulate_fp8(jnp.asarray(x), formats.ACTIVATION_BLOCK)
    np.testing.assert_array_equal(found, oracle.round_activation(x.astype(np.float64)))


def test_simulated_kv_leaves_the_rope_dims_alone() -> None:
    x = spread(np.random.default_rng(0), (50, 512))
    found = np.asarray(formats.simulate_kv(jnp.asarray(x), 64))
    np.testing.assert_array_equal(found[:, 448:], x[:, 448:])
    expected = oracle.round_blocks(x[:, :448].astype(np.float64), 64, oracle.E4M3, 1e-4)
    np.testing.assert_array_equal(found[:, :448], expected)
    assert (found[:, :448] != x[:, :448]).mean() > 0.9


def test_simulated_fp4_equals_the_closed_form() -> None:
    x = spread(np.random.default_rng(0), (50, 128))
    found = formats.simulate_fp4(jnp.asarray(x))
    np.testing.assert_array_equal(found, oracle.round_blocks(x.astype(np.float64), 32, oracle.E2M1, 6 * 2.0**-126))


@pytest.mark.parametrize("size", [2, 32, 128])
def test_hadamard_transform_is_the_natural_order_matrix(size: int) -> None:
    matrix = oracle.hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    found = formats.hadamard_transform(jnp.eye(size))
    np.testing.assert_allclose(found, matrix, rtol=1e-6)
    x = np.random.default_rng(0).normal(size=(3, 2, size)).astype(np.float32)
    np.testing.assert_allclose(formats.hadamard_transform(jnp.asarray(x)), x @ matrix, atol=1e-5)


def test_quantised_weights_come_back_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(200, 160)).astype(np.float32)
    for quantize, step in ((formats.quantize_fp4_weight, 1 / 4), (formats.quantize_fp8_weight, 1 / 16)):
        codes, scale = quantize(jnp.asarray(weight))
        found = np.asarray(formats.dequantize(codes, scale))
        largest = np.abs(weight).max()
        # Relative to the value for normal numbers; near zero the absolute step of the block's smallest normal.
        assert (np.abs(found - weight) <= np.maximum(np.abs(weight) * step, largest * step / 2)).all()
        again = quantize(jnp.asarray(found))
        np.testing.assert_array_equal(formats.dequantize(*again), found)
