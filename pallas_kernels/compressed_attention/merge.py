"""Attention over entries that are split over devices: each attends to its own, then the parts are one softmax."""

import jax
import jax.numpy as jnp
from jax import lax

_FEW = 1 << 18
"""Numbers of a device's parts of which all get all in one exchange; with more, two exchanges move fewer bytes."""


def split_attention(
    partial,
    *,
    q,
    window,
    sink,
    start,
    entries,
    counts,
    indices,
    window_size,
    entries_over,
    first_entries=None,
    **arguments,
):
    """See ``pallas_kernels.compressed_attention.compressed_attention``; ``partial`` is as ``xla.partial_attention``."""
    rows = entries.shape[2]
    shard = lax.axis_index(entries_over)
    first = shard * rows
    if indices is not None:
        own = (indices >= first) & (indices < first + rows)
        # Own ones first: kernels fetch nothing behind the last.
        indices = -jnp.sort(jnp.where(own, first - indices, 1), axis=-1)
    if first_entries is not None:
        arguments["first_entries"] = first_entries - first
    part = partial(
        q=q,
        window=window,
        # The window counts once. To the other devices all of it lies before the sequence.
        start=jnp.where(shard == 0, start, -window_size - q.shape[1]),
        entries=entries,
        counts=jnp.clip(counts - first, 0, rows),
        indices=indices,
        window_size=window_size,
        **arguments,
    )
    part = jnp.concatenate(part, axis=-1).reshape(-1, q.shape[-1] + 2)
    sinks = jnp.broadcast_to(sink.astype(jnp.float32), q.shape[:-1]).reshape(-1, 1)
    shards = lax.axis_size(entries_over)
    if part.size * shards <= _FEW or part.shape[0] % shards:
        out = _joined(lax.all_gather(part, entries_over), sinks).astype(q.dtype)
        return out.reshape(q.shape)
    # Every device joins the parts of its share of the rows, which is what they all then get.
    share = part.shape[0] // shards
    parts = lax.all_to_all(part.reshape(shards, share, -1), entries_over, split_axis=0, concat_axis=0)
    out = _joined(parts, lax.dynamic_slice_in_dim(sinks, shard * share, share)).astype(q.dtype)
    return lax.all_gather(out, entries_over, tiled=True).reshape(q.shape)


def _joined(parts: jax.Array, sinks: jax.Array) -> jax.Array:
    """One softmax of parts [n, R, c + 2] (values, largest score, sum of weights) and the sinks [R, 1]: [R, c].

    The order of summation is that of the devices, whatever else is in the call.
    """
    values, largest, total = jnp.split(parts, [parts.shape[-1] - 2, parts.shape[-1] - 1], axis=-1)
    maximum = jnp.maximum(jnp.max(largest, axis=0), sinks)
    weights = jnp.exp(largest - maximum)
    return jnp.sum(weights * values, axis=0) / (jnp.sum(weights * total, axis=0) + jnp.exp(sinks - maximum))
