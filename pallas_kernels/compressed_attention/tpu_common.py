"""What the two TPU kernels of ``compressed_attention`` share: their plan, the window's rows, the running softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import unpack_words

LANES = 128
SUBLANES = 8
ROW_TILE = 16
"""Rows of a bfloat16 tile; blocks of rows begin and end at multiples of it."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes, the numbers that a tuner sweeps; none of them may depend on the batch or on a cache's capacity.

    ``decode_queries``: up to so many queries per row the whole window is one block of keys. ``query_block``: beyond
    that, queries that share the window rows of two such blocks; at least window_size - 1. ``heads``: heads per step of
    the dense kernel in prefill. ``product_rows``: query-heads of one matrix product. ``entries``: compressed entries
    per turn of the loop. ``chunk``: consecutive entries per transfer (dense). ``group``: single-entry transfers per
    wait (gather).
    """

    decode_queries: int = 16
    query_block: int = 128
    heads: int = 16
    product_rows: int = 256
    entries: int = 512
    chunk: int = 64
    group: int = 16


CANDIDATES = (
    Tiles(),
    *(
        Tiles(product_rows=rows, entries=entries, chunk=chunk, group=group, heads=heads)
        for rows, heads in ((128, 16), (256, 16), (256, 8), (512, 32))
        for entries in (256, 512, 1024)
        for chunk, group in ((32, 8), (64, 16), (128, 32))
        if (rows, heads, entries, chunk) != (256, 16, 512, 64)
    ),
)
"""What a tuner may try; too large ones are refused by the compiler."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: sizes, the source of the window rows, block sizes.

    ``source`` is "ring" (the cache's ring and the S new rows), "whole" (all rows of all queries in one array) or
    "blocks" (prefill: the rows before the call and the S new rows, two query blocks at a time). ``entry_rows`` is T of
    the cache, 0 where there are no entries; ``columns``: they are ``KVColumns``, whose codes a chip with ``native_fp8``
    converts itself; ``rope_dims``: those of a row where they are ``KVWords``, else 0. ``partial`` softmaxes are not
    divided by their sums.
    """

    batch: int
    length: int
    heads: int
    width: int
    dtype: Any
    window_size: int
    scale: float
    source: str
    ring_rows: int
    entry_rows: int
    entry_dtype: Any
    query_block: int
    head_block: int
    product_rows: int
    block: int
    chunk: int
    group: int
    columns: bool = False
    rope_dims: int = 0
    native_fp8: bool = False
    cores: int = 1
    interpreted: bool = False
    partial: bool = False

    @property
    def query_blocks(self) -> int:
        """Blocks of queries per batch row."""
        return -(-self.length // self.query_block)

    @property
    def head_blocks(self) -> int:
        """Blocks of heads."""
        return self.heads // self.head_block

    @property
    def window_rows(self) -> int:
        """Rows of the window scratch, a multiple of ``ROW_TILE``."""
        if self.source == "ring":
            return _round_up(self.ring_rows) + _round_up(self.length)
        if self.source == "whole":
            return _round_up(self.window_size - 1 + self.length)
        return 2 * self.query_block

    @property
    def entry_width(self) -> int:
        """Elements of a row of stored entries: c, or c/2 words, or c/4 of ``KVWords``."""
        if self.rope_dims:
            return self.width // 4
        return self.width // 2 if self.entry_dtype == jnp.uint32 else self.width


def results(plan: Plan, block: tuple[int, int], index: Any) -> tuple[list[pl.BlockSpec], list[jax.ShapeDtypeStruct]]:
    """Block specs and shapes of what a kernel writes for (queries, heads) at ``index``.

    That is the attention; or of a partial softmax the float32 sum of values, then largest score and sum of weights in
    the first two of ``LANES`` channels.
    """
    kinds = [(plan.width, jnp.float32), (LANES, jnp.float32)] if plan.partial else [(plan.width, plan.dtype)]
    size = (plan.batch, plan.length, plan.heads)
    return (
        [pl.BlockSpec((1, *block, channels), index) for channels, _ in kinds],
        [jax.ShapeDtypeStruct((*size, channels), dtype) for channels, dtype in kinds],
    )


def finished(plan: Plan, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """What a kernel writes of a running softmax [M, ...], in the order of ``results``."""
    high, total, acc = state
    if plan.partial:
        return acc, jnp.where(iota(LANES, 1) == 0, high, total)
    return ((acc / total).astype(plan.dtype),)


def _round_up(rows: int) -> int:
    return -(-rows // ROW_TILE) * ROW_TILE


def iota(count: int, axis: int) -> jax.Array:
    """0 .. count - 1 along one axis of two; the other has size 1."""
    return lax.broadcasted_iota(jnp.int32, (count, 1) if axis == 0 else (1, count), axis)


def key_positions(plan: Plan, row: jax.Array, start: jax.Array, query_block: jax.Array | int) -> jax.Array:
    """Token position of rows of the window scratch; negative where a row holds no key.

    The one statement of what lies where, for masks of scores and of values alike.
    """
    if plan.source == "whole":
        rows = plan.window_size - 1 + plan.length
        return jnp.where(row < rows, start - (plan.window_size - 1) + row, -1)
    if plan.source == "ring":
        newest = lax.rem(lax.rem(start - 1, plan.ring_rows) + plan.ring_rows, plan.ring_rows)
        age = newest - row + jnp.where(row > newest, plan.ring_rows, 0)
        old = jnp.where(row < plan.ring_rows, start - 1 - age, -1)
        new = row - _round_up(plan.ring_rows)
        return jnp.where(new < 0, old, jnp.where(new < plan.length, start + new, -1))
    index = (query_block - 1) * plan.query_block + row
    return jnp.where(index < plan.length, start + index, -1)


def fill_window(plan: Plan, refs: tuple, scratch: Any, start: jax.Array, query_block: jax.Array | int) -> None:
    """Brings the window's rows into ``scratch``, zero where there is no key: 0 * NaN would poison the values.

    ``refs``: ring [1,1,R,c] and new [1,S,c]; or whole [1,W-1+S,c]; or before [1,Q,c], previous and own [1,Q,c].
    """

    def put(offset, rows):
        count = rows.shape[0]
        positions = key_positions(plan, iota(count, 0) + offset, start, query_block)
        # Selected in float32, whose masks every generation has.
        kept = jnp.where(positions >= 0, rows.astype(jnp.float32), 0.0)
        scratch[pl.ds(offset, count), :] = kept.astype(scratch.dtype)

    if plan.source == "blocks":
        before, previous, own = refs
        size = plan.query_block

        @pl.when(query_block == 0)
        def _():
            put(0, before[0])

        @pl.when(query_block > 0)
        def _():
            put(0, previous[0])

        put(size, own[0])
        return
    scratch[...] = jnp.zeros_like(scratch)
    if plan.source == "ring":
        ring, new = refs
        put(0, ring[0, 0])
        put(_round_up(plan.ring_rows), new[0])
    else:
        put(0, refs[0][0])


def unpack(plan: Plan, stored: jax.Array, rows: jax.Array | int) -> jax.Array:
    """Stored entries [n, entry_width] to keys [n, c]; those from ``rows`` on become zero, whatever they hold."""
    kept = jnp.where(iota(stored.shape[0], 0) < rows, stored, jnp.zeros_like(stored))
    return unpack_words(kept) if plan.entry_dtype == jnp.uint32 else kept.astype(plan.dtype)


def softmax_begin(sink: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(maximum, total, accumulator) of no keys at all: the sink [M, 1] is the maximum and has counted as one."""
    return sink, jnp.ones_like(sink), jnp.zeros((sink.shape[0], width), jnp.float32)


def softmax_add(
    plan: Plan,
    state: tuple[jax.Array, jax.Array, jax.Array],
    q: jax.Array,
    keys: jax.Array,
    visible: list[jax.Array],
    channels: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds keys [K, c] (``channels``: the axis of c), values at once, to the running softmax of query-heads q [M, c].

    ``visible`` holds one mask [1, K] per query; the M rows are their heads, query by query. A block without a visible
    key leaves the state as it is, bit for bit. Products take q's type and accumulate in float32.
    """
    high, total, acc = state
    heads = q.shape[0] // len(visible)
    scores = _product(plan, q, keys, channels)
    parts = [
        jnp.where(mask, scores[i * heads : (i + 1) * heads] * plan.scale, -jnp.inf) for i, mask in enumerate(visible)
    ]
    scores = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
    highest = jnp.maximum(high, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - highest)
    shrink = jnp.exp(high - highest)
    values = _product(plan, weights.astype(keys.dtype), keys, 1 - channels)
    return highest, total * shrink + jnp.sum(weights, axis=1, keepdims=True), acc * shrink + values


def _product(plan: Plan, a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [M, n] times b, contracted over ``axis`` of b, accumulated in float32."""
    if plan.interpreted:
        # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def in_window(plan: Plan, key_position: jax.Array, query_position: jax.Array) -> jax.Array:
    """Which keys a query may see: the last ``window_size`` tokens, itself among them."""
    behind = query_position - key_position
    return (key_position >= 0) & (behind >= 0) & (behind < plan.window_size)


def compiler_params(plan: Plan) -> pltpu.CompilerParams:
    """The first grid axis is one step per core; the second carries prefetches from step to step."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel" if plan.cores > 1 else "arbitrary", "arbitrary"),
        vmem_limit_bytes=48 << 20,
    )
