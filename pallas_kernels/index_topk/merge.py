"""Top-k where heads or keys are split over devices, from a function that ranks the keys of one device.

Keys: each device ranks its own, and the lists of a query are merged by one device, or by all if they are few. Heads: a
kernel compares scores where they are made, so they must be whole; queries are small, so every device gets all heads and
does its share of the queries.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shares


def kernel_topk(ranked: Callable, *, sum_over: tuple[str, ...] = (), keys_over: tuple[str, ...] = (), **arguments):
    """``index_topk`` by a kernel ``ranked``, which gives (scores, indices) and neither splits heads nor keys."""

    def selected(**arguments):
        return ranked(**arguments)[1]

    if keys_over:
        selected = functools.partial(split_topk, ranked, keys_over=keys_over)
    if sum_over:
        return whole_heads(selected, **arguments, sum_over=sum_over)
    return selected(**arguments)


def twin_topk(ranked: Callable, *, sum_over: tuple[str, ...] = (), **arguments):
    """``index_topk`` by the twin, which can add up partial scores: where queries do not divide, heads stay split."""
    if sum_over and _shared(arguments["q"], sum_over) is None:
        ranked = functools.partial(ranked, sum_over=sum_over)
        sum_over = ()
    return kernel_topk(ranked, sum_over=sum_over, **arguments)


def _shared(q: jax.Array, sum_over: tuple[str, ...]) -> int | None:
    """The axis of queries [B, S, H, d] that is shared out among the devices that have a part of the heads each."""
    return next((axis for axis in (1, 0) if q.shape[axis] % lax.axis_size(sum_over) == 0), None)


def whole_heads(selected: Callable, *, q, weights, keys, counts, layer, k, sum_over, **rest):
    """What ``selected`` gives for queries whose heads are split over ``sum_over``, the same on every device.

    Queries [B, S] are shared along S, else along B where ``selected`` begins with row ``first_row`` of the keys; if
    neither divides, every device does all of them.
    """
    devices, device = lax.axis_size(sum_over), lax.axis_index(sum_over)
    axis = _shared(q, sum_over)
    if axis is None:
        q, weights = _together(q, weights, lambda a: lax.all_gather(a, sum_over, axis=2, tiled=True))
        return selected(q=q, weights=weights, keys=keys, counts=counts, layer=layer, k=k, **rest)
    q, weights = _together(q, weights, lambda a: lax.all_to_all(a, sum_over, axis, 2, tiled=True))
    share = counts.shape[axis] // devices
    counts = lax.dynamic_slice_in_dim(counts, device * share, share, axis)
    if (first := rest.get("first_entries")) is not None:
        rest["first_entries"] = lax.dynamic_slice_in_dim(first, device * share, share, axis)
    if axis == 0:
        rest["first_row"] = device * share
    found = selected(q=q, weights=weights, keys=keys, counts=counts, layer=layer, k=k, **rest)
    return jax.tree.map(lambda a: lax.all_gather(a, sum_over, axis=axis, tiled=True), found)


def _together(q: jax.Array, weights: jax.Array, exchange: Callable) -> tuple[jax.Array, jax.Array]:
    """Queries [B, S, H, d] and their weights [B, S, H] in one exchange, as the integers that their bits are."""
    word = jnp.dtype(f"uint{8 * q.dtype.itemsize}")
    weights = weights.astype(jnp.float32)
    bits = lax.bitcast_convert_type(weights, word).reshape(*weights.shape, -1)
    bits = exchange(jnp.concatenate([lax.bitcast_convert_type(q, word), bits], axis=-1))
    q_bits, bits = jnp.split(bits, [q.shape[-1]], axis=-1)
    bits = bits if bits.shape[-1] > 1 else bits[..., 0]
    return lax.bitcast_convert_type(q_bits, q.dtype), lax.bitcast_convert_type(bits, jnp.float32)


def split_topk(ranked, *, q, weights, keys, counts, layer, k, keys_over, first_entries=None, **rest):
    """See ``pallas_kernels.index_topk.index_topk``; ``ranked`` gives (scores, indices) of this device's keys."""
    rows = keys.shape[2]
    first = lax.axis_index(keys_over) * rows
    if first_entries is not None:
        rest["first_entries"] = first_entries - first
    counts = jnp.clip(counts - first, 0, rows)
    scores, indices = ranked(q=q, weights=weights, keys=keys, counts=counts, layer=layer, k=k, **rest)
    indices = jnp.where(indices >= 0, indices + first, -1)
    # One exchange: scores travel as the integers that their bits are.
    lists = jnp.concatenate([lax.bitcast_convert_type(scores, jnp.int32), indices], axis=-1)
    lists = lists.reshape(-1, lists.shape[-1])
    return shares.joined(functools.partial(_best, k), lists, keys_over).reshape(*counts.shape, -1)


def _best(k: int, lists: jax.Array) -> jax.Array:
    """The best of lists [n, R, 2 K] (bits of scores, indices) of n ranges of keys in their order: [R, min(k, n K)]."""
    bits, indices = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in jnp.split(lists, 2, axis=-1))
    scores = lax.bitcast_convert_type(bits, jnp.float32)
    # Lists lie in the order of their keys, equal scores within one in that of their indices: what comes first wins.
    _, places = lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.take_along_axis(indices, places, axis=-1)
