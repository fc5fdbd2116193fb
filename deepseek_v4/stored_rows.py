"""The forms in which caches keep KV rows and index keys in the bytes of the release (architecture section 7).

A form is a tuple of arrays that knows how numbers become it (``pack``) and it becomes numbers (``unpack``). ``KVRows``
and ``KeyRows`` hold a row per position, as memory of CPUs and GPUs likes it. ``KVColumns`` and ``KeyColumns`` hold the
same bytes with positions along the last dim, which is how TPUs keep narrow rows without padding, and how their matrix
units want keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.formats import (
    FP4_BLOCK,
    KV_BLOCK,
    decode_e8m0,
    dequantize_fp4,
    e2m1_to_float,
    encode_e8m0,
    pack_e2m1,
    quantize_fp4_rows,
    quantize_fp8_rows,
)

COLUMN_TILE = 128
"""Positions of a tile: stores in columns hold a multiple of it."""


class KVRows(NamedTuple):
    """KV rows [..., c] as published: E4M3 codes [..., c - r], BF16 RoPE dims [..., r], E8M0 scale bytes per 64 codes.

    Scales are padded so that a row is a multiple of 8 bytes (584 at c = 512, r = 64).
    """

    codes: Any
    rope: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows they stand for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] + self.rope.shape[-1])

    def pack(self, rows: jax.Array) -> "KVRows":
        """``rows`` [..., c] in this form; exact for rows that went through ``simulate_kv``."""
        content, rope = jnp.split(rows, [self.codes.shape[-1]], axis=-1)
        codes, scales = quantize_fp8_rows(content, KV_BLOCK)
        padding = self.scales.shape[-1] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (rows.ndim - 1) + [(0, padding)], constant_values=1.0)
        return KVRows(codes, rope.astype(self.rope.dtype), encode_e8m0(scales))

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The rows [..., c] in ``dtype``, in which every code times its scale is exact."""
        width = self.codes.shape[-1]
        scales = jnp.repeat(decode_e8m0(self.scales), KV_BLOCK, axis=-1)[..., :width]
        content = (self.codes.astype(jnp.float32) * scales).astype(dtype)
        return jnp.concatenate([content, self.rope.astype(dtype)], axis=-1)


class KeyRows(NamedTuple):
    """Index keys [..., d] as published: E2M1 codes [..., d / 2], two per byte, and an E8M0 scale byte per 32."""

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys they stand for."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def pack(self, rows: jax.Array) -> "KeyRows":
        """``rows`` [..., d] in this form; exact for keys that went through ``simulate_fp4``."""
        codes, scale = quantize_fp4_rows(rows)
        return KeyRows(pack_e2m1(codes), encode_e8m0(scale))

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The keys [..., d] in ``dtype``, exactly."""
        return dequantize_fp4(self.codes, self.scales, jnp.dtype(dtype))


class KeyColumns(NamedTuple):
    """Index keys as published, a key per column: uint32 words of codes [..., d / 8, T] and of scales [..., d / 128, T].

    Byte j of a column of codes holds channel j low and channel j + d / 2 high, so that each half unpacks to whole
    tiles; byte g of its scales is the E8M0 scale of channels 32 g to 32 g + 31, zero behind the last.
    """

    code_words: Any
    scale_words: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys they stand for, [..., T, d]."""
        *lead, words, columns = self.code_words.shape
        return (*lead, columns, 8 * words)

    def pack(self, rows: jax.Array) -> "KeyColumns":
        """``rows`` [..., W, d] in this form, W columns; exact for keys that went through ``simulate_fp4``."""
        codes, scale = quantize_fp4_rows(rows)
        low, high = jnp.split(codes, 2, axis=-1)
        scales = lax.bitcast_convert_type(encode_e8m0(scale), jnp.uint8)
        missing = 4 * self.scale_words.shape[-2] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, missing)])
        return KeyColumns(_to_columns(low | (high << 4)), _to_columns(scales))

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The keys [..., T, d] in ``dtype``, exactly."""
        packed = _from_columns(self.code_words)
        codes = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
        scales = decode_e8m0(_from_columns(self.scale_words)[..., : codes.shape[-1] // FP4_BLOCK])
        return (e2m1_to_float(codes) * jnp.repeat(scales, FP4_BLOCK, axis=-1)).astype(dtype)


class KVColumns(NamedTuple):
    """KV rows as published, a row per column: uint32 words of E4M3 codes [..., (c - r) / 4, T], of BF16 RoPE dims
    [..., r / 2, T] and of E8M0 scales per 64 codes [..., 2, T] (at c = 512, r = 64: 146 words, 584 bytes).

    Channels are in their order, the first of a word lowest; scales are padded to whole words.
    """

    kv_words: Any
    rope_words: Any
    kv_scale_words: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows they stand for, [..., T, c]."""
        *lead, words, columns = self.kv_words.shape
        return (*lead, columns, 4 * words + 2 * self.rope_words.shape[-2])

    def pack(self, rows: jax.Array) -> "KVColumns":
        """``rows`` [..., W, c] in this form, W columns; exact for rows that went through ``simulate_kv``."""
        content, rope = jnp.split(rows, [4 * self.kv_words.shape[-2]], axis=-1)
        codes, scales = quantize_fp8_rows(content, KV_BLOCK)
        scales = lax.bitcast_convert_type(encode_e8m0(scales), jnp.uint8)
        missing = 4 * self.kv_scale_words.shape[-2] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, missing)])
        rope = lax.bitcast_convert_type(rope.astype(jnp.bfloat16), jnp.uint8).reshape(*rope.shape[:-1], -1)
        return KVColumns(
            _to_columns(lax.bitcast_convert_type(codes, jnp.uint8)), _to_columns(rope), _to_columns(scales)
        )

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The rows [..., T, c] in ``dtype``, in which every code times its scale is exact."""
        codes = lax.bitcast_convert_type(_from_columns(self.kv_words), jnp.float8_e4m3fn)
        scales = jnp.repeat(decode_e8m0(_from_columns(self.kv_scale_words)), KV_BLOCK, axis=-1)
        content = (codes.astype(jnp.float32) * scales[..., : codes.shape[-1]]).astype(dtype)
        rope = _from_columns(self.rope_words)
        rope = lax.bitcast_convert_type(rope.reshape(*rope.shape[:-1], -1, 2), jnp.bfloat16)
        return jnp.concatenate([content, rope.astype(dtype)], axis=-1)


def _to_columns(rows: jax.Array) -> jax.Array:
    """Bytes [..., W, 4 n] to uint32 words [..., n, W], the first byte lowest."""
    words = rows.reshape(*rows.shape[:-1], -1, 4).astype(jnp.uint32) << jnp.array([0, 8, 16, 24], jnp.uint32)
    return jnp.swapaxes(words[..., 0] | words[..., 1] | words[..., 2] | words[..., 3], -1, -2)


def _from_columns(words: jax.Array) -> jax.Array:
    """The inverse of ``_to_columns``."""
    words = jnp.swapaxes(words, -1, -2)[..., None] >> jnp.array([0, 8, 16, 24], jnp.uint32)
    return words.astype(jnp.uint8).reshape(*words.shape[:-2], -1)


STORED = (KVRows, KeyRows, KVColumns, KeyColumns)
"""The forms."""

COLUMNS = (KVColumns, KeyColumns)
"""Those with positions along the last dim."""


def layer_of(stack: Any, layer: jax.Array | int) -> Any:
    """The rows [B, T, ...] of one layer of a stack, in the form they are stored in."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, axis=0, keepdims=False), stack)


