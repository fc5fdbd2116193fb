"""The readable twin of ``index_topk``: scores of a block of queries against every key, then one exact top-k."""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision
from deepseek_v4.stored_rows import layer_of, unpacked

_SCORE_ELEMENTS = 1 << 25  # bounds the [B, block, Hi, T] products should they be materialised


def ranked_topk(q, weights, keys, counts, *, layer, k, first_entries=None, first_row=None, sum_over=()):
    """What ``index_topk`` selects with its scores: (float32 [B, S, K] in descending order, int32 [B, S, K]).

    With ``first_row`` the queries are those of B rows of the keys from that one on.
    """

    def function(*arguments):
        return _ranked(_scores(*arguments, sum_over), k)

    return _in_blocks(function, q, weights, keys, counts, first_entries, layer, first_row)


def all_scores(q, weights, keys, counts, *, first_entries, layer, sum_over):
    """See ``pallas_kernels.index_topk.index_scores``."""
    # Recomputed in a backward pass: the products of every head are what should never be in memory.
    function = jax.checkpoint(lambda *arguments: _scores(*arguments, sum_over))
    return _in_blocks(function, q, weights, keys, counts, first_entries, layer)


def select(scores, k):
    """The k largest of [B, S, T], ties to the lowest index, -1 for what is not visible."""
    return _ranked(scores, k)[1]


def _ranked(scores, k):
    best, indices = lax.top_k(scores, min(k, scores.shape[-1]))
    return best, jnp.where(best > -jnp.inf, indices, -1).astype(jnp.int32)


def _in_blocks(function, q, weights, keys, counts, first_entries, layer, first_row=None):
    """``function(q, weights, keys, counts, first)`` of blocks of queries, results joined along the queries."""
    keys = layer_of(keys, layer)
    if first_row is not None:
        keys = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first_row, q.shape[0]), keys)
    keys = unpacked(keys, q.dtype).astype(q.dtype)
    batch, length, heads, _ = q.shape
    first = jnp.zeros_like(counts) if first_entries is None else first_entries
    block = max(1, min(length, _SCORE_ELEMENTS // (batch * heads * keys.shape[1])))
    blocks = -(-length // block)
    if blocks == 1:
        return function(q, weights, keys, counts, first)
    padding = blocks * block - length

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, blocks, block, *a.shape[2:]), 1, 0)

    def run(block):
        q, weights, counts, first = block
        return function(q, weights, keys, counts, first)

    out = lax.map(run, (split(q), split(weights), split(counts), split(first)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, blocks * block, -1)[:, :length], out)


def _scores(q, weights, keys, counts, first_entries, sum_over):
    """Scores [B, S, T] float32 of keys [B, T, di], -inf where an entry is not visible."""
    products = jnp.einsum(
        "bqhd,bkd->bqhk", q, keys, precision=dot_precision(q.dtype), preferred_element_type=jnp.float32
    )
    scores = jnp.einsum(
        "bqh,bqhk->bqk", weights.astype(jnp.float32), jnp.maximum(products, 0), precision=lax.Precision.HIGHEST
    )
    if sum_over:
        scores = lax.psum(scores, sum_over)
    # A negative weight times relu 0 is -0, which must tie with 0 and not rank below it.
    scores = jnp.where(scores == 0, 0.0, scores)
    index = jnp.arange(keys.shape[1])
    visible = (index < counts[..., None]) & (index >= first_entries[..., None])
    return jnp.where(visible, scores, -jnp.inf)
