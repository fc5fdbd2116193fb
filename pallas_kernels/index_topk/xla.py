"""The readable twin of ``index_topk``: scores of a block of queries against every key, then one exact top-k."""

import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision

_SCORE_ELEMENTS = 1 << 25  # bounds the [B, block, Hi, T] products should they be materialised


def index_topk(q, weights, keys, counts, *, layer, k, sum_over):
    """See ``pallas_kernels.index_topk.index_topk``."""
    keys = lax.dynamic_index_in_dim(keys, layer, axis=0, keepdims=False).astype(q.dtype)
    batch, length, heads, _ = q.shape
    total = keys.shape[1]

    def select(q, weights, counts):
        products = jnp.einsum(
            "bqhd,bkd->bqhk", q, keys, precision=dot_precision(q.dtype), preferred_element_type=jnp.float32
        )
        scores = jnp.sum(weights.astype(jnp.float32)[..., None] * jnp.maximum(products, 0), axis=2)
        if sum_over:
            scores = lax.psum(scores, sum_over)
        # A negative weight times relu 0 is -0, which must tie with 0 and not rank below it.
        scores = jnp.where(scores == 0, 0.0, scores)
        scores = jnp.where(jnp.arange(total) < counts[..., None], scores, -jnp.inf)
        best, indices = lax.top_k(scores, min(k, total))
        return jnp.where(best > -jnp.inf, indices, -1).astype(jnp.int32)

    block = max(1, min(length, _SCORE_ELEMENTS // (batch * heads * total)))
    blocks = -(-length // block)
    if blocks == 1:
        return select(q, weights, counts)
    padding = blocks * block - length

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, blocks, block, *a.shape[2:]), 1, 0)

    chosen = lax.map(lambda args: select(*args), (split(q), split(weights), split(counts)))
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, blocks * block, -1)[:, :length]
