"""Index keys as the TPU kernel of ``index_topk`` reads them: numbers by rows, or FP4 by columns, decoded by chunks."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import FP4_BLOCK
from deepseek_v4.stored_rows import COLUMN_TILE, KeyColumns, layer_of
from pallas_kernels.index_topk.tpu_search import CHUNK
from pallas_kernels.tpu_decode import e8m0_after_e5m2, nibbles_to_e5m2

ROW_TILE = 16


def readable(keys: jax.Array | KeyColumns, layer: jax.Array | int, dtype: jnp.dtype) -> tuple[tuple, jax.Array | int]:
    """(arrays that the kernel can read where they lie, the layer to read of them).

    A cache is kept in whole tiles of the type that queries have, or in columns; keys that were made for one call alone
    are filled up.
    """
    if isinstance(keys, KeyColumns):
        return tuple(keys), layer
    if keys.dtype == dtype and keys.shape[2] % ROW_TILE == 0:
        return (keys,), layer
    filled = layer_of(keys, layer)[None].astype(dtype)
    return (jnp.pad(filled, ((0, 0), (0, 0), (0, -keys.shape[2] % ROW_TILE), (0, 0))),), 0


def unaligned(keys: jax.Array | KeyColumns) -> str | None:
    """Why the kernel cannot read keys where they lie, if they are not such that they can be filled up; or None."""
    if isinstance(keys, KeyColumns) and keys.shape[2] % COLUMN_TILE:
        return f"{keys.shape[2]} columns of keys are not a multiple of {COLUMN_TILE}"
    return None


def chunk_buffers(keys: tuple[jax.Array, ...], slots: int) -> list:
    """Room for ``slots`` chunks of each array."""
    if len(keys) == 1:
        return [pltpu.VMEM((slots, CHUNK, keys[0].shape[3]), keys[0].dtype)]
    return [pltpu.VMEM((slots, part.shape[2], CHUNK), part.dtype) for part in keys]


def transfers(keys, stored, semaphore, layer, row, first, count: int, slot) -> list:
    """The transfers of keys first .. first + count - 1 of a row to slot ``slot`` of their buffers."""
    at = pl.ds(pl.multiple_of(first, CHUNK), count)
    if len(keys) == 1:
        return [pltpu.make_async_copy(keys[0].at[layer, row, at], stored[0].at[slot, pl.ds(0, count)], semaphore)]
    return [
        pltpu.make_async_copy(part.at[layer, row, :, at], buffer.at[slot, :, pl.ds(0, count)], semaphore)
        for part, buffer in zip(keys, stored, strict=True)
    ]


def chunk_of_keys(stored, slot) -> tuple[jax.Array, int]:
    """A chunk of keys as a matrix, and which of its axes is their channels."""
    if len(stored) == 1:
        return stored[0][slot], 1
    codes, scales = stored
    return fp4_columns(codes[slot], scales[slot]), 0


def fp4_columns(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Words of ``KeyColumns``, codes [d / 8, T] and scales [d / 128, T], to bfloat16 [d, T]; exact."""
    half = 4 * codes.shape[0]
    # A half may begin within a group.
    rows, parts = math.gcd(half, FP4_BLOCK), []
    for first, packed in zip((0, half), nibbles_to_e5m2(codes), strict=True):
        values = pltpu.bitcast(packed, jnp.float8_e5m2).astype(jnp.bfloat16)
        for channel in range(0, half, rows):
            group = (first + channel) // FP4_BLOCK
            byte = (scales[group // 4 : group // 4 + 1] >> (8 * (group % 4))) & 255
            scale = e8m0_after_e5m2(lax.bitcast_convert_type(byte, jnp.int32)).astype(jnp.bfloat16)
            parts.append(values[channel : channel + rows] * scale)
    return jnp.concatenate(parts, axis=0)
