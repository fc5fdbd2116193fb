"""Rotary position embedding on the last dims of a vector: interleaved pairs, YaRN, any int32 position."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.layer_spec import RopeSpec


def rope_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angular frequencies [dims/2] float32, radians per token (architecture section 2).

    Every step is rounded to float32, like the released model: at position 2^20 one unit in the last place of a
    frequency is already a phase of hundredths of a radian, so the rounding is part of the model.
    """
    dims = spec.dims
    # The power goes through float64 because libraries differ in the last place of a float32 one.
    powers = np.power(np.float64(spec.theta), np.arange(0, dims, 2) / dims).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    if spec.yarn is None:
        return frequencies
    low, high = (
        dims
        * math.log(spec.yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
        / (2 * math.log(spec.theta))
        for rotations in (spec.yarn.beta_fast, spec.yarn.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dims - 1)
    span = high - low if high != low else 1e-3
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    smooth = np.float32(1) - ramp
    return frequencies / np.float32(spec.yarn.factor) * (np.float32(1) - smooth) + frequencies * smooth


def rope_angles(positions: jax.Array, spec: RopeSpec) -> jax.Array:
    """Radians float32 [..., dims/2] by which the pairs at ``positions`` (int32 [...]) are turned."""
    return positions[..., None].astype(jnp.float32) * rope_frequencies(spec)


def apply_rope(x: jax.Array, positions: jax.Array, spec: RopeSpec, *, inverse: bool = False) -> jax.Array:
    """Rotates the last ``spec.dims`` of x [..., c] by ``positions`` (int32, broadcastable to x.shape[:-1]).

    Pairs (2i, 2i+1) of the rotated part are complex numbers multiplied by exp(+-i * position * frequency_i);
    ``inverse`` takes the conjugate. Angles, sines and products are float32 whatever the dtype of x.
    """
    angles = rope_angles(positions, spec)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if inverse:
        sin = -sin
    content, rotated = x[..., : -spec.dims], x[..., -spec.dims :].astype(jnp.float32)
    pairs = rotated.reshape(*rotated.shape[:-1], spec.dims // 2, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return jnp.concatenate([content, turned.reshape(rotated.shape).astype(x.dtype)], axis=-1)
