"""The forms in which caches keep KV rows and index keys in the bytes of the release (architecture section 7).

A form is a tuple of arrays that knows how numbers become it (``pack``) and it becomes numbers (``unpack``). ``KVRows``
and ``KeyRows`` hold a row per position, as memory of CPUs and GPUs likes it. ``KVColumns`` and ``KeyColumns`` hold the
same bytes with positions along the last dim, which is how TPUs keep narrow rows without padding, and how their matrix
units want keys. ``KVWords`` holds them in rows that TPUs can fetch one by one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

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
    unpack_words,
)
from pallas_kernels.targets import current_chip

COLUMN_TILE = 128
"""Positions of a tile: stores in columns hold a multiple of it."""


class KVRows(NamedTuple):
    """KV rows [..., c] as published: E4M3 codes [..., c - r], BF16 RoPE dims [..., r], E8M0 scale bytes per 64 codes.

    Scales are padded so that a row is a multiple of 8 bytes (584 at c = 512, r = 64).
    """

    codes: Any
    rope: Any
    scales: Any

    @staticmethod
    def widths(width: int, rope: int) -> tuple[int, int, int]:
        """Codes, RoPE dims and scales of rows of ``width`` numbers, the last ``rope`` of which are rotated."""
        content = width - rope
        scales = -(-content // KV_BLOCK)
        return content, rope, scales + -(content + 2 * rope + scales) % 8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows they stand for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] + self.rope.shape[-1])

    @property
    def fetched_bytes(self) -> int:
        """Bytes of a row."""
        return self.codes.shape[-1] + 2 * self.rope.shape[-1] + self.scales.shape[-1]

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

    @property
    def fetched_bytes(self) -> int:
        """Bytes of a column."""
        return 4 * sum(words.shape[-2] for words in self)

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


class KVWords(NamedTuple):
    """KV rows as published, in rows of c / 4 uint32 words that TPUs fetch one by one: an entry's own and one it shares.

    ``entry_words`` [..., T, c / 4] hold the E4M3 codes of c - r channels, the E8M0 scales per 64 codes, then zeros:
    byte j of word l is byte j c / 4 + l of these. ``shared_rope_words`` [..., T / n, c / 4] hold the BF16 RoPE dims of
    n = c / (2 r) entries, one after the other as ``formats.pack_words`` packs them. Transfers move multiples of 512
    bytes (128 words, a row at c = 512): the 584 bytes of an entry cross in two rows wherever they lie. An entry takes
    c + 2 r bytes, 640 of which 584 are published.
    """

    entry_words: Any
    shared_rope_words: Any

    @staticmethod
    def holds(width: int, rope: int) -> bool:
        """Whether rows of ``width`` channels, ``rope`` of which turn, have this form."""
        return width % 4 == 0 and (width // 4) % rope == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows they stand for, [..., T, c]."""
        return (*self.entry_words.shape[:-1], 4 * self.entry_words.shape[-1])

    @property
    def sharing(self) -> int:
        """Entries that share a row of RoPE dims."""
        return self.entry_words.shape[-2] // self.shared_rope_words.shape[-2]

    @property
    def rope_dims(self) -> int:
        """The RoPE dims r of a row."""
        return 2 * self.entry_words.shape[-1] // self.sharing

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the two rows that an entry takes part in."""
        return 2 * 4 * self.entry_words.shape[-1]

    def pack(self, rows: jax.Array) -> "KVWords":
        """``rows`` [..., W, c] in this form, W a multiple of ``sharing``; exact for rows from ``simulate_kv``."""
        words, rope = self.pack_each(rows)
        return KVWords(words, words_of_halves(rope.reshape(*rope.shape[:-2], -1, 2 * words.shape[-1])))

    def pack_each(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of ``rows`` [..., c] entry words [..., c / 4] and the bits of RoPE dims [..., r], uint32 below 2^16."""
        content, rope = jnp.split(rows, [rows.shape[-1] - self.rope_dims], axis=-1)
        codes, scales = quantize_fp8_rows(content, KV_BLOCK)
        parts = [lax.bitcast_convert_type(part, jnp.uint8) for part in (codes, encode_e8m0(scales))]
        stored = jnp.concatenate(parts, axis=-1).astype(jnp.uint32)
        stored = jnp.pad(stored, [(0, 0)] * (rows.ndim - 1) + [(0, rows.shape[-1] - stored.shape[-1])])
        planes = jnp.split(stored, 4, axis=-1)
        rope = lax.bitcast_convert_type(rope.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        return planes[0] | planes[1] << 8 | planes[2] << 16 | planes[3] << 24, rope

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The rows [..., T, c] in ``dtype``, in which every code times its scale is exact."""
        rope = unpack_words(self.shared_rope_words)
        rope = rope.reshape(*self.entry_words.shape[:-1], self.rope_dims)
        return self._published(self.entry_words, rope).unpack(dtype)

    def take(self, index: jax.Array) -> KVRows:
        """The rows ``index`` [B, ...] of this store [B, T, c], as published."""
        words, shared = (
            jax.vmap(lambda of_row, at: of_row[at])(part, index // n)
            for part, n in zip(self, (1, self.sharing), strict=True)
        )
        rope = unpack_words(shared).reshape(*index.shape, self.sharing, self.rope_dims)
        rope = jnp.take_along_axis(rope, (index % self.sharing)[..., None, None], axis=-2)
        return self._published(words, rope[..., 0, :])

    def _published(self, words: jax.Array, rope: jax.Array) -> KVRows:
        stored = jnp.concatenate([(words >> (8 * j)).astype(jnp.uint8) for j in range(4)], axis=-1)
        content = stored.shape[-1] - rope.shape[-1]
        codes, scales = stored[..., :content], stored[..., content : content + -(-content // KV_BLOCK)]
        return KVRows(
            lax.bitcast_convert_type(codes, jnp.float8_e4m3fn),
            rope,
            lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu),
        )


def words_of_halves(halves: jax.Array) -> jax.Array:
    """16-bit numbers [..., 2 n] (uint32) to words [..., n]: number l low and number l + n high."""
    low, high = jnp.split(halves, 2, axis=-1)
    return low | high << 16


def halves_of_words(words: jax.Array) -> jax.Array:
    """The inverse of ``words_of_halves``."""
    return jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)


def _to_columns(rows: jax.Array) -> jax.Array:
    """Bytes [..., W, 4 n] to uint32 words [..., n, W], the first byte lowest."""
    words = rows.reshape(*rows.shape[:-1], -1, 4).astype(jnp.uint32) << jnp.array([0, 8, 16, 24], jnp.uint32)
    return jnp.swapaxes(words[..., 0] | words[..., 1] | words[..., 2] | words[..., 3], -1, -2)


def _from_columns(words: jax.Array) -> jax.Array:
    """The inverse of ``_to_columns``."""
    words = jnp.swapaxes(words, -1, -2)[..., None] >> jnp.array([0, 8, 16, 24], jnp.uint32)
    return words.astype(jnp.uint8).reshape(*words.shape[:-2], -1)


STORED = (KVRows, KeyRows, KVColumns, KeyColumns, KVWords)
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


def positions_in_row(path: Any, width: int, rope: int) -> int:
    """Positions that a row, or column, of such an array holds; KV rows are of ``width``, of which ``rope`` turn."""
    return width // (2 * rope) if any(getattr(key, "name", None) == "shared_rope_words" for key in path) else 1


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
    new = jnp.where(kept, new, old)
    chip = current_chip()
    if chip is not None and chip.platform == "tpu":
        # XLA would rather turn the whole store, padded, than the new columns.
        new = with_layout_constraint(new, Layout(tuple(range(store.ndim))))
    return lax.dynamic_update_slice(store, new, start)
