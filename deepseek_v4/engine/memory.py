"""Whether a run fits its devices, and which numbers would: from the exact shapes of parameters and caches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.engine.scheduling import Pool, slots_within
from deepseek_v4.engine.state import device_cache_bytes
from deepseek_v4.model import Model

_SPARE = 0.1  # of a device's memory, for what steps compute in between

_GIB = 2.0**30


class DoesNotFit(ValueError):
    """Parameters and caches that are larger than a device's memory; the message names numbers that would fit."""


def device_limit() -> int | None:
    """Bytes that this process may use on one device; None where the backend does not say (CPUs)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if not statistics else statistics.get("bytes_limit")


def parameter_bytes(model: Model) -> int:
    """Bytes of parameters on one device."""
    total = 0
    for leaf in jax.tree.leaves(model.abstract_params()):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize
    return total


def describe_memory(model: Model, pools: Sequence[Pool], drafts: int, limit: int | None) -> str:
    """What parameters and caches take per device, and, with a ``limit``, which pools would fit instead."""
    shards = 1 if model.execution.placement is None else model.execution.placement.size("batch")
    weights = parameter_bytes(model)
    caches = sum(device_cache_bytes(model, pool.slots + shards, pool.max_length, drafts) for pool in pools)
    slots = ", ".join(f"{pool.slots} sequences of {pool.max_length} tokens" for pool in pools)
    text = f"per device, parameters take {weights / _GIB:.2f} GiB and the caches of {slots} {caches / _GIB:.2f} GiB"
    if limit is None:
        return f"{text}; try fewer or shorter sequences"
    text += f", of {limit / _GIB:.2f} GiB"
    room = int(limit * (1 - _SPARE)) - weights
    longest = max(pool.max_length for pool in pools)
    fitting = []
    for length in dict.fromkeys((longest, longest // 2, longest // 4, longest // 16)):
        if length >= 128 and (count := slots_within(model, room, length, drafts)):
            fitting.append(f"{count} of {length} tokens")
    if not fitting:
        return f"{text}; not one sequence would fit: use more devices along expert or tensor"
    return f"{text}; there would be room for {', or '.join(fitting)}"


def check_fits(model: Model, pools: Sequence[Pool], drafts: int, limit: int | None) -> None:
    """Raises ``DoesNotFit`` before anything is allocated, where the backend says how much there is."""
    if limit is None:
        return
    shards = 1 if model.execution.placement is None else model.execution.placement.size("batch")
    caches = sum(device_cache_bytes(model, pool.slots + shards, pool.max_length, drafts) for pool in pools)
    if parameter_bytes(model) + caches > limit:
        raise DoesNotFit(describe_memory(model, pools, drafts, limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device error says that memory ran out."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "Out of memory" in text or "out of memory" in text
