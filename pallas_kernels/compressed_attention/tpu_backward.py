"""TPU kernel: the gradient of ``tpu_training`` in one pass over the queries.

Scores are computed once and used for every gradient: queries' as they pass; window rows' in sums that move on with the
blocks of queries, two of them at a time; entries' in VMEM until all queries of the row have passed. Blocks of queries
and of heads follow one another in a fixed order, so sums are deterministic and those of a row do not know of others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_attention.tpu_common import LANES
from pallas_kernels.compressed_attention.training_common import (
    bring_window,
    contract,
    entry_blocks,
    entry_rows,
    in_window,
    read_columns,
    selected,
    split_refs,
    tiled,
    window_rows,
)
from pallas_kernels.compressed_attention.training_plan import (
    Inputs,
    TrainingPlan,
    compiler_params,
    head_spec,
    input_specs,
    query_spec,
    sums_spec,
)


def attention_gradient(
    plan: TrainingPlan,
    gradient: jax.Array,
    out: jax.Array,
    sums: jax.Array,
    q: jax.Array,
    sink: jax.Array,
    inputs: Inputs,
    *,
    cost: Any,
    interpret: Any,
):
    """Gradients (q [B, S, H, c], sink [B, H], window as in ``inputs``, entries or None), all but the first float32.

    ``gradient`` and ``out`` [B, S, H, c] are of and from the forward pass, and so are ``sums``.
    """
    p = plan
    specs, arrays = input_specs(p, inputs)
    out_specs = [
        query_spec(p),
        pl.BlockSpec((1, 1, p.heads // p.cores, LANES), lambda core, b, i, g, bounds: (core, b, 0, 0)),
        pl.BlockSpec(memory_space=pltpu.HBM),
    ]
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((p.cores, p.batch, p.heads // p.cores, LANES), jnp.float32),
        jax.ShapeDtypeStruct((p.cores, *inputs.window.shape), jnp.float32),
    ]
    rows = p.product_rows
    scratch = [
        pltpu.VMEM((2 * p.query_block, p.width), p.dtype),
        pltpu.VMEM((2 * rows, p.width), p.dtype),
        pltpu.VMEM((rows, p.width), jnp.float32),
        pltpu.VMEM((2 * p.query_block, p.width), jnp.float32),
        pltpu.SemaphoreType.DMA,
    ]
    if inputs.entries is not None:
        out_specs.append(pl.BlockSpec(memory_space=pltpu.HBM))
        out_shape.append(jax.ShapeDtypeStruct((p.cores, *inputs.entries.shape), jnp.float32))
        scratch.append(pltpu.VMEM((p.rows, p.width), jnp.float32))
    dq, dsink, *of_keys = pl.pallas_call(
        functools.partial(_kernel, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=p.grid,
            in_specs=[head_spec(p), query_spec(p), query_spec(p), query_spec(p), sums_spec(p), *specs],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(p),
        cost_estimate=cost,
        interpret=interpret,
        name="compressed_attention_backward",
    )(inputs.bounds, sink.astype(jnp.float32)[:, None], gradient, q, out, sums, *arrays)
    # Cores in their order: the sum of two float32 numbers, whatever the batch.
    dwindow, *dentries = [functools.reduce(jnp.add, list(of_core)) for of_core in of_keys]
    dsink = jnp.moveaxis(dsink[..., 0], 0, 1).reshape(p.batch, p.heads)
    return dq, dsink, dwindow, dentries[0] if dentries else None


def _kernel(plan: TrainingPlan, bounds, sink, gradient, q, out, sums, limits, previous, own, *refs):
    p = plan
    entries, times, refs = split_refs(p, refs)
    dq, dsink, dwindow, *of_entries = refs
    dentries, of_entries = (of_entries[0], of_entries[1:]) if p.rows else (None, of_entries)
    window, both, of_queries, of_window, semaphore, *of_entries = of_entries
    core, b, i, g = (pl.program_id(axis) for axis in range(4))
    bring_window(p, window, previous, own)
    first, last = entry_blocks(p, bounds)
    rows = p.product_rows

    @pl.when((i == 0) & (g == 0))
    def begin_row():
        of_window[...] = jnp.zeros_like(of_window)
        dsink[...] = jnp.zeros_like(dsink)
        for sum_ in of_entries:
            sum_[...] = jnp.zeros_like(sum_)

    @pl.when((i > 0) & (g == 0))
    def move_on():
        of_window[: p.query_block, :] = of_window[p.query_block :, :]
        of_window[p.query_block :, :] = jnp.zeros((p.query_block, p.width), jnp.float32)

    def each(product, _):
        at = pl.multiple_of(product * p.queries, p.queries)
        here = pl.ds(at, p.queries)
        # Gradients of outputs, then queries: both meet the same keys.
        both[:rows, :] = gradient[0, here].reshape(rows, p.width)
        both[rows:, :] = q[0, here].reshape(rows, p.width)
        result = out[0, here].reshape(rows, p.width).astype(jnp.float32)
        mean = jnp.sum(both[:rows, :].astype(jnp.float32) * result, axis=1, keepdims=True)
        log_sum = read_columns(p, sums, at, g)
        of_sink = -jnp.exp(tiled(p, sink[...]) - log_sum) * mean
        of_sink = functools.reduce(
            jnp.add, [of_sink[n * p.head_block : (n + 1) * p.head_block] for n in range(p.queries)]
        )
        heads = pl.ds(pl.multiple_of(g * p.head_block, p.head_block), p.head_block)
        dsink[0, 0, heads, :] += jnp.broadcast_to(of_sink, (p.head_block, LANES))
        of_queries[...] = jnp.zeros_like(of_queries)

        def add(keys, often, total, place):
            products = contract(p, both[...], keys, 1, 1)
            weights = jnp.where(often > 0, jnp.exp(products[rows:] * p.scale - log_sum), 0.0) * often
            of_scores = weights * (products[:rows] - mean) * p.scale
            of_queries[...] += contract(p, of_scores.astype(p.dtype), keys, 1, 0)
            mixed = jnp.concatenate([weights, of_scores], axis=0).astype(p.dtype)
            total[place, :] += contract(p, mixed, both[...], 0, 0)

        place = window_rows(p, at)
        add(window[place, :], in_window(p, limits, at), of_window, place)

        def visit(block, _):
            place = entry_rows(p, block)
            add(entries[0, place, :], selected(p, limits, times, at, block), of_entries[0], place)

        if p.rows:
            lax.fori_loop(first, last, visit, None)
        dq[0, here] = of_queries[...].astype(p.dtype).reshape(p.queries, p.head_block, p.width)

    lax.fori_loop(0, p.products, each, None)

    def write(source, target):
        copy = pltpu.make_async_copy(source, target, semaphore)
        copy.start()
        copy.wait()

    @pl.when(g == p.head_blocks - 1)
    def end_block():
        place = pl.multiple_of(i * p.query_block, p.query_block)
        write(of_window.at[pl.ds(0, p.query_block)], dwindow.at[core, b, pl.ds(place, p.query_block)])

    @pl.when((g == p.head_blocks - 1) & (i == p.blocks - 1))
    def end_row():
        last_block = pl.ds(p.blocks * p.query_block, p.query_block)
        write(of_window.at[pl.ds(p.query_block, p.query_block)], dwindow.at[core, b, last_block])
        if p.rows:
            write(of_entries[0], dentries.at[core, b])
