"""What an engine keeps on its devices: the caches of its slots and one row of settings and progress per slot."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import DictKey

from deepseek_v4.engine.requests import MAX_STOP_IDS, Request
from deepseek_v4.model import Model
from deepseek_v4.sampling import Sampling

State = dict[str, Any]
"""``cache`` as in ``model``, and ``rows``, a dict of arrays [B, ...] (see ``empty_rows``)."""


def empty_rows(count: int) -> dict[str, Any]:
    """Rows that nobody uses, as host arrays.

    ``token`` int32: the last token, not run yet; ``count`` int32: tokens sampled so far; ``done`` bool; ``limit``
    int32: most tokens to sample; ``stop_ids`` int32 [B, 8], -1 for none; ``logprobs`` bool; ``sampling``.
    """
    return {
        "token": np.zeros(count, np.int32),
        "count": np.zeros(count, np.int32),
        "done": np.ones(count, bool),
        "limit": np.zeros(count, np.int32),
        "stop_ids": np.full((count, MAX_STOP_IDS), -1, np.int32),
        "logprobs": np.zeros(count, bool),
        "sampling": Sampling.of([(0.0, 1.0, 0, 0.0, 0, 0)] * count),
    }


def request_rows(requests: Sequence[Request | None], eos_token_id: int) -> dict[str, Any]:
    """Rows of the given requests before their first sampled token; None leaves a row empty."""
    rows = empty_rows(len(requests))
    for row, request in enumerate(requests):
        if request is None:
            continue
        rows["count"][row] = len(request.generated)
        rows["done"][row] = False
        rows["limit"][row] = request.max_new_tokens
        stops = (eos_token_id, *request.stop_ids)
        rows["stop_ids"][row, : len(stops)] = stops
        rows["logprobs"][row] = request.logprobs is not None
        settings = (request.temperature, request.top_p, request.top_k, request.min_p, request.seed, request.stream)
        for column, value in zip(rows["sampling"], settings, strict=True):
            column[row] = value
    return rows


def empty_state(model: Model, slots: int, max_length: int, rollback: int) -> State:
    """A state of empty slots, placed as the compiled steps return it, or they would be compiled twice."""
    cache, rows = model.init_cache(slots, max_length, rollback), empty_rows(slots)
    placement = model.execution.placement
    if placement is None:
        return jax.device_put({"cache": cache, "rows": rows}, jax.devices()[0])

    def put(array):
        sharding = placement.sharding(("batch",) + (None,) * (array.ndim - 1))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {"cache": cache, "rows": jax.tree.map(put, rows)}


def placed(model: Model, state: State) -> State:
    """The state in the layout it came in, so that a step's result is what the next step was compiled for."""
    placement = model.execution.placement
    if placement is None:
        return state

    layout = model.abstract_cache(placement.size("batch"), 1)  # layouts are those of every size
    cache = jax.tree.map(lambda array, as_: lax.with_sharding_constraint(array, as_.sharding), state["cache"], layout)
    rows = jax.tree.map(
        lambda array: placement.constrain(array, ("batch",) + (None,) * (array.ndim - 1)), state["rows"]
    )
    return {"cache": cache, "rows": rows}


def stacked(path) -> bool:
    """Whether a leaf of the state is stacked over layers, so that its rows are its second axis."""
    return any(key in (DictKey("groups"), DictKey("drafts")) for key in path)


def take_row(state: State, row: jax.Array) -> State:
    """One row of a state, as a state of one slot."""
    return jax.tree.map_with_path(
        lambda path, a: lax.dynamic_slice_in_dim(a, row, 1, axis=1 if stacked(path) else 0), state
    )


def put_row(state: State, source: State, row: jax.Array) -> State:
    """``state`` with its slot ``row`` replaced by the only one of ``source``."""
    return jax.tree.map_with_path(
        lambda path, a, new: lax.dynamic_update_slice_in_dim(a, new, row, axis=1 if stacked(path) else 0),
        state,
        source,
    )


def cache_bytes(model: Model, max_length: int, rollback: int) -> int:
    """Bytes of cache of one slot, exactly: what every further slot of a pool adds."""
    leaves = jax.tree.leaves(model.abstract_cache(1, max_length, rollback))
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def cache_growth(model: Model, max_length: int, rollback: int) -> tuple[float, int]:
    """(bytes that each further token of context adds, the fixed bytes) of the cache of one sequence."""
    step = 1 << 20  # whole tiles, on however many devices
    longer, shorter = (cache_bytes(model, length, rollback) for length in (2 * step, step))
    per_token = (longer - shorter) / step
    return per_token, cache_bytes(model, max_length, rollback) - round(per_token * max_length)


def device_cache_bytes(model: Model, slots: int, max_length: int, rollback: int) -> int:
    """Bytes of a pool's cache on each device, after splitting slots and entries over the mesh."""
    placement = model.execution.placement
    if placement is None:
        return slots * cache_bytes(model, max_length, rollback)
    shards = placement.size("batch")
    one_each = jax.tree.leaves(model.abstract_cache(shards, max_length, rollback))
    row = sum(math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize for a in one_each)
    return -(-slots // shards) * row
