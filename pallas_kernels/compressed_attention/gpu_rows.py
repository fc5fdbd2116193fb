"""How the GPU kernel of ``compressed_attention`` reads rows of keys, in each form in which a cache may keep them.

A row comes in tiles of channels. Plain rows have two, its halves, as a uint32 of ``deepseek_v4.formats.pack_words``
holds one channel of each. Rows in the released bytes (``deepseek_v4.stored_rows.KVRows``) have as many as it takes to
make powers of two of their codes, and the RoPE dims apart: 256, 128, 64 and 64 channels of 512. Codes are decoded in
registers, exactly, to the bfloat16 numbers that plain rows hold.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.formats import KV_BLOCK
from deepseek_v4.stored_rows import KVRows
from pallas_kernels.gpu_decode import WORD, as_words, e4m3_scaled_tile

LEAST_PRODUCT = 16
"""Rows and columns of the smallest product that Triton gives to tensor cores."""

_MOST_CODES = WORD * KV_BLOCK
"""Codes of a tile, which all find their scales in one word."""


class ReleasedWords(NamedTuple):
    """``KVRows`` as a kernel addresses them: uint32 words of E4M3 codes [..., (c - r)/4], bfloat16 RoPE dims [..., r]
    and uint32 words of E8M0 scales."""

    code_words: Any
    rope: Any
    scale_words: Any


def addressable(rows: Any) -> Any:
    """Rows as the kernel reads them; nothing is moved."""
    if isinstance(rows, KVRows):
        return ReleasedWords(as_words(rows.codes), rows.rope, as_words(rows.scales))
    return rows


def unserved_released(q: Any, rows: KVRows, *, compiled: bool) -> str | None:
    """Why rows in the released bytes cannot be read for queries [B, S, H, c], or None; see ``gpu.unserved``."""
    codes, rope, scales = (part.shape[-1] for part in rows)
    if q.dtype != jnp.bfloat16:
        return f"rows in the released bytes with {q.dtype} queries"
    if codes % WORD or scales % WORD:
        return f"released rows of {codes} codes and {scales} scales, not whole words"
    if compiled and (codes % LEAST_PRODUCT or rope % LEAST_PRODUCT):
        return f"released rows of {codes} codes and {rope} RoPE dims, not multiples of {LEAST_PRODUCT}"
    if rows.shape[2] == 0:
        return "a cache without rows"
    return None


def tiles_of(width: int, stores: Iterable[Any]) -> tuple[slice, ...]:
    """The channels of every tile of rows of ``width`` that lie in ``stores``, as ``addressable`` makes them."""
    for rows in stores:
        if isinstance(rows, ReleasedWords):
            content = WORD * rows.code_words.shape[-1]
            return (*_powers_of_two(0, content), *_powers_of_two(content, width))
    return (slice(0, width // 2), slice(width // 2, width))


def _powers_of_two(first: int, stop: int) -> Iterator[slice]:
    """Falling powers of two of channels, at most ``_MOST_CODES`` each."""
    while first < stop:
        size = min(_MOST_CODES, 1 << (stop - first).bit_length() - 1)
        yield slice(first, first + size)
        first += size


def load_tiles(rows: Any, where: tuple, row: jax.Array, wanted: jax.Array, tiles: tuple[slice, ...]) -> list[jax.Array]:
    """``tiles`` [K, channels] of rows ``row`` [K] at ``where`` of refs as ``addressable`` makes them.

    Rows that are not ``wanted`` [K] are zero and no other row is touched, so that what lies there never matters.
    """
    row = jnp.where(wanted, row, 0)
    if isinstance(rows, ReleasedWords):
        content = WORD * rows.code_words.shape[-1]
        return [
            _codes(rows, where, row, wanted, tile)
            if tile.start < content
            else _numbers(rows.rope, where, row, wanted, slice(tile.start - content, tile.stop - content))
            for tile in tiles
        ]
    if rows.dtype != jnp.uint32:
        return [_numbers(rows, where, row, wanted, tile) for tile in tiles]
    words = _numbers(rows, where, row, wanted, tiles[0])
    parts = (words << 16, words & jnp.uint32(0xFFFF0000))
    # Each float32 holds a bfloat16 and sixteen zeros: the cast rounds nothing.
    return [lax.bitcast_convert_type(part, jnp.float32).astype(jnp.bfloat16) for part in parts]


def _numbers(rows: Any, where: tuple, row: jax.Array, wanted: jax.Array, columns: slice) -> jax.Array:
    """Columns of rows [K], whatever their type; zero where not wanted."""
    shape = (row.shape[0], columns.stop - columns.start)
    column = lax.broadcasted_iota(jnp.int32, shape, 1) + columns.start
    mask = jnp.broadcast_to(wanted[:, None], shape)
    at = (*where, jnp.broadcast_to(row[:, None], shape), column)
    return plgpu.load(rows.at[at], mask=mask, other=jnp.zeros((), rows.dtype))


def _codes(rows: ReleasedWords, where: tuple, row: jax.Array, wanted: jax.Array, tile: slice) -> jax.Array:
    """A tile of codes times their scales, bfloat16 [K, channels]."""
    columns = slice(tile.start // WORD, tile.stop // WORD)
    words = _numbers(rows.code_words, where, row, wanted, columns)
    at = (*where, row, tile.start // _MOST_CODES)
    scales = plgpu.load(rows.scale_words.at[at], mask=wanted, other=jnp.uint32(0))
    block = (lax.broadcasted_iota(jnp.int32, words.shape, 1) + columns.start) * WORD // KV_BLOCK
    byte = (scales[:, None] >> (block % WORD * 8).astype(jnp.uint32)) & jnp.uint32(255)
    return e4m3_scaled_tile(words, byte)
