"""TPU kernel: attention over the window and over all visible entries (HCA), or over the window alone (SWA).

One step of the grid is a block of queries of one row with a block of its heads. Entries stay in HBM; blocks of them
come by transfers of a few consecutive rows, as many as the block's last visible entry asks for, two blocks in flight,
the first block of the next step requested during the last of this one. Nothing is sized by the cache's capacity but
the addresses.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_attention.tpu_columns import keys_of_columns
from pallas_kernels.compressed_attention.tpu_common import (
    SUBLANES,
    Plan,
    compiler_params,
    fill_window,
    finished,
    in_window,
    iota,
    key_positions,
    results,
    softmax_add,
    softmax_begin,
    unpack,
)


def dense_attention(
    plan: Plan,
    q: jax.Array,
    windows: tuple[jax.Array, ...],
    sink: jax.Array,
    start: jax.Array,
    layer: jax.Array,
    entries: jax.Array | None,
    counts: jax.Array | None,
    *,
    cost: pl.CostEstimate | None,
    interpret: Any,
) -> list[jax.Array]:
    """q [B, S, H, c] to ``results``; ``windows`` as the plan's source says, layer [1], the rest as the public op."""
    p = plan
    padding = p.query_blocks * p.query_block - p.length
    if counts is None:
        counts = jnp.zeros((p.batch, p.length), jnp.int32)
    counts = jnp.pad(jnp.clip(counts, 0, p.entry_rows), ((0, 0), (0, padding)))
    counts = counts.reshape(p.batch * p.query_blocks, 1, p.query_block)
    limits = jnp.max(counts, axis=(1, 2))
    steps = p.batch * p.query_blocks * p.head_blocks // p.cores

    def item(core, step):
        """Which row, query block and head block a step works on; heads vary fastest, so windows are loaded once."""
        flat = core * steps + step
        return (
            flat // (p.query_blocks * p.head_blocks),
            flat // p.head_blocks % p.query_blocks,
            flat % p.head_blocks,
        )

    def index(choose):
        return lambda core, step, layer, start, limits: choose(*item(core, step), layer)

    q_spec = pl.BlockSpec((1, p.query_block, p.head_block, p.width), index(lambda b, i, g, layer: (b, i, g, 0)))
    in_specs = [
        pl.BlockSpec(
            (1, 1, p.query_block),
            index(lambda b, i, g, layer: (b * p.query_blocks + i, 0, 0)),
            memory_space=pltpu.SMEM,
        ),
        pl.BlockSpec((p.head_block, 1), index(lambda b, i, g, layer: (g, 0))),
        q_spec,
        *window_specs(p, index, windows),
    ]
    arguments = [counts, sink.astype(jnp.float32)[:, None], q, *windows]
    rows = p.product_rows
    products = p.query_block * p.head_block // rows
    scratch = [
        pltpu.VMEM((p.window_rows, p.width), q.dtype),
        pltpu.VMEM((products, rows, 1), jnp.float32),
        pltpu.VMEM((products, rows, 1), jnp.float32),
        pltpu.VMEM((products, rows, p.width), jnp.float32),
    ]
    if entries is not None:
        parts = tuple(entries) if p.columns else (entries,)
        in_specs += [pl.BlockSpec(memory_space=pltpu.HBM)] * len(parts)
        arguments += parts
        if p.columns:
            scratch += [pltpu.VMEM((2, part.shape[2], p.block), part.dtype) for part in parts]
        else:
            scratch.append(pltpu.VMEM((2, p.block, p.entry_width), p.entry_dtype))
        scratch += [
            pltpu.VMEM((p.width, p.block) if p.columns else (p.block, p.width), q.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((1,), jnp.int32),
        ]
    out_specs, out_shape = results(p, (p.query_block, p.head_block), index(lambda b, i, g, layer: (b, i, g, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, p, steps, item, len(windows)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.cores, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(p),
        cost_estimate=cost,
        interpret=interpret,
        name="compressed_attention_dense",
    )(layer, start, limits, *arguments)


def window_specs(plan: Plan, index, windows: tuple[jax.Array, ...]) -> list[pl.BlockSpec]:
    """Block specs of the window arrays; ``index`` wraps a function of (row, query block, head block, layer)."""
    if plan.source == "ring":
        return [
            pl.BlockSpec((1, 1, plan.ring_rows, plan.width), index(lambda b, i, g, layer: (layer[0], b, 0, 0))),
            pl.BlockSpec((1, plan.length, plan.width), index(lambda b, i, g, layer: (b, 0, 0))),
        ]
    if plan.source == "whole":
        return [pl.BlockSpec((1, windows[0].shape[1], plan.width), index(lambda b, i, g, layer: (b, 0, 0)))]
    size = (1, plan.query_block, plan.width)
    return [
        pl.BlockSpec(size, index(lambda b, i, g, layer: (b, 0, 0))),
        pl.BlockSpec(size, index(lambda b, i, g, layer: (b, jnp.maximum(i - 1, 0), 0))),
        pl.BlockSpec(size, index(lambda b, i, g, layer: (b, i, 0))),
    ]


def _kernel(plan: Plan, steps: int, item, window_count: int, layer_ref, start_ref, limit_ref, *all_refs):
    p = plan
    counts, sink, q, *refs = all_refs
    windows, refs = refs[:window_count], refs[window_count:]
    parts = 3 if p.columns else 1
    if p.entry_rows:
        entries, refs = refs[:parts], refs[parts:]
    out, refs = (refs[:2], refs[2:]) if p.partial else (refs[:1], refs[1:])
    if p.entry_rows:
        window, high, total, acc, *refs = refs
        stored, (keys, semaphores, slot) = refs[:parts], refs[parts:]
    else:
        window, high, total, acc = refs
    core, step = pl.program_id(0), pl.program_id(1)
    b, i, g = item(core, step)
    start = start_ref[b]
    queries = p.product_rows // p.head_block
    products = p.query_block // queries

    def transfers(core, step, block, into, act):
        """Starts or awaits the transfers of one block: whole chunks, and T's own remainder at its end."""
        b, i, _ = item(core, step)
        rows = jnp.clip(limit_ref[b * p.query_blocks + i] - block * p.block, 0, p.block)

        def chunk(index, _):
            first = pl.multiple_of(block * p.block + index * p.chunk, p.chunk)
            target = pl.multiple_of(index * p.chunk, p.chunk)

            def copy(offset, count):
                return pltpu.make_async_copy(
                    entries[0].at[layer_ref[0], b, pl.ds(first + offset, count)],
                    stored[0].at[into, pl.ds(target + offset, count)],
                    semaphores.at[into],
                )

            if p.columns:
                for part, buffer in zip(entries, stored, strict=True):
                    source = part.at[layer_ref[0], b, :, pl.ds(first, p.chunk)]
                    into_columns = buffer.at[into, :, pl.ds(target, p.chunk)]
                    act(pltpu.make_async_copy(source, into_columns, semaphores.at[into]))
                return
            remainder = p.entry_rows % p.chunk
            if remainder == 0:
                act(copy(0, p.chunk))
                return
            fits = first + p.chunk <= p.entry_rows

            @pl.when(fits)
            def _():
                act(copy(0, p.chunk))

            @pl.when(jnp.logical_not(fits))
            def _():
                # Transfers are of whole tiles or of single rows.
                whole = remainder // SUBLANES * SUBLANES
                if whole:
                    act(copy(0, whole))
                for row in range(whole, remainder):
                    act(copy(row, 1))

        lax.fori_loop(0, pl.cdiv(rows, p.chunk), lambda index, _: chunk(index, _), None)

    def start_copy(copy):
        copy.start()

    def wait_copy(copy):
        copy.wait()

    if p.entry_rows:

        @pl.when(step == 0)
        def request_first():
            slot[0] = 0
            transfers(core, step, 0, 0, start_copy)

    # A core's first step may fall inside a block of queries that another core began.
    @pl.when((step == 0) | (g == 0))
    def bring_window():
        fill_window(p, tuple(windows), window, start, i)

    def query_heads(product):
        rows = q[0, pl.ds(product * queries, queries)]
        return rows.reshape(p.product_rows, p.width)

    def add(product, keys, mask, channels=1):
        """Adds a block of keys for one product's queries; ``mask(query)`` is [1, K]."""
        state = (high[product], total[product], acc[product])
        visible = [mask(product * queries + query) for query in range(queries)]
        high[product], total[product], acc[product] = softmax_add(
            p, state, query_heads(product), keys, visible, channels
        )

    window_positions = key_positions(p, iota(p.window_rows, 1), start, i)

    def begin(product, _):
        sinks = jnp.concatenate([sink[...]] * queries, axis=0) if queries > 1 else sink[...]
        high[product], total[product], acc[product] = softmax_begin(sinks, p.width)
        first = start + i * p.query_block
        add(product, window[...], lambda query: in_window(p, window_positions, first + query))

    lax.fori_loop(0, products, begin, None)

    if p.entry_rows:
        limit = limit_ref[b * p.query_blocks + i]
        blocks = jnp.maximum(pl.cdiv(limit, p.block), 1)
        first_slot = slot[0]

        def visit(block, _):
            current = lax.rem(first_slot + block, 2)

            @pl.when(block + 1 < blocks)
            def _():
                transfers(core, step, block + 1, 1 - current, start_copy)

            @pl.when((block + 1 == blocks) & (step + 1 < steps))
            def _():
                transfers(core, step + 1, 0, 1 - current, start_copy)

            transfers(core, step, block, current, wait_copy)
            if p.columns:
                keys[...] = keys_of_columns(p, [words[current] for words in stored], limit - block * p.block)
            else:
                keys[...] = unpack(p, stored[0][current], limit - block * p.block)
            entry = iota(p.block, 1) + block * p.block

            def each(product, _):
                add(product, keys[...], lambda query: entry < counts[0, 0, query], 0 if p.columns else 1)

            lax.fori_loop(0, products, each, None)

        lax.fori_loop(0, blocks, visit, None)
        slot[0] = lax.rem(first_slot + blocks, 2)

    def finish(product, _):
        for ref, result in zip(out, finished(p, (high[product], total[product], acc[product])), strict=True):
            ref[0, pl.ds(product * queries, queries)] = result.reshape(queries, p.head_block, result.shape[-1])

    lax.fori_loop(0, products, finish, None)
