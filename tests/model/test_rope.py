"""Rotary embedding against the closed form, at the released sizes and up to a million tokens."""

import math

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deepseek_v4.config import YarnScaling
from deepseek_v4.layer_spec import RopeSpec
from deepseek_v4.rope import apply_rope, rope_frequencies

MAIN = RopeSpec(10000.0, 64, None)
COMPRESSED = RopeSpec(160000.0, 64, YarnScaling(16.0, 32.0, 1.0, 65536))
POSITIONS = np.array([0, 1, 2, 127, 128, 4_095, 4_096, 65_535, 65_536, 524_288, 1_048_575])


def closed_form(spec: RopeSpec) -> np.ndarray:
    """The frequencies in float64, one dim at a time."""
    out = []
    for i in range(spec.dims // 2):
        frequency = spec.theta ** (-2 * i / spec.dims)
        if spec.yarn is not None:
            y = spec.yarn
            fast, slow = (
                spec.dims
                * math.log(y.original_max_position_embeddings / (r * 2 * math.pi))
                / (2 * math.log(spec.theta))
                for r in (y.beta_fast, y.beta_slow)
            )
            low, high = max(math.floor(fast), 0), min(math.ceil(slow), spec.dims - 1)
            smooth = 1 - min(max((i - low) / (high - low), 0), 1)
            frequency = frequency / y.factor * (1 - smooth) + frequency * smooth
        out.append(frequency)
    return np.array(out)


@pytest.mark.parametrize("spec", [MAIN, COMPRESSED], ids=["main", "compressed"])
def test_frequencies_equal_the_closed_form(spec: RopeSpec) -> None:
    found = rope_frequencies(spec)
    assert found.dtype == np.float32
    # A few float32 roundings, each of half a unit in the last place (6e-8).
    np.testing.assert_allclose(found, closed_form(spec), rtol=2.5e-7)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones() -> None:
    plain = rope_frequencies(RopeSpec(160000.0, 64, None))
    yarn = rope_frequencies(COMPRESSED)
    ratio = plain / yarn
    # Correction dims of 32 and 1 rotations: floor(15.45) and ceil(24.7) out of 32 pairs.
    np.testing.assert_allclose(ratio[:16], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[25:], 16, rtol=1e-6)
    assert (np.diff(ratio[15:26]) > 0).all()


def test_forgetting_yarn_shows_only_late() -> None:
    """Why positions past 4K must be tested: the phase a missing YaRN adds, as bug reports measured it."""
    error = np.abs(rope_frequencies(RopeSpec(160000.0, 64, None)).astype(float) - rope_frequencies(COMPRESSED)).max()
    np.testing.assert_allclose([error * 512, error * 4096, error * 65536], [0.17, 1.4, 22], rtol=0.05)


@pytest.mark.parametrize("spec", [MAIN, COMPRESSED], ids=["main", "compressed"])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_equals_complex_multiplication_up_to_a_million(spec: RopeSpec, inverse: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(POSITIONS), 3, 96)).astype(np.float32)
    found = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(POSITIONS)[:, None], spec, inverse=inverse))
    # Angles are float32 by definition (pitfall: position * frequency in lower precision); everything else float64.
    angles = (POSITIONS.astype(np.float32)[:, None, None] * rope_frequencies(spec)).astype(np.float64)
    pairs = x[..., 32:].astype(np.float64).reshape(*x.shape[:2], 32, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp((-1j if inverse else 1j) * angles)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:2], 64)
    np.testing.assert_array_equal(found[..., :32], x[..., :32])
    # Sine, cosine, two products and a sum in float32, for values up to 4.
    np.testing.assert_allclose(found[..., 32:], expected, rtol=0, atol=2e-6)


def test_bfloat16_vectors_are_rotated_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(len(POSITIONS), 64)), jnp.bfloat16)
    found = apply_rope(x, jnp.asarray(POSITIONS), COMPRESSED)
    expected = apply_rope(x.astype(jnp.float32), jnp.asarray(POSITIONS), COMPRESSED)
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.bfloat16).astype(jnp.float32))


def test_inverse_undoes_the_rotation_and_angles_are_relative() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, 64)).astype(np.float32)

    def turned(x, position):
        return np.asarray(apply_rope(jnp.asarray(x), jnp.int32(position), COMPRESSED)).astype(np.float64)

    back = apply_rope(jnp.asarray(turned(q, 5000), jnp.float32), jnp.int32(5000), COMPRESSED, inverse=True)
    np.testing.assert_allclose(back, q, atol=1e-5)
    # Angles of 8192 rad are rounded to 5e-4.
    np.testing.assert_allclose(turned(q, 8192) @ turned(k, 8000), turned(q, 192) @ turned(k, 0), atol=5e-2)
    np.testing.assert_allclose(turned(q, 200) @ turned(k, 100), turned(q, 100) @ turned(k, 0), atol=1e-3)


def test_oracle_and_model_have_the_same_frequencies() -> None:
    config = {
        "qk_rope_head_dim": 64,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 65536,
        },
    }
    for spec, compressed in ((MAIN, False), (COMPRESSED, True)):
        np.testing.assert_array_equal(rope_frequencies(spec), oracle.frequencies(config, compressed))
