"""Seconds per call, what this device's memory and products give at most, and arrays of any size to measure with."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_v4.formats import from_bytes


def timed(function: Callable, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Seconds of one call, its results ready when ``wait`` returns."""
    begin = time.perf_counter()
    wait(function())
    return time.perf_counter() - begin


def seconds_per_call(
    function: Callable,
    arguments: Sequence[tuple],
    *,
    samples: int = 7,
    sample_seconds: float = 0.05,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """Seconds of a call: the median of ``samples``, each of as many calls in a row as take ``sample_seconds``.

    The calls go through ``arguments`` in turn: sets of equal shapes that are together larger than a cache are each
    found in memory. The first round, which compiles, is not counted. A device works through a row of calls without
    waiting for the host, as it does in a model: only the last one is waited for.
    """
    for each in arguments:
        wait(function(*each))
    once = timed(lambda: function(*arguments[0]), wait)
    calls = max(1, min(1000, math.ceil(sample_seconds / max(once, 1e-9))))

    def sample() -> Any:
        for index in range(calls):
            out = function(*arguments[index % len(arguments)])
        return out

    return statistics.median(timed(sample, wait) for _ in range(samples)) / calls


def copy_bandwidth(elements: int = 1 << 26) -> float:
    """Bytes per second read and written by an addition over an array far larger than any cache: what memory gives."""
    x = jnp.zeros(elements, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - begin)
    return 2 * x.nbytes / min(seconds)


def matmul_rate(size: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> float:
    """Operations per second of a square product: what the device's products give."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / seconds_per_call(product, [(matrix, matrix)])


def arrays_like(abstract: Any, seed: int) -> Any:
    """Arrays on the device for a tree of shapes and types: numbers in [-1, 1), integers 0.

    Bytes are any, E8M0 scales between 2^-9 and 1, and uint32 are words of two bfloat16 numbers. Every element is a
    function of its place: nothing but the array itself is ever in memory.
    """
    leaves, tree = jax.tree.flatten(abstract)
    return jax.tree.unflatten(tree, [_filled(leaf, seed + 7919 * i) for i, leaf in enumerate(leaves)])


def _filled(leaf: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    shape, dtype = leaf.shape, np.dtype(leaf.dtype)

    def bits(salt: int) -> jax.Array:
        mixed = jnp.full(shape, (seed + salt) & 0xFFFFFFFF, jnp.uint32)
        for axis in range(len(shape)):
            mixed = (mixed ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
            mixed = mixed ^ (mixed >> 15)
        return mixed * jnp.uint32(0x85EBCA6B)

    def numbers(salt: int) -> jax.Array:
        return (bits(salt) >> 8).astype(jnp.float32) * 2.0**-23 - 1

    @jax.jit
    def fill() -> jax.Array:
        if dtype == np.uint8:
            return (bits(1) >> 24).astype(jnp.uint8)
        if dtype == np.uint32:
            low, high = (jax.lax.bitcast_convert_type(numbers(salt), jnp.uint32) for salt in (1, 2))
            return low >> 16 | (high & jnp.uint32(0xFFFF0000))
        if dtype == ml_dtypes.float8_e8m0fnu:
            return from_bytes((118 + (bits(1) >> 24) % 10).astype(jnp.uint8), dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            return numbers(1).astype(dtype)
        return jnp.zeros(shape, dtype)

    return fill()
