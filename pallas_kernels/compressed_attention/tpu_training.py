"""TPU kernel: attention over whole sequences as training needs it, with the log of every softmax's sum.

Entries of a sequence in training are few (a quarter of its tokens, or less), so that they stay in VMEM while all of its
queries pass, and queries that select among them look at all, each weighed by how often it is selected. One step of the
grid is a block of queries of one row with a block of its heads. Documents packed into a row limit what a query sees.
``tpu_backward`` is the gradient, from the same plan and inputs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.execution import dot_precision
from pallas_kernels.compressed_attention.multiplicity import multiplicity
from pallas_kernels.compressed_attention.tpu_common import ROW_TILE, iota

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


def attention(plan: TrainingPlan, q: jax.Array, sink: jax.Array, inputs: Inputs, *, cost: Any, interpret: Any):
    """(attention [B, S, H, c], log of the softmax's sum [cores, B, S, H / cores] float32), S in whole blocks."""
    p = plan
    specs, arrays = input_specs(p, inputs)
    length = p.blocks * p.query_block
    rows = p.product_rows
    return pl.pallas_call(
        functools.partial(_kernel, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=p.grid,
            in_specs=[head_spec(p), query_spec(p), *specs],
            out_specs=[query_spec(p), sums_spec(p)],
            scratch_shapes=[
                pltpu.VMEM((2 * p.query_block, p.width), p.dtype),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, p.width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((p.batch, length, p.heads, p.width), p.dtype),
            jax.ShapeDtypeStruct((p.cores, p.batch, length, p.heads // p.cores), jnp.float32),
        ],
        compiler_params=compiler_params(p),
        cost_estimate=cost,
        interpret=interpret,
        name="compressed_attention_training",
    )(inputs.bounds, sink.astype(jnp.float32)[:, None], q, *arrays)


def _kernel(plan: TrainingPlan, bounds, sink, q, limits, previous, own, *refs):
    p = plan
    entries, times, refs = split_refs(p, refs)
    out, sums, window, high, total, acc = refs
    g = pl.program_id(3)
    bring_window(p, window, previous, own)
    first, last = entry_blocks(p, bounds)

    def each(product, _):
        at = pl.multiple_of(product * p.queries, p.queries)
        rows = q[0, pl.ds(at, p.queries)].reshape(p.product_rows, p.width)
        sinks = tiled(p, sink[...])
        # The sink has counted as a key without a value.
        high[...], total[...], acc[...] = sinks, jnp.ones_like(sinks), jnp.zeros_like(acc)

        def add(keys, often):
            scores = contract(p, rows, keys, 1, 1) * p.scale
            scores = jnp.where(often > 0, scores, -jnp.inf)
            highest = jnp.maximum(high[...], jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - highest) * often
            shrink = jnp.exp(high[...] - highest)
            high[...] = highest
            total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            acc[...] = acc[...] * shrink + contract(p, weights.astype(keys.dtype), keys, 1, 0)

        add(window[window_rows(p, at), :], in_window(p, limits, at))

        def visit(block, _):
            add(entries[0, entry_rows(p, block), :], selected(p, limits, times, at, block))

        if p.rows:
            lax.fori_loop(first, last, visit, None)
        out[0, pl.ds(at, p.queries)] = (acc[...] / total[...]).astype(p.dtype).reshape(p.queries, p.head_block, p.width)
        write_columns(p, sums, at, g, high[...] + jnp.log(total[...]))

    lax.fori_loop(0, p.products, each, None)


# --- what the two kernels share inside -------------------------------------------------------------------------------


def split_refs(plan: TrainingPlan, refs: tuple) -> tuple[Any, Any, tuple]:
    """(entries or None, times or None, the rest)."""
    entries, refs = (refs[0], refs[1:]) if plan.rows else (None, refs)
    times, refs = (refs[0], refs[1:]) if plan.rows and plan.selected else (None, refs)
    return entries, times, refs


def entry_blocks(plan: TrainingPlan, bounds: Any) -> tuple[jax.Array, jax.Array]:
    """The first block of entries that this block of queries sees, and the one after the last."""
    flat = pl.program_id(1) * plan.blocks + pl.program_id(2)
    return bounds[2 * flat], bounds[2 * flat + 1]


def bring_window(plan: TrainingPlan, window: Any, previous: Any, own: Any) -> None:
    """The two blocks of window rows that the queries of a block see, one behind the other, once for all heads."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        window[: plan.query_block, :] = previous[0]
        window[plan.query_block :, :] = own[0]


def window_rows(plan: TrainingPlan, at: jax.Array) -> Any:
    """Which of these rows the queries from ``at`` on look at."""
    return pl.ds(at, plan.view) if plan.view < 2 * plan.query_block else slice(None)


def entry_rows(plan: TrainingPlan, block: jax.Array) -> Any:
    """The entries of a block."""
    return pl.ds(pl.multiple_of(block * plan.block, plan.block), plan.block)


def in_window(plan: TrainingPlan, limits: Any, at: jax.Array) -> jax.Array:
    """1.0 where a query-head sees a window row, else 0.0: [product_rows, view]."""
    p = plan
    first = at if p.view < 2 * p.query_block else 0

    def of(query):
        back = (at + query + p.query_block) - (first + iota(p.view, 1))
        return (back >= 0) & (back < limits[0, 0, at + query])

    return _by_query(p, [jnp.where(of(query), 1.0, 0.0) for query in range(p.queries)])


def selected(plan: TrainingPlan, limits: Any, times: Any, at: jax.Array, block: jax.Array) -> jax.Array:
    """How often a query-head sees an entry of a block: [product_rows, block] float32."""
    p = plan
    if times is not None:
        found = times[0, pl.ds(at, p.queries), entry_rows(p, block)].astype(jnp.int32).astype(jnp.float32)
        return _by_query(p, [found[query : query + 1] for query in range(p.queries)])
    entry = block * p.block + iota(p.block, 1)

    def of(query):
        return (entry >= limits[0, 1, at + query]) & (entry < limits[0, 2, at + query])

    return _by_query(p, [jnp.where(of(query), 1.0, 0.0) for query in range(p.queries)])


def _by_query(plan: TrainingPlan, rows: list[jax.Array]) -> jax.Array:
    """Rows [1, K] of queries, for every head of theirs."""
    return jnp.concatenate([jnp.broadcast_to(row, (plan.head_block, row.shape[1])) for row in rows], axis=0)


def tiled(plan: TrainingPlan, of_heads: jax.Array) -> jax.Array:
    """[head_block, 1] for every query of a product: [product_rows, 1]."""
    return jnp.concatenate([of_heads] * plan.queries, axis=0) if plan.queries > 1 else of_heads


def _diagonal(plan: TrainingPlan, g: jax.Array) -> jax.Array:
    """Which of the heads on lanes a head of block ``g`` on sublanes is."""
    return iota(plan.heads // plan.cores, 1) == g * plan.head_block + iota(plan.head_block, 0)


def read_columns(plan: TrainingPlan, sums: Any, at: jax.Array, g: jax.Array) -> jax.Array:
    """The logs of sums of a product's query-heads, turned from lanes to sublanes: [product_rows, 1]."""
    found = sums[0, 0, pl.ds(at, plan.queries), :]
    mine = _diagonal(plan, g)
    return jnp.concatenate(
        [
            jnp.sum(jnp.where(mine, found[query : query + 1], 0.0), axis=1, keepdims=True)
            for query in range(plan.queries)
        ],
        axis=0,
    )


def write_columns(plan: TrainingPlan, sums: Any, at: jax.Array, g: jax.Array, column: jax.Array) -> None:
    """The opposite: [product_rows, 1] to the lanes of head block ``g``, the others left as they are."""
    p = plan
    mine = _diagonal(p, g)
    rows = [
        jnp.sum(jnp.where(mine, column[query * p.head_block : (query + 1) * p.head_block], 0.0), axis=0, keepdims=True)
        for query in range(p.queries)
    ]
    lane = iota(p.heads // p.cores, 1)
    here = (lane >= g * p.head_block) & (lane < (g + 1) * p.head_block)
    before = sums[0, 0, pl.ds(at, p.queries), :]
    sums[0, 0, pl.ds(at, p.queries), :] = jnp.where(here, jnp.concatenate(rows, axis=0), before)


def contract(plan: TrainingPlan, a: jax.Array, b: jax.Array, axis: int, other: int) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    if plan.interpreted:
        # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(
        a,
        b,
        (((axis,), (other,)), ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def compiler_params(plan: TrainingPlan) -> pltpu.CompilerParams:
    """Heads are dealt to cores; everything else follows in order, whose sums it carries on."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel" if plan.cores > 1 else "arbitrary", "arbitrary", "arbitrary", "arbitrary"),
        vmem_limit_bytes=56 << 20,
    )
