"""The readable twin of ``compressed_attention``: blocks of queries, dense masks, one float32 softmax."""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.cache import ring_read
from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import unpack_words
from pallas_kernels.targets import current_chip

_QUERY_BLOCK = 128
_GATHER_ELEMENTS = 1 << 25  # bounds the [B, block, K, c] gather of selected entries


def compressed_attention(q, window, sink, start, *, ring, entries, layer, counts, indices, window_size, scale):
    """See ``pallas_kernels.compressed_attention.compressed_attention``."""
    batch, length, heads, width = q.shape
    if ring is not None:
        window = jnp.concatenate([ring_read(ring, layer, start, window_size - 1), window], axis=1)
    if entries is not None:
        entries = lax.dynamic_index_in_dim(entries, layer, axis=0, keepdims=False)
        entries = unpack_words(entries) if entries.dtype == jnp.uint32 else entries
        # What no query of the row can see is not data: 0 * NaN would still poison the sum over values.
        readable = jnp.arange(entries.shape[1]) < jnp.max(counts, axis=1, keepdims=True)
        entries = jnp.where(readable[..., None], entries, 0)
    window_positions = start[:, None] - (window_size - 1) + jnp.arange(window.shape[1])
    window = jnp.where(window_positions[..., None] >= 0, window, 0)

    block = min(length, _QUERY_BLOCK)
    if indices is not None:
        block = max(1, min(block, _GATHER_ELEMENTS // (batch * indices.shape[-1] * width)))
    blocks = -(-length // block)
    padding = blocks * block - length
    if padding:
        q, window, counts, indices = (
            None if a is None else jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
            for a in (q, window, counts, indices)
        )

    def attend(first):
        """Queries first .. first + block - 1 of every row."""

        def rows(a, count=block):
            return lax.dynamic_slice_in_dim(a, first, count, axis=1)

        return _attend_block(
            rows(q),
            rows(window, block + window_size - 1),
            sink,
            start + first,
            entries,
            None if counts is None else rows(counts),
            None if indices is None else rows(indices),
            window_size,
            scale,
        )

    if blocks == 1:
        return attend(0)[:, :length]
    out = lax.map(attend, jnp.arange(blocks) * block)
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, heads, width)[:, :length]


def _attend_block(q, window, sink, start, entries, counts, indices, window_size, scale):
    length = q.shape[1]
    queries = jnp.arange(length)[:, None]
    keys = jnp.arange(window.shape[1])[None, :]
    in_window = (keys >= queries) & (keys < queries + window_size)
    exists = start[:, None] - (window_size - 1) + keys >= 0
    score = _dot("bqhc,bkc->bhqk", q, window) * scale
    scores = [jnp.where((in_window & exists[:, None])[:, None], score, -jnp.inf)]

    if entries is not None and indices is None:
        visible = jnp.arange(entries.shape[1]) < counts[..., None]
        score = _dot("bqhc,bkc->bhqk", q, entries) * scale
        scores.append(jnp.where(visible[:, None], score, -jnp.inf))
    elif entries is not None:
        selected = jax.vmap(lambda rows, chosen: rows[jnp.maximum(chosen, 0)])(entries, indices)
        score = _dot("bqhc,bqkc->bhqk", q, selected) * scale
        scores.append(jnp.where((indices >= 0)[:, None], score, -jnp.inf))

    sink = sink[None, :, None, None].astype(jnp.float32)
    maximum = sink
    for score in scores:
        maximum = jnp.maximum(maximum, jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = [jnp.exp(score - maximum) for score in scores]
    total = jnp.exp(sink - maximum) + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    out = _dot("bhqk,bkc->bqhc", weights[0].astype(q.dtype), window)
    if entries is not None and indices is None:
        out += _dot("bhqk,bkc->bqhc", weights[1].astype(q.dtype), entries)
    elif entries is not None:
        out += _dot("bhqk,bqkc->bqhc", weights[1].astype(q.dtype), selected)
    return (out / jnp.moveaxis(total, 1, 2)).astype(q.dtype)


def _dot(equation, a, b):
    b = b.astype(a.dtype)
    if current_chip() is None:
        # XLA's CPU backend lacks some bfloat16 products with float32 results; in float32 the same products are exact.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=dot_precision(a.dtype), preferred_element_type=jnp.float32)
