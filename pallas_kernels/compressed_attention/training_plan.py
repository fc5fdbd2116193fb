"""One call of the training kernels of attention: what is static about it, what the kernels read, in which blocks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_attention.multiplicity import multiplicity
from pallas_kernels.compressed_attention.tpu_common import ROW_TILE

MAX_ENTRIES = 4096
"""Entries of a row that fit in VMEM with the float32 sums of their gradients: 16,384 tokens of CSA, 524,288 of HCA."""


@dataclasses.dataclass(frozen=True)
class TrainingTiles:
    """Block sizes. ``queries`` and ``heads`` per step, at least window_size - 1 queries; ``product_rows`` query-heads
    and ``entries`` of one matrix product."""

    queries: int = 128
    heads: int = 16
    product_rows: int = 256
    entries: int = 256


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Everything static about one call: sizes (``blocks`` of queries, ``rows`` of padded entries) and block sizes."""

    batch: int
    length: int
    heads: int
    width: int
    dtype: Any
    window_size: int
    scale: float
    rows: int
    selected: bool
    query_block: int
    head_block: int
    queries: int
    block: int
    cores: int
    interpreted: bool

    @property
    def blocks(self) -> int:
        """Blocks of queries per batch row."""
        return -(-self.length // self.query_block)

    @property
    def head_blocks(self) -> int:
        """Blocks of heads of one core."""
        return self.heads // self.cores // self.head_block

    @property
    def products(self) -> int:
        """Matrix products that the queries and heads of one step are cut into, one behind the other."""
        return self.query_block // self.queries

    @property
    def product_rows(self) -> int:
        """Query-heads of one product."""
        return self.queries * self.head_block

    @property
    def view(self) -> int:
        """Window rows that the queries of one product look at; two blocks hold them."""
        aligned = self.queries % ROW_TILE == 0
        return self.query_block + self.queries if aligned else 2 * self.query_block

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(cores, rows, blocks of queries, blocks of a core's heads)."""
        return self.cores, self.batch, self.blocks, self.head_blocks


class Inputs(NamedTuple):
    """What both kernels read beside queries: padded to whole blocks, and nothing in it that a reader must not touch.

    bounds [B * blocks * 2] int32 are the first block of entries that a block of queries sees and the one after the
    last; limits [B * blocks, 3, query_block] int32 per query the number of window tokens, the first entry and the one
    after the last; window [B, (blocks + 1) * query_block, c], a query's own row one block behind its own place; entries
    [B, rows, c] or None; times [B, S, rows] int16, how often each is selected, or None.
    """

    bounds: jax.Array
    limits: jax.Array
    window: jax.Array
    entries: jax.Array | None
    times: jax.Array | None


def plan_of(q, entries, indices, *, window_size, scale, tiles, cores, interpret) -> TrainingPlan:
    """The plan of a call with queries [B, S, H, c] and entries [n, B, T, c]."""
    batch, length, heads, width = q.shape
    head_block = next(h for h in range(min(tiles.heads, heads), 0, -1) if heads % h == 0)
    if heads // head_block % cores:
        cores = 1
    queries = next(n for n in range(max(1, tiles.product_rows // head_block), 0, -1) if tiles.queries % n == 0)
    total = 0 if entries is None else entries.shape[2]
    return TrainingPlan(
        batch=batch,
        length=length,
        heads=heads,
        width=width,
        dtype=q.dtype,
        window_size=window_size,
        scale=scale,
        rows=-(-total // tiles.entries) * tiles.entries,
        selected=indices is not None,
        query_block=tiles.queries,
        head_block=head_block,
        queries=queries,
        block=tiles.entries,
        cores=cores,
        interpreted=bool(interpret),
    )


def inputs_of(plan: TrainingPlan, window, start, entries, layer, counts, indices, window_counts, first) -> Inputs:
    """``Inputs`` of the public arguments; queries that only fill a block see nothing."""
    p = plan
    padded = p.blocks * p.query_block
    history = p.window_size - 1
    positions = start[:, None] - history + jnp.arange(window.shape[1])
    window = jnp.where(positions[..., None] >= 0, window, 0).astype(p.dtype)
    window = jnp.pad(window, ((0, 0), (p.query_block - history, padded - p.length), (0, 0)))
    exist = jnp.clip(start[:, None] + jnp.arange(p.length) + 1, 0, p.window_size)
    seen = exist if window_counts is None else jnp.clip(window_counts, 0, exist)
    nothing = jnp.zeros((p.batch, p.length), jnp.int32)
    begin = end = nothing
    times = None
    if entries is not None:
        total = entries.shape[2]
        entries = lax.dynamic_index_in_dim(entries, layer, keepdims=False)
        readable = jnp.arange(total) < jnp.max(counts, axis=1, keepdims=True)
        entries = jnp.where(readable[..., None], entries, 0).astype(p.dtype)
        entries = jnp.pad(entries, ((0, 0), (0, p.rows - total), (0, 0)))
        if indices is None:
            begin = nothing if first is None else jnp.maximum(first, 0)
            end = jnp.minimum(counts, total)
        else:
            times = multiplicity(indices, p.rows)
            times = jnp.pad(times, ((0, 0), (0, padded - p.length), (0, 0)))
            begin = jnp.min(jnp.where(indices >= 0, indices, p.rows), axis=-1)
            end = jnp.max(indices, axis=-1) + 1
    some = end > begin
    limits = jnp.stack([seen, jnp.where(some, begin, 0), jnp.where(some, end, 0)], axis=1).astype(jnp.int32)
    limits = jnp.pad(limits, ((0, 0), (0, 0), (0, padded - p.length)))
    limits = limits.reshape(p.batch, 3, p.blocks, p.query_block).swapaxes(1, 2)
    lowest = jnp.min(jnp.where(limits[:, :, 2] > 0, limits[:, :, 1], p.rows), axis=-1)
    highest = jnp.max(limits[:, :, 2], axis=-1)
    bounds = jnp.stack([lowest // p.block, -(-highest // p.block)], axis=-1).reshape(-1)
    return Inputs(bounds, limits.reshape(p.batch * p.blocks, 3, p.query_block), window, entries, times)


def input_specs(plan: TrainingPlan, inputs: Inputs) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
    """Block specs and arrays of ``inputs`` after ``bounds``: limits, previous and own window block, entries, times."""
    p = plan
    size = (1, p.query_block, p.width)
    specs = [
        pl.BlockSpec(
            (1, 3, p.query_block), lambda core, b, i, g, bounds: (b * p.blocks + i, 0, 0), memory_space=pltpu.SMEM
        ),
        pl.BlockSpec(size, lambda core, b, i, g, bounds: (b, i, 0)),
        pl.BlockSpec(size, lambda core, b, i, g, bounds: (b, i + 1, 0)),
    ]
    arrays = [inputs.limits, inputs.window, inputs.window]
    if inputs.entries is not None:
        specs.append(pl.BlockSpec((1, p.rows, p.width), lambda core, b, i, g, bounds: (b, 0, 0)))
        arrays.append(inputs.entries)
    if inputs.times is not None:
        specs.append(pl.BlockSpec((1, p.query_block, p.rows), lambda core, b, i, g, bounds: (b, i, 0)))
        arrays.append(inputs.times)
    return specs, arrays


def query_spec(plan: TrainingPlan) -> pl.BlockSpec:
    """Of arrays [B, S, H, c]."""
    p = plan
    return pl.BlockSpec(
        (1, p.query_block, p.head_block, p.width),
        lambda core, b, i, g, bounds: (b, i, core * p.head_blocks + g, 0),
    )


def head_spec(plan: TrainingPlan) -> pl.BlockSpec:
    """Of arrays [H, 1]."""
    return pl.BlockSpec((plan.head_block, 1), lambda core, b, i, g, bounds: (core * plan.head_blocks + g, 0))


def sums_spec(plan: TrainingPlan) -> pl.BlockSpec:
    """Of the logs of sums [cores, B, S, H / cores]."""
    return pl.BlockSpec(
        (1, 1, plan.query_block, plan.heads // plan.cores), lambda core, b, i, g, bounds: (core, b, i, 0)
    )


def compiler_params(plan: TrainingPlan) -> pltpu.CompilerParams:
    """Heads are dealt to cores; everything else follows in order, whose sums it carries on."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel" if plan.cores > 1 else "arbitrary", "arbitrary", "arbitrary", "arbitrary"),
        vmem_limit_bytes=56 << 20,
    )
