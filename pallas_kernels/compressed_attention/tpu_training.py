"""TPU kernel: attention over whole sequences as training needs it, with the log of every softmax's sum.

Entries of a sequence in training are few (a quarter of its tokens, or less), so that they stay in VMEM while all of its
queries pass, and queries that select among them look at all, each weighed by how often it is selected. One step of the
grid is a block of queries of one row with a block of its heads. Documents packed into a row limit what a query sees.
``tpu_backward`` is the gradient, from the same plan and inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_attention.training_common import (
    bring_window,
    contract,
    entry_blocks,
    entry_rows,
    in_window,
    selected,
    split_refs,
    tiled,
    window_rows,
    write_columns,
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
