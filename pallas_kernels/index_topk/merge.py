"""Top-k over keys that are split over devices: each ranks its own, and every device merges the same lists."""

import jax.numpy as jnp
from jax import lax


def split_topk(ranked, *, q, weights, keys, counts, first_entries, layer, k, sum_over, keys_over):
    """See ``pallas_kernels.index_topk.index_topk``; ``ranked`` gives (scores, indices) of this device's keys."""
    rows = keys.shape[2]
    first = lax.axis_index(keys_over) * rows
    scores, indices = ranked(
        q,
        weights,
        keys,
        jnp.clip(counts - first, 0, rows),
        first_entries=None if first_entries is None else first_entries - first,
        layer=layer,
        k=k,
        sum_over=sum_over,
    )
    indices = jnp.where(indices >= 0, indices + first, -1)
    # One exchange: scores travel as the integers that their bits are.
    lists = jnp.stack([lax.bitcast_convert_type(scores, jnp.int32), indices])
    lists = jnp.moveaxis(lax.all_gather(lists, keys_over), 0, -2)
    scores, indices = lists.reshape(*lists.shape[:-2], -1)
    scores = lax.bitcast_convert_type(scores, jnp.float32)
    # Lists lie in the order of their keys, equal scores within one in that of their indices: what comes first wins.
    _, places = lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.take_along_axis(indices, places, axis=-1)
