"""The decoding cache: ring buffers indexed by absolute position, and entries indexed by window.

Nothing here needs to be cleared or marked: what a row may read follows from its position alone. Token t lives in slot
t mod size of every ring, compressed entry w in row w, and both are read only where the position says they were
written. Rolling a row back is therefore setting its position (``rollback`` in ``deepseek_v4.model``), as long as no
ring has wrapped over what is needed again; every ring holds ``rollback`` rows more than the model reads.

A layer's cache is a dict of arrays stacked over the layers of a scan group: [n, B, rows, width].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.config import Config
from deepseek_v4.formats import (
    E2M1_MAX,
    FP4_BLOCK,
    KV_BLOCK,
    decode_e8m0,
    dequantize_fp4,
    encode_e8m0,
    float_to_e2m1,
    pack_e2m1,
    pack_words,
    power_of_two_scale,
    quantize_fp8_rows,
)
from deepseek_v4.layer_spec import LayerSpec

ENTRIES = ("entries", "index_entries")
"""Arrays of a layer's cache with one row per compressed window; the others are rings."""

ENTRY_LAYOUTS = ("plain", "words", "published")
"""How rows are stored: in the activation dtype; compressed entries as uint32 words (``formats.pack_words``); or window
rows and entries as ``KVRows`` and index keys as ``KeyRows``, the bytes of the release."""


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
        groups = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, FP4_BLOCK)
        amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), E2M1_MAX * 2.0**-126)
        scale = power_of_two_scale(amax, E2M1_MAX)
        codes = float_to_e2m1(groups / scale[..., None]).reshape(rows.shape)
        return KeyRows(pack_e2m1(codes), encode_e8m0(scale))

    def unpack(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The keys [..., d] in ``dtype``, exactly."""
        return dequantize_fp4(self.codes, self.scales, jnp.dtype(dtype))


def layer_of(stack: Any, layer: jax.Array | int) -> Any:
    """The rows [B, T, ...] of one layer of a stack, in the form they are stored in."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, axis=0, keepdims=False), stack)


def unpacked(rows: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows as numbers, if they are stored as ``KVRows`` or ``KeyRows``; others as they are."""
    return rows.unpack(dtype) if isinstance(rows, (KVRows, KeyRows)) else rows


def map_shapes(function: Callable[[tuple[int, int], jnp.dtype], Any], shapes: Any) -> Any:
    """``function(shape, dtype)`` of every array in what ``layer_cache_shapes`` gives for one name."""
    if isinstance(shapes, (KVRows, KeyRows)):
        return type(shapes)(*(map_shapes(function, part) for part in shapes))
    return function(*shapes)


_TILE_ROWS = 16
"""Rows of a bfloat16 tile of a TPU; two of 32-bit numbers."""

_FLOAT_TILE_ROWS = 8
"""Rows of a float32 tile: the projections of ``kv`` and ``score`` are such."""


def layer_cache_shapes(
    config: Config,
    spec: LayerSpec,
    max_length: int,
    rollback: int,
    dtype: jax.typing.DTypeLike,
    layout: str = "plain",
    shards: int = 1,
) -> dict[str, Any]:
    """(rows, width) and dtype of each cache array of one layer and one sequence.

    ``window`` holds KV rows; ``entries`` and ``index_entries`` one row per compressed window; ``kv``, ``score`` (and
    ``index_kv``, ``index_score``) the float32 projections of the tokens that windows still to be completed pool.
    ``layout`` is how ``entries`` are stored; whoever writes and reads them knows it from their dtype. "words" hold the
    same bfloat16 numbers in the same bytes, addressable row by row by TPU kernels; rows of all arrays are then rounded
    up to whole tiles, without which XLA would keep them in an order that kernels cannot read in place. "published"
    gives ``KVRows`` and ``KeyRows`` of such pairs. ``shards`` devices hold equal ranges of the entries, for which their
    rows are rounded up too.
    Raises ``ValueError`` for an unknown layout, or for words of another dtype than bfloat16.
    """
    dtype = jnp.dtype(dtype)
    if layout not in ENTRY_LAYOUTS:
        raise ValueError(f"layout of entries: expected one of {ENTRY_LAYOUTS}, found {layout!r}")
    if layout == "words" and dtype != jnp.bfloat16:
        raise ValueError(f"entries are packed in words from bfloat16 alone, found {dtype}; use layout 'plain'")

    def kv_rows(rows: int) -> Any:
        if layout != "published":
            return ((rows, config.head_dim), dtype)
        rope = config.qk_rope_head_dim
        content = config.head_dim - rope
        scales = -(-content // KV_BLOCK)
        scales += -(content + 2 * rope + scales) % 8
        return KVRows(
            ((rows, content), jnp.dtype(jnp.float8_e4m3fn)),
            ((rows, rope), jnp.dtype(jnp.bfloat16)),
            ((rows, scales), jnp.dtype(jnp.float8_e8m0fnu)),
        )

    def key_rows(rows: int) -> Any:
        dim = config.index_head_dim
        if layout != "published":
            return ((rows, dim), dtype)
        return KeyRows(
            ((rows, dim // 2), jnp.dtype(jnp.uint8)), ((rows, dim // FP4_BLOCK), jnp.dtype(jnp.float8_e8m0fnu))
        )

    tile = _TILE_ROWS if layout == "words" else 1
    window = config.sliding_window - 1 + max(rollback, 1)
    shapes: dict[str, Any] = {"window": kv_rows(_round_up(window, tile))}
    if spec.compress_ratio:
        entries = _round_up(max(1, max_length // spec.compress_ratio), tile * shards)
        history = _round_up(spec.pool_rows - 1 + max(rollback, 1), _FLOAT_TILE_ROWS if layout == "words" else 1)
        width = spec.lanes * config.head_dim
        words = ((entries, config.head_dim // 2), jnp.dtype(jnp.uint32))
        shapes["entries"] = words if layout == "words" else kv_rows(entries)
        shapes["kv"] = shapes["score"] = ((history, width), jnp.dtype(jnp.float32))
        if spec.indexer:
            width = spec.lanes * config.index_head_dim
            shapes["index_entries"] = key_rows(entries)
            shapes["index_kv"] = shapes["index_score"] = ((history, width), jnp.dtype(jnp.float32))
    return shapes


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def ring_read(
    ring: Any, layer: jax.Array | int, start: jax.Array, count: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """The ``count`` rows before position ``start`` [B] of ring [n, B, N, w]: [B, count, w], zero before position 0.

    ``dtype`` is that of rows which are not stored as numbers.
    """
    positions = start[:, None] - count + jnp.arange(count)
    slots = (positions % ring.shape[2])[..., None]
    taken = jax.tree.map(lambda rows: jnp.take_along_axis(rows, slots, axis=1), layer_of(ring, layer))
    taken = unpacked(taken, dtype)
    return jnp.where((positions >= 0)[..., None], taken, 0)


def ring_write(ring: Any, layer: jax.Array | int, start: jax.Array, lengths: jax.Array, rows: jax.Array) -> Any:
    """Stores rows [B, S, w] of positions start .. start + lengths - 1; of a longer chunk only the last N are kept."""
    size, index = ring.shape[2], jnp.arange(rows.shape[1])
    positions = start[:, None] + index
    kept = (index < lengths[:, None]) & (index >= lengths[:, None] - size) & (positions >= 0)
    return _write_rows(ring, layer, jnp.where(kept, positions % size, size), rows)


def entries_write(
    entries: Any,
    layer: jax.Array | int,
    first: jax.Array,
    complete: jax.Array,
    rows: jax.Array,
    rows_over: tuple[str, ...] = (),
) -> Any:
    """Stores entries [B, W, w] as windows first .. first + W - 1 [B], where ``complete`` [B, W], in its form.

    ``rows_over`` names the mesh axes that split the entries (inside ``shard_map``): ``entries`` are this device's range
    of them, in the order of the mesh, and it stores what falls into that.
    """
    if not isinstance(entries, (KVRows, KeyRows)) and entries.dtype == jnp.uint32:
        rows = pack_words(rows)
    slots = first[:, None] + jnp.arange(rows.shape[1])
    if rows_over:
        slots -= lax.axis_index(rows_over) * entries.shape[2]
        complete &= slots >= 0
    return _write_rows(entries, layer, jnp.where(complete, slots, entries.shape[2]), rows)


def _write_rows(store: Any, layer: jax.Array | int, slots: jax.Array, rows: Any) -> Any:
    """store[layer, b, slots[b, i]] = rows[b, i]; slots out of range are dropped.

    Spelled with explicit batching dims, which the partitioner keeps on the shard that owns a row.
    """
    if isinstance(store, (KVRows, KeyRows)):
        parts = zip(store, store.pack(rows), strict=True)
        return type(store)(*(_write_rows(part, layer, slots, new) for part, new in parts))  # type: ignore[arg-type]
    layers = jnp.broadcast_to(jnp.asarray(layer, slots.dtype), slots.shape)
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(
        store,
        jnp.stack([layers, slots], axis=-1),
        rows.astype(store.dtype),
        dims,
        unique_indices=False,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
