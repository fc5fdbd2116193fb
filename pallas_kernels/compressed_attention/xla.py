"""The readable twin of ``compressed_attention``: blocks of queries, dense masks, one float32 softmax.

``index_divergence`` asks the same softmax for the weight of every entry, as the teacher of the indexer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.cache import ring_read
from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import unpack_words
from deepseek_v4.stored_rows import KVColumns, KVRows, KVWords, layer_of, unpacked
from pallas_kernels.targets import current_chip

_QUERY_BLOCK = 128
_KEPT_ELEMENTS = 1 << 24  # scores and gathered entries that a backward pass may find (64 MiB in float32)
_GATHER_ELEMENTS = 1 << 25  # bounds the [B, block, K, c] gather of selected entries


class _Queries(NamedTuple):
    """A block of queries [B, S, ...] with the keys of their windows, own rows last, and what goes with each or None."""

    q: jax.Array
    window: jax.Array
    window_counts: jax.Array
    first_entries: Any
    counts: Any
    indices: Any
    extra: Any


def compressed_attention(q, window, sink, start, *, scale, **arguments):
    """See ``pallas_kernels.compressed_attention.compressed_attention``."""

    def attend(queries: _Queries, entries):
        out, _, total = _weighted(queries, sink, entries, scale)
        return (out / total).astype(q.dtype)

    return _in_blocks(attend, q, window, start, **arguments)


def attention_with_sums(q, window, sink, start, *, scale, **arguments):
    """See ``pallas_kernels.compressed_attention.gradient.attention_with_sums``."""

    def attend(queries: _Queries, entries):
        out, maximum, total = _weighted(queries, sink, entries, scale)
        return (out / total).astype(q.dtype), (maximum + jnp.log(total))[..., 0]

    return _in_blocks(attend, q, window, start, **arguments)


def partial_attention(*, q, window, start, scale, **arguments):
    """The softmax over what these arguments hold, before it is divided and without the sink; all float32.

    Returns (weighted sum of values [B, S, H, c], largest score [B, S, H, 1], sum of weights [B, S, H, 1]); weights are
    relative to the largest score, which is the lowest float32 of a query that sees nothing.
    """

    def attend(queries: _Queries, entries):
        return _weighted(queries, None, entries, scale)

    return _in_blocks(attend, q, window, start, **arguments)


def _weighted(queries: _Queries, sink, entries, scale):
    weights, keys, maximum, total = _softmax(queries, sink, entries, scale)
    out = sum(
        _dot("bqhk,bkc->bqhc" if k.ndim == 3 else "bqhk,bqkc->bqhc", w.astype(queries.q.dtype), k)
        for w, k in zip(weights, keys, strict=True)
    )
    return out, maximum, total


def index_divergence(scores, q, window, sink, start, *, scale, sum_over, **arguments):
    """See ``pallas_kernels.compressed_attention.index_divergence``."""

    def diverge(queries: _Queries, entries):
        weights, _, _, total = _softmax(queries, sink, entries, scale)
        taught = jnp.sum(weights[1] / total, axis=2)
        taught = lax.psum(taught, sum_over) if sum_over else taught
        size = jnp.sum(taught, axis=-1, keepdims=True)
        taught = lax.stop_gradient(taught / jnp.where(size > 0, size, 1))
        student = queries.extra
        if queries.indices is not None:
            student = jnp.take_along_axis(student, jnp.maximum(queries.indices, 0), axis=-1)
            student = jnp.where(queries.indices >= 0, student, -jnp.inf)
        seen = student > -jnp.inf
        # Queries that see nothing keep finite numbers, in the gradient too.
        student = jnp.where(jnp.any(seen, axis=-1, keepdims=True), student, 0.0)
        log_student = jnp.where(seen, jax.nn.log_softmax(student, axis=-1), 0.0)
        log_taught = jnp.log(jnp.where(taught > 0, taught, 1.0))
        return jnp.sum(jnp.where(seen, taught * (log_taught - log_student), 0.0), axis=-1)

    return _in_blocks(diverge, q, window, start, extra=scores, **arguments)


def _in_blocks(
    function: Callable[[_Queries, Any], jax.Array],
    q,
    window,
    start,
    *,
    ring,
    entries,
    layer,
    counts,
    indices,
    window_size,
    window_counts=None,
    first_entries=None,
    extra=None,
):
    """``function`` of blocks of queries and the entries [B, T, c], its results [B, block, ...] joined: [B, S, ...]."""
    batch, length, _, width = q.shape
    if ring is not None:
        window = jnp.concatenate([ring_read(ring, layer, start, window_size - 1, window.dtype), window], axis=1)
    if entries is not None:
        entries = layer_of(entries, layer)
        if isinstance(entries, KVColumns) or (isinstance(entries, (KVRows, KVWords)) and indices is None):
            entries = entries.unpack(q.dtype)
    if entries is not None and not isinstance(entries, (KVRows, KVWords)):
        entries = unpack_words(entries) if entries.dtype == jnp.uint32 else entries
        # What no query of the row can see is not data: 0 * NaN would still poison the sum over values.
        readable = jnp.arange(entries.shape[1]) < jnp.max(counts, axis=1, keepdims=True)
        entries = jnp.where(readable[..., None], entries, 0)
    positions = start[:, None] - (window_size - 1) + jnp.arange(window.shape[1])
    window = jnp.where(positions[..., None] >= 0, window, 0)
    exist = jnp.clip(start[:, None] + jnp.arange(length) + 1, 0, window_size)
    window_counts = exist if window_counts is None else jnp.minimum(window_counts, exist)

    block = min(length, _QUERY_BLOCK)
    if indices is not None:
        block = max(1, min(block, _GATHER_ELEMENTS // (batch * indices.shape[-1] * width)))
    blocks = -(-length // block)

    def run(queries: _Queries):
        return function(queries, entries)

    # Recomputed in a backward pass where the scores of all blocks together are what should never be in memory.
    keys = (0 if entries is None else entries.shape[1]) if indices is None else indices.shape[-1]
    gathered = 0 if indices is None else indices.size * width
    if q.size // width * (block + window_size + keys) + gathered > _KEPT_ELEMENTS:
        run = jax.checkpoint(run)
    if blocks == 1:
        return run(_Queries(q, window, window_counts, first_entries, counts, indices, extra))

    def cut(a):
        if a is None:
            return None
        a = jnp.pad(a, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, blocks, block, *a.shape[2:]), 1, 0)

    windows = _overlapping(window, blocks, block, window_size - 1)
    rest = (window_counts, first_entries, counts, indices, extra)
    out = lax.map(run, _Queries(cut(q), windows, *map(cut, rest)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, blocks * block, *a.shape[3:])[:, :length], out)


def _overlapping(window, blocks, block, history):
    """The keys of every block of queries, their own rows last: [blocks, B, rows, c] of window [B, history + S, c]."""
    batch, rows, width = window.shape
    if block >= history:
        # Two whole blocks each, the previous and their own: no gather, and no scatter in a backward pass.
        window = jnp.pad(window, [(0, 0), (block - history, blocks * block + history - rows), (0, 0)])
        window = jnp.moveaxis(window.reshape(batch, blocks + 1, block, width), 1, 0)
        return jnp.concatenate([window[:-1], window[1:]], axis=2)
    window = jnp.pad(window, [(0, 0), (0, blocks * block + history - rows), (0, 0)])
    index = jnp.arange(blocks)[:, None] * block + jnp.arange(block + history)
    return jnp.moveaxis(window[:, index], 1, 0)


def _softmax(queries: _Queries, sink, entries, scale):
    """Of one softmax over window, entries and sink (if there is one), not normalised.

    Returns weights [B, S, H, keys] of window and entries, their keys, the largest score and the sum of weights. The
    keys of selected entries are [B, S, K, c], those of the others [B, keys, c]. Heads stay where queries have them:
    products of this order need no copy of scores or queries.
    """
    q, window, window_counts, first_entries, counts, indices, _ = queries
    length = q.shape[1]
    # How many tokens before its query a key is; own rows are last.
    back = jnp.arange(length)[:, None] + (window.shape[1] - length) - jnp.arange(window.shape[1])
    in_window = (back >= 0) & (back < window_counts[..., None])
    score = _dot("bqhc,bkc->bqhk", q, window) * scale
    scores, keys = [jnp.where(in_window[:, :, None], score, -jnp.inf)], [window]

    if entries is not None and indices is None:
        index = jnp.arange(entries.shape[1])
        visible = index < counts[..., None]
        if first_entries is not None:
            visible &= index >= first_entries[..., None]
        score = _dot("bqhc,bkc->bqhk", q, entries) * scale
        scores.append(jnp.where(visible[:, :, None], score, -jnp.inf))
        keys.append(entries)
    elif entries is not None:
        chosen = jnp.maximum(indices, 0)
        selected: Any
        if isinstance(entries, KVWords):
            selected = entries.take(chosen)
        else:
            selected = jax.tree.map(lambda rows: jax.vmap(lambda of_row, at: of_row[at])(rows, chosen), entries)
        if isinstance(selected, KVRows):
            # Decoded is what was selected alone; the row that stands in for none may hold anything.
            selected = jnp.where((indices >= 0)[..., None], unpacked(selected, q.dtype), 0)
        score = _dot("bqhc,bqkc->bqhk", q, selected) * scale
        scores.append(jnp.where((indices >= 0)[:, :, None], score, -jnp.inf))
        keys.append(selected)

    if sink is None:
        maximum = jnp.full((1, 1), jnp.finfo(jnp.float32).min)
    else:
        maximum = sink = sink[:, None].astype(jnp.float32)
    for score in scores:
        maximum = jnp.maximum(maximum, jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf))
    maximum = lax.stop_gradient(maximum)
    weights = [jnp.exp(score - maximum) for score in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    if sink is not None:
        total = jnp.exp(sink - maximum) + total
    return weights, keys, maximum, total


def _dot(equation, a, b):
    b = b.astype(a.dtype)
    if current_chip() is None:
        # XLA's CPU backend lacks some bfloat16 products with float32 results; in float32 the same products are exact.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=dot_precision(a.dtype), preferred_element_type=jnp.float32)