def unpacked(rows: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows as numbers, if they are stored in one of the forms; others as they are."""
    return rows.unpack(dtype) if isinstance(rows, STORED) else rows


def map_shapes(function: Callable[[tuple[int, int], jnp.dtype], Any], shapes: Any) -> Any:
    """``function(shape, dtype)`` of every array in what ``layer_cache_shapes`` gives for one name."""
    if isinstance(shapes, STORED):
        return type(shapes)(*(map_shapes(function, part) for part in shapes))
    return function(*shapes)


def entry_axes(store: Any, split: str | None) -> tuple[str | None, ...]:
    """Logical axes of the arrays of a stack of entries or keys, or of their shapes; ``split`` splits positions."""
    return (None, "batch", None, split) if isinstance(store, COLUMNS) else (None, "batch", split, None)


def positions_axis(path: Any) -> int:
    """The axis that positions have in an array of a stack of entries, rings or keys, whose path in a tree this is."""
    columns = {name for form in COLUMNS for name in form._fields}
    return 3 if any(getattr(key, "name", None) in columns for key in path) else 2


def put_columns(store: Any, lead: tuple[Any, Any], first: jax.Array, kept: jax.Array, columns: Any) -> Any:
    """The store [n, B, .., T] with ``columns`` [n', B', .., W] at ``lead`` of its first two axes, from ``first`` on.

    Of the W columns those ``kept`` [W] are written; those before column 0 and behind the last are dropped. Whole tiles
    around them are read and written back: a scatter would have XLA change the layout of the store.
    """
    return jax.tree.map(lambda a, new: _put_columns(a, lead, first, kept, new), store, columns)


def _put_columns(store, lead, first, kept, new):
    width, total = new.shape[-1], store.shape[-1]
    # Wherever in a tile the first column falls, so many hold the last as well.
    slab = min(total, COLUMN_TILE * (1 + -(-(width - 1) // COLUMN_TILE)))
    at = jnp.clip(first // COLUMN_TILE * COLUMN_TILE, 0, total - slab)
    # Out of reach, only padding is; a negative index would count from the end.
    offset = jnp.clip(slab - (first - at), 0, slab + width)
    new = lax.dynamic_slice_in_dim(jnp.pad(new, [(0, 0)] * 3 + [(slab, slab)]), offset, slab, axis=3)
    kept = lax.dynamic_slice_in_dim(jnp.pad(kept, slab), offset, slab)
    start = (*lead, 0, at)
    old = lax.dynamic_slice(store, start, new.shape)
    return lax.dynamic_update_slice(store, jnp.where(kept, new, old), start)
