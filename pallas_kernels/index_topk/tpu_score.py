"""Scores of a chunk of keys in fast memory, for the TPU kernel of ``index_topk``; the plan of a call.

Bits of a score depend on its query and key alone: products of a head are one contraction over the whole width, and
heads are added in one order, whatever else a step scores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.execution import dot_precision
from pallas_kernels.index_topk.tpu_place import keep
from pallas_kernels.index_topk.tpu_search import CHUNK, LANES, LOWEST, SUBLANES, Memory, Selection, positions


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: sizes, block sizes; ``heads`` filled up to whole tiles.

    A unit of work is a block of ``queries`` of one row of the batch; ``rows`` units make a step.
    """

    batch: int
    length: int
    heads: int
    width: int
    dtype: Any
    entries: int
    queries: int
    rows: int
    cores: int
    slots: int
    selection: Selection
    interpreted: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of queries per batch row."""
        return -(-self.length // self.queries)

    @property
    def units(self) -> int:
        """Units of work."""
        return self.batch * self.blocks

    @property
    def steps(self) -> int:
        """Steps of all cores; the last one may lack units."""
        return -(-self.units // self.rows)

    @property
    def remainder(self) -> int:
        """Keys of the last chunk, if it is not a whole one."""
        return self.entries % CHUNK


def spread_weights(p: Plan, weights, spread) -> None:
    """weights [rows, Q, H] to [rows * Q * H, 128]: a head's weight on all lanes of its row."""
    shape = (p.heads, p.heads)
    diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)
    for query in range(p.rows * p.queries):
        unit, own = divmod(query, p.queries)
        row = jnp.where(diagonal, weights[unit, own : own + 1, :], 0.0)
        column = jnp.sum(row, axis=1, keepdims=True)
        spread[query * p.heads : (query + 1) * p.heads, :] = jnp.broadcast_to(column, (p.heads, LANES))


def score_chunk(p: Plan, unit, chunk, counts, q, spread, stored: tuple[jax.Array, int], memory: Memory) -> None:
    """Scores of a chunk of 1,024 keys (``chunk_of_keys``) as integers in their order; ``LOWEST``: not seen."""
    rows = q[unit].reshape(p.queries * p.heads, p.width)
    keys, channels = stored
    keys = keys.astype(rows.dtype)
    first = pl.multiple_of(unit * (p.queries * p.heads), p.heads)
    if p.interpreted:
        # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
        rows, keys = rows.astype(jnp.float32), keys.astype(jnp.float32)
    products = lax.dot_general(
        rows,
        keys,
        (((1,), (channels,)), ((), ())),
        precision=dot_precision(rows.dtype),
        preferred_element_type=jnp.float32,
    )

    def weighted(query: int, lane: int) -> jax.Array:
        """Sums of every eighth head [8, 128]: in one order, whatever the number of queries."""
        heads = range(query * p.heads, (query + 1) * p.heads, SUBLANES)
        return functools.reduce(
            jnp.add,
            (
                jnp.maximum(products[row : row + SUBLANES, lane : lane + LANES], 0.0)
                * spread[pl.ds(first + row, SUBLANES), :]
                for row in heads
            ),
        )

    index = chunk * CHUNK + positions()
    for query in range(p.queries):
        total = _summed_rows([weighted(query, lane) for lane in range(0, CHUNK, LANES)])
        # A negative weight times relu 0 is -0, which must tie with 0 and not rank below it.
        bits = lax.bitcast_convert_type(jnp.where(total == 0, 0.0, total), jnp.int32)
        bits = mirrored(bits)
        at = unit * p.queries + query
        keep(p.selection, memory, at, chunk, jnp.where(index < counts[0, 0, at], bits, LOWEST))


def mirrored(bits: jax.Array) -> jax.Array:
    """Bits of float32 numbers as integers in the numbers' order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _summed_rows(tiles: list[jax.Array]) -> jax.Array:
    """The sum over the rows of each of eight tiles [8, 128], as the rows of one: two tiles fold into one, thrice."""
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    by = SUBLANES // 2
    while by:
        first = (row & by) == 0
        pairs = zip(tiles[:by], tiles[by:], strict=True)
        tiles = [jnp.where(first, a + pltpu.roll(a, SUBLANES - by, 0), b + pltpu.roll(b, by, 0)) for a, b in pairs]
        by //= 2
    return tiles[0]
