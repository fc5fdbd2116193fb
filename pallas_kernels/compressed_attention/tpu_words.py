"""Entries as words of released bytes (``deepseek_v4.stored_rows.KVWords``) for the gathering TPU kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import KV_BLOCK, e8m0_to_float
from pallas_kernels.compressed_attention.tpu_common import LANES, Plan, iota
from pallas_kernels.tpu_decode import e4m3_of_words


def decode_block(plan: Plan, stored, slot, indices, rows: jax.Array, keys) -> None:
    """``keys_of_words`` of a block: words in ``slot`` of two refs [2, K, c/4], ``indices`` a ref [1, K], to a ref."""
    size = min(LANES, plan.block)

    def step(i, _):
        first = pl.multiple_of(i * size, size)
        at = pl.ds(first, size)
        words = [buffer[slot, at, :] for buffer in stored]
        keys[at, :] = keys_of_words(plan, *words, indices[:, at], rows - first)

    lax.fori_loop(0, plan.block // size, step, None)


def keys_of_words(plan: Plan, entries: jax.Array, shared: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """Entry words [K, c/4] and the rows [K, c/4] of RoPE dims that they share to keys [K, c]; exact, code times scale.

    ``indices`` [1, K] are the entries' numbers, by which they find their own RoPE dims. Keys from ``rows`` on become
    zero, whatever was there.
    """
    kept = iota(entries.shape[0], 0) < rows
    entries, shared = (jnp.where(kept, words, jnp.zeros_like(words)) for words in (entries, shared))
    size = entries.shape[1]
    planes = [e4m3_of_words(entries, j) * _scales(plan, entries, j) for j in range(4)]
    # RoPE dims are a row's last: they end the last plane.
    planes[3] = jnp.where(iota(size, 1) < size - plan.rope_dims, planes[3], _rope(plan, shared, indices))
    return jnp.concatenate(planes, axis=1).astype(jnp.bfloat16).astype(plan.dtype)


def _scales(plan: Plan, entries: jax.Array, plane: int) -> jax.Array:
    """The float32 scales [K, c/4] of a plane of codes; those of its last dims, which have none, are arbitrary."""
    size = entries.shape[1]
    content = 4 * size - plan.rope_dims
    first = min(plane * size // KV_BLOCK, (content - 1) // KV_BLOCK)
    found: jax.Array | None = None
    for group in range(first, -(-min((plane + 1) * size, content) // KV_BLOCK)):
        byte, lane = divmod(content + group, size)
        scale = e8m0_to_float((entries[:, lane : lane + 1] >> (8 * byte)) & 255)
        found = scale if found is None else jnp.where(iota(size, 1) < group * KV_BLOCK - plane * size, found, scale)
    assert found is not None
    return found


def _rope(plan: Plan, shared: jax.Array, indices: jax.Array) -> jax.Array:
    """The RoPE dims of ``indices`` [1, K] in the last lanes of [K, c/4], float32, of the rows they share."""
    size, dims = shared.shape[1], plan.rope_dims
    in_half = size // dims
    place = jnp.broadcast_to(lax.rem(jnp.maximum(indices, 0), 2 * in_half), (size, shared.shape[0])).T
    bits = jnp.where(place < in_half, shared << 16, shared & jnp.uint32(0xFFFF0000))
    place = lax.rem(place, in_half)
    found = bits
    for offset in range(in_half - 1):
        found = jnp.where(place == offset, pltpu.roll(bits, size - dims * (offset + 1), 1), found)
    return lax.bitcast_convert_type(found, jnp.float32)
