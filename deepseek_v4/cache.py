"""The decoding cache: ring buffers indexed by absolute position, and entries indexed by window.

Nothing here needs to be cleared or marked: what a row may read follows from its position alone. Token t lives in slot
t mod size of every ring, compressed entry w in row w, and both are read only where the position says they were
written. Rolling a row back is therefore setting its position (``rollback`` in ``deepseek_v4.model``), as long as no
ring has wrapped over what is needed again; every ring holds ``rollback`` rows more than the model reads.

A layer's cache is a dict of arrays stacked over the layers of a scan group: [n, B, rows, width].
"""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.config import Config
from deepseek_v4.formats import pack_words
from deepseek_v4.layer_spec import LayerSpec

ENTRY_LAYOUTS = ("plain", "words")
"""How compressed entries are stored: rows of the activation dtype, or uint32 words (``formats.pack_words``)."""


_TILE_ROWS = 16
"""Rows of a bfloat16 tile of a TPU; two of 32-bit numbers."""


def layer_cache_shapes(
    config: Config,
    spec: LayerSpec,
    max_length: int,
    rollback: int,
    dtype: jax.typing.DTypeLike,
    layout: str = "plain",
) -> dict[str, tuple[tuple[int, int], jnp.dtype]]:
    """(rows, width) and dtype of each cache array of one layer and one sequence.

    ``window`` holds KV rows; ``entries`` and ``index_entries`` one row per compressed window; ``kv``, ``score`` (and
    ``index_kv``, ``index_score``) the float32 projections of the tokens that windows still to be completed pool.
    ``layout`` is how ``entries`` are stored; whoever writes and reads them knows it from their dtype. "words" hold the
    same bfloat16 numbers in the same bytes, addressable row by row by TPU kernels; rows of ``window`` and ``entries``
    are then rounded up to whole tiles, without which XLA would keep them in an order that kernels cannot read in place.
    Raises ``ValueError`` for an unknown layout, or for words of another dtype than bfloat16.
    """
    dtype = jnp.dtype(dtype)
    if layout not in ENTRY_LAYOUTS:
        raise ValueError(f"layout of entries: expected one of {ENTRY_LAYOUTS}, found {layout!r}")
    if layout == "words" and dtype != jnp.bfloat16:
        raise ValueError(f"entries are packed in words from bfloat16 alone, found {dtype}; use layout 'plain'")
    tile = _TILE_ROWS if layout == "words" else 1
    window = config.sliding_window - 1 + max(rollback, 1)
    shapes = {"window": ((_round_up(window, tile), config.head_dim), dtype)}
    if spec.compress_ratio:
        entries = max(1, max_length // spec.compress_ratio)
        history = spec.pool_rows - 1 + max(rollback, 1)
        width = spec.lanes * config.head_dim
        words = ((_round_up(entries, tile), config.head_dim // 2), jnp.dtype(jnp.uint32))
        shapes["entries"] = words if layout == "words" else ((entries, config.head_dim), dtype)
        shapes["kv"] = shapes["score"] = ((history, width), jnp.dtype(jnp.float32))
        if spec.indexer:
            width = spec.lanes * config.index_head_dim
            shapes["index_entries"] = ((entries, config.index_head_dim), dtype)
            shapes["index_kv"] = shapes["index_score"] = ((history, width), jnp.dtype(jnp.float32))
    return shapes


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def ring_read(ring: jax.Array, layer: jax.Array | int, start: jax.Array, count: int) -> jax.Array:
    """The ``count`` rows before position ``start`` [B] of ring [n, B, N, w]: [B, count, w], zero before position 0."""
    positions = start[:, None] - count + jnp.arange(count)
    rows = lax.dynamic_index_in_dim(ring, layer, axis=0, keepdims=False)
    taken = jnp.take_along_axis(rows, (positions % ring.shape[2])[..., None], axis=1)
    return jnp.where((positions >= 0)[..., None], taken, 0)


def ring_write(
    ring: jax.Array, layer: jax.Array | int, start: jax.Array, lengths: jax.Array, rows: jax.Array
) -> jax.Array:
    """Stores rows [B, S, w] of positions start .. start + lengths - 1; of a longer chunk only the last N are kept."""
    size, index = ring.shape[2], jnp.arange(rows.shape[1])
    positions = start[:, None] + index
    kept = (index < lengths[:, None]) & (index >= lengths[:, None] - size) & (positions >= 0)
    return _write_rows(ring, layer, jnp.where(kept, positions % size, size), rows)


def entries_write(
    entries: jax.Array, layer: jax.Array | int, first: jax.Array, complete: jax.Array, rows: jax.Array
) -> jax.Array:
    """Stores entries [B, W, w] as windows first .. first + W - 1 [B], where ``complete`` [B, W]; words are packed."""
    if entries.dtype == jnp.uint32:
        rows = pack_words(rows)
    slots = first[:, None] + jnp.arange(rows.shape[1])
    return _write_rows(entries, layer, jnp.where(complete, slots, entries.shape[2]), rows)


def _write_rows(store: jax.Array, layer: jax.Array | int, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """store[layer, b, slots[b, i]] = rows[b, i]; slots out of range are dropped.

    Spelled with explicit batching dims, which the partitioner keeps on the shard that owns a row.
    """
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
