"""Attention over entries that are split over devices: each attends to its own, then the parts are one softmax."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.cache import ring_read
from pallas_kernels import shares

PART_NUMBERS = 1 << 24
"""Float32 numbers of a device's parts (64 MiB) that queries are taken in blocks for; a few copies of them are made."""

_QUERY_BLOCK = 128
"""Blocks are multiples of this, as kernels and twin cut queries too, so that a query meets the same arithmetic."""


def split_attention(partial, *, q, window, start, counts, indices, window_size, first_entries=None, **arguments):
    """See ``pallas_kernels.compressed_attention.compressed_attention``; ``partial`` is as ``xla.partial_attention``."""
    per_query = {"q": q, "counts": counts, "indices": indices, "first_entries": first_entries}
    per_query["window_counts"] = arguments.pop("window_counts", None)
    per_query = {name: a for name, a in per_query.items() if a is not None}
    run = functools.partial(_attend, partial, window_size=window_size, **arguments)
    length = q.shape[1]
    block = _block(q)
    if block >= length:
        return run(window=window, start=start, **per_query)

    history = window_size - 1
    if (ring := arguments["ring"]) is not None:
        before = ring_read(ring, arguments["layer"], start, history, window.dtype)
        window = jnp.concatenate([before, window], axis=1)
    blocks = -(-length // block)
    # Queries that fill the last block see nothing that is not a number, and are dropped.
    padded = {"window": window, **per_query}
    padded = {
        n: jnp.pad(a, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (a.ndim - 2)) for n, a in padded.items()
    }

    def attend(index):
        def cut(name, a):
            size = block + history if name == "window" else block
            return lax.dynamic_slice_in_dim(a, index * block, size, axis=1)

        return run(start=start + index * block, **{name: cut(name, a) for name, a in padded.items()}, ring=None)

    out = jnp.moveaxis(lax.map(attend, jnp.arange(blocks, dtype=start.dtype)), 0, 1)
    return out.reshape(q.shape[0], blocks * block, *q.shape[2:])[:, :length]


def _block(q: jax.Array) -> int:
    """Queries per row of q [B, S, H, c] to take at once."""
    length, per_query = q.shape[1], q.shape[0] * q.shape[2] * (q.shape[3] + 2)
    if length * per_query <= PART_NUMBERS:
        return length
    block = max(1, PART_NUMBERS // (_QUERY_BLOCK * per_query)) * _QUERY_BLOCK
    return next((b for b in range(block, 0, -_QUERY_BLOCK) if length % b == 0), block)


def _attend(partial, *, q, window, sink, start, entries, entries_over, window_size, **arguments):
    """``split_attention`` of queries whose parts may be in memory at once; absent arguments are left out."""
    rows = entries.shape[2]
    shard = lax.axis_index(entries_over)
    first = shard * rows
    indices = arguments.pop("indices", None)
    if indices is not None:
        own = (indices >= first) & (indices < first + rows)
        # Own ones first: kernels fetch nothing behind the last.
        indices = -jnp.sort(jnp.where(own, first - indices, 1), axis=-1)
    if "first_entries" in arguments:
        arguments["first_entries"] = arguments["first_entries"] - first
    arguments["counts"] = jnp.clip(arguments["counts"] - first, 0, rows)
    part = partial(
        q=q,
        window=window,
        # The window counts once. To the other devices all of it lies before the sequence.
        start=jnp.where(shard == 0, start, -window_size - q.shape[1]),
        entries=entries,
        indices=indices,
        window_size=window_size,
        **arguments,
    )
    part = jnp.concatenate(part, axis=-1).reshape(-1, q.shape[-1] + 2)
    sinks = jnp.broadcast_to(sink.astype(jnp.float32), q.shape[:-1]).reshape(-1, 1)
    return shares.joined(functools.partial(_one, q.dtype), part, entries_over, sinks).reshape(q.shape)


def _one(dtype: jnp.dtype, parts: jax.Array, sinks: jax.Array) -> jax.Array:
    """One softmax of parts [n, R, c + 2] (values, largest score, sum of weights) and the sinks [R, 1]: [R, c].

    The order of summation is that of the devices, whatever else is in the call.
    """
    values, largest, total = jnp.split(parts, [parts.shape[-1] - 2, parts.shape[-1] - 1], axis=-1)
    maximum = jnp.maximum(jnp.max(largest, axis=0), sinks)
    weights = jnp.exp(largest - maximum)
    out = jnp.sum(weights * values, axis=0) / (jnp.sum(weights * total, axis=0) + jnp.exp(sinks - maximum))
    return out.astype(dtype)
