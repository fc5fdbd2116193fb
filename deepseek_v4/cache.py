"""The decoding cache: ring buffers indexed by absolute position, and entries indexed by window.

Nothing here needs to be cleared or marked: what a row may read follows from its position alone. Token t lives in slot
t mod size of every ring, compressed entry w in row w, and both are read only where the position says they were
written. Rolling a row back is therefore setting its position (``rollback`` in ``deepseek_v4.model``), as long as no
ring has wrapped over what is needed again; every ring holds ``rollback`` rows more than the model reads.

A layer's cache is a dict of arrays stacked over the layers of a scan group: [n, B, rows, width].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.config import Config
from deepseek_v4.formats import FP4_BLOCK, KV_BLOCK, pack_words
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.stored_rows import (
    COLUMN_TILE,
    COLUMNS,
    STORED,
    KeyColumns,
    KeyRows,
    KVColumns,
    KVRows,
    KVWords,
    halves_of_words,
    layer_of,
    put_columns,
    unpacked,
    words_of_halves,
)

ENTRIES = ("entries", "index_entries")
"""Arrays of a layer's cache with one row per compressed window; the others are rings."""

ENTRY_LAYOUTS = ("plain", "words", "published", "columns")
"""How rows are stored: in the activation dtype; compressed entries as uint32 words (``formats.pack_words``); window
rows and entries as ``KVRows`` and index keys as ``KeyRows``, the bytes of the release; or the same bytes of entries and
keys as TPU kernels read them in place, ``KVColumns``, ``KVWords`` and ``KeyColumns``."""


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
    gives ``KVRows`` and ``KeyRows`` of such pairs; "columns" ``KeyColumns``, ``KVColumns`` of entries that are read one
    after the other and ``KVWords`` of those that are selected (``KVRows`` where a width has no words), all rounded up
    to whole tiles of columns, and windows, whose size is fixed, as they are. ``shards`` devices hold equal ranges of
    the entries, for which their rows are rounded up too.
    Raises ``ValueError`` for an unknown layout, or for words of another dtype than bfloat16.
    """
    dtype = jnp.dtype(dtype)
    if layout not in ENTRY_LAYOUTS:
        raise ValueError(f"layout of entries: expected one of {ENTRY_LAYOUTS}, found {layout!r}")
    if layout == "words" and dtype != jnp.bfloat16:
        raise ValueError(f"entries are packed in words from bfloat16 alone, found {dtype}; use layout 'plain'")

    kernels = layout in ("words", "columns")

    def kv_rows(rows: int, *, selected: bool = False) -> Any:
        if layout not in ("published", "columns"):
            return ((rows, config.head_dim), dtype)
        rope = config.qk_rope_head_dim
        content = config.head_dim - rope
        if layout == "columns" and not selected:
            words = (content // 4, rope // 2, -(-content // (4 * KV_BLOCK)))
            return KVColumns(*(((count, rows), jnp.dtype(jnp.uint32)) for count in words))
        if layout == "columns" and KVWords.holds(config.head_dim, rope):
            width = config.head_dim // 4
            shared = rows * rope // (2 * width)
            return KVWords(*(((count, width), jnp.dtype(jnp.uint32)) for count in (rows, shared)))
        kinds = (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float8_e8m0fnu)
        widths = KVRows.widths(config.head_dim, rope)
        return KVRows(*(((rows, width), jnp.dtype(kind)) for width, kind in zip(widths, kinds, strict=True)))

    def key_rows(rows: int) -> Any:
        dim = config.index_head_dim
        if layout == "columns":
            words = jnp.dtype(jnp.uint32)
            return KeyColumns(((dim // 8, rows), words), ((-(-dim // (4 * FP4_BLOCK)), rows), words))
        if layout != "published":
            return ((rows, dim), dtype)
        return KeyRows(
            ((rows, dim // 2), jnp.dtype(jnp.uint8)), ((rows, dim // FP4_BLOCK), jnp.dtype(jnp.float8_e8m0fnu))
        )

    tile = _TILE_ROWS if kernels else 1
    window = _round_up(config.sliding_window - 1 + max(rollback, 1), tile)
    shapes: dict[str, Any] = {"window": ((window, config.head_dim), dtype) if kernels else kv_rows(window)}
    if spec.compress_ratio:
        columns = COLUMN_TILE if layout == "columns" else tile
        entries = _round_up(max(1, max_length // spec.compress_ratio), columns * shards)
        history = _round_up(spec.pool_rows - 1 + max(rollback, 1), _FLOAT_TILE_ROWS if kernels else 1)
        width = spec.lanes * config.head_dim
        words = ((entries, config.head_dim // 2), jnp.dtype(jnp.uint32))
        shapes["entries"] = words if layout == "words" else kv_rows(entries, selected=spec.indexer)
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
    if isinstance(entries, COLUMNS):
        return _write_columns(entries, layer, first, complete, rows, rows_over)
    if not isinstance(entries, STORED) and entries.dtype == jnp.uint32:
        rows = pack_words(rows)
    if rows_over:
        first = first - lax.axis_index(rows_over) * entries.shape[2]
    slots = first[:, None] + jnp.arange(rows.shape[1])
    complete &= slots >= 0
    slots = jnp.where(complete, slots, entries.shape[2])
    if isinstance(entries, KVWords):
        words, rope = entries.pack_each(rows)
        return KVWords(
            _write_rows(entries.entry_words, layer, slots, words),
            _write_shared(entries.shared_rope_words, layer, first, complete, rope),
        )
    return _write_rows(entries, layer, slots, rows)


def _write_shared(store, layer, first, complete, parts):
    """Writes ``parts`` [B, W, r], 16-bit numbers of positions from ``first`` on, to rows [n, B, R, w] of 2 w / r each.

    Rows are read, their parts replaced where ``complete`` [B, W], and written back.
    """
    width, size = parts.shape[1:]
    sharing = 2 * store.shape[-1] // size
    index = (first // sharing)[:, None] + jnp.arange((width + sharing - 2) // sharing + 1)
    at = index[..., None] * sharing + jnp.arange(sharing) - first[:, None, None]
    source = jnp.clip(at, 0, width - 1).reshape(at.shape[0], -1)
    new = jnp.take_along_axis(parts, source[..., None], axis=1).reshape(*at.shape, size)
    replaced = (at >= 0) & (at < width) & jnp.take_along_axis(complete, source, axis=1).reshape(at.shape)
    old = halves_of_words(_read_rows(store, layer, index)).reshape(new.shape)
    merged = words_of_halves(jnp.where(replaced[..., None], new, old).reshape(*index.shape, -1))
    return _write_rows(store, layer, jnp.where(jnp.any(replaced, axis=-1), index, store.shape[2]), merged)


def _read_rows(store: jax.Array, layer: jax.Array | int, slots: jax.Array) -> jax.Array:
    """Rows store[layer, b, slots[b, i]] as [B, i, w]; of slots out of range, some row. Spelled as ``_write_rows``."""
    layers = jnp.broadcast_to(jnp.asarray(layer, slots.dtype), slots.shape)
    dims = lax.GatherDimensionNumbers(
        offset_dims=(2,),
        collapsed_slice_dims=(0, 2),
        start_index_map=(0, 2),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )
    sizes = (1, 1, 1, store.shape[-1])
    starts = jnp.stack([layers, slots], axis=-1)
    return lax.gather(store, starts, dims, sizes, mode=lax.GatherScatterMode.CLIP)


def _write_columns(entries, layer, first, complete, rows, rows_over):
    """What ``entries_write`` does, row by row of the batch, in place."""
    columns = entries.pack(rows)
    if rows_over:
        first = first - lax.axis_index(rows_over) * entries.shape[2]

    def put(b, store):
        own = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, b, 1)[None], columns)
        return put_columns(store, (layer, b), first[b], complete[b], own)

    return lax.fori_loop(0, rows.shape[0], put, entries)


def _write_rows(store: Any, layer: jax.Array | int, slots: jax.Array, rows: Any) -> Any:
    """store[layer, b, slots[b, i]] = rows[b, i]; slots out of range are dropped.

    Spelled with explicit batching dims, which the partitioner keeps on the shard that owns a row.
    """
    if isinstance(store, STORED):
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
