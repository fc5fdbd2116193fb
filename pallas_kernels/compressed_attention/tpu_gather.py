"""TPU kernel: attention over the window and over entries selected per query (CSA).

One step of the grid is one query with all of its heads. Selected entries stay in HBM until they are wanted: one
transfer per row, ``group`` of them per wait, two blocks in flight, the first block of the next query requested during
the last of this one. The indices of this query and the next are in scalar memory, and no other query's are.
Entries in released bytes lie in two rows (``deepseek_v4.stored_rows.KVWords``), which are two transfers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.stored_rows import KVWords
from pallas_kernels.compressed_attention.tpu_common import (
    ROW_TILE,
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
from pallas_kernels.compressed_attention.tpu_dense import window_specs
from pallas_kernels.compressed_attention.tpu_words import decode_block


def gather_attention(
    plan: Plan,
    q: jax.Array,
    windows: tuple[jax.Array, ...],
    sink: jax.Array,
    start: jax.Array,
    layer: jax.Array,
    entries: jax.Array | KVWords,
    indices: jax.Array,
    *,
    cost: pl.CostEstimate | None,
    interpret: Any,
) -> list[jax.Array]:
    """q [B, S, H, c] to ``results``; ``windows`` as the plan's source says, layer [1], the rest as the public op."""
    p = plan
    queries = p.batch * p.length
    parts = tuple(entries) if isinstance(entries, KVWords) else (entries,)
    # Entries of a row of each part.
    sharing = tuple(p.entry_rows // part.shape[2] for part in parts)
    blocks = -(-indices.shape[-1] // p.block)
    padding = blocks * p.block - indices.shape[-1]
    # -1 may lie anywhere; what follows the last index is not visited.
    place = jnp.arange(1, indices.shape[-1] + 1, dtype=jnp.int32)
    used = jnp.max(jnp.where(indices >= 0, place, 0), axis=-1).reshape(queries)
    indices = jnp.pad(indices.astype(jnp.int32), ((0, 0), (0, 0), (0, padding)), constant_values=-1)
    indices = indices.reshape(queries, blocks, p.block)
    steps = queries // p.cores

    def item(core, step):
        flat = core * steps + step
        return flat // p.length, flat % p.length

    def index(choose):
        def at(core, step, layer, start, used):
            b, s = item(core, step)
            return choose(b, s // p.query_block, 0, layer)

        return at

    def query(core, step, layer, start, used):
        b, s = item(core, step)
        return b, s, 0, 0

    def chosen(ahead):
        def at(core, step, layer, start, used):
            return jnp.minimum(core * steps + step + ahead, queries - 1), 0, 0

        return at

    index_shape = (1, blocks, p.block)
    q_spec = pl.BlockSpec((1, 1, p.heads, p.width), query)
    out_specs, out_shape = results(p, (1, p.heads), query)
    return pl.pallas_call(
        functools.partial(_kernel, p, steps, item, len(windows), sharing),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(p.cores, steps),
            in_specs=[
                pl.BlockSpec(index_shape, chosen(0), memory_space=pltpu.SMEM),
                pl.BlockSpec(index_shape, chosen(1), memory_space=pltpu.SMEM),
                pl.BlockSpec(index_shape, chosen(0)),
                pl.BlockSpec((p.heads, 1), lambda core, step, layer, start, used: (0, 0)),
                q_spec,
                *window_specs(p, index, windows),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(parts),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((p.window_rows, p.width), q.dtype),
                pltpu.VMEM((p.heads, 1), jnp.float32),
                pltpu.VMEM((p.heads, 1), jnp.float32),
                pltpu.VMEM((p.heads, p.width), jnp.float32),
                *[pltpu.VMEM((2, p.block, p.entry_width), p.entry_dtype)] * len(parts),
                *[pltpu.VMEM((p.block, p.width), q.dtype)] * bool(p.rope_dims),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(p),
        cost_estimate=cost,
        interpret=interpret,
        name="compressed_attention_gather",
    )(layer, start, used, indices, indices, indices, sink.astype(jnp.float32)[:, None], q, *windows, *parts)


def window_view(plan: Plan) -> int:
    """Window rows that one query looks at: all of them, or the aligned rows around its own window."""
    if plan.source != "blocks":
        return plan.window_rows
    return min(plan.window_rows, -(-(plan.window_size + ROW_TILE - 1) // ROW_TILE) * ROW_TILE)


def _kernel(
    plan: Plan,
    steps: int,
    item,
    window_count: int,
    sharing: tuple[int, ...],
    layer_ref,
    start_ref,
    used_ref,
    *all_refs,
):
    p = plan
    chosen, chosen_next, chosen_mask, sink, q, *refs = all_refs
    windows, refs = refs[:window_count], refs[window_count:]
    entries, refs = refs[: len(sharing)], refs[len(sharing) :]
    out, refs = (refs[:2], refs[2:]) if p.partial else (refs[:1], refs[1:])
    window, high, total, acc, *refs = refs
    stored, (*decoded, semaphores, slot) = refs[: len(sharing)], refs[len(sharing) :]
    core, step = pl.program_id(0), pl.program_id(1)
    flat = core * steps + step
    b, s = item(core, step)
    query_block = s // p.query_block
    start = start_ref[b]

    def groups(flat, block):
        return pl.cdiv(jnp.clip(used_ref[flat] - block * p.block, 0, p.block), p.group)

    def fetch(flat, row, which, block, into):
        """Requests the rows of one block of a query, ``which`` holding its indices; padding among them takes row 0."""

        def group(index, _):
            for offset in range(p.group):
                place = index * p.group + offset
                source = jnp.maximum(which[0, block, place], 0)
                for part, buffer, count in zip(entries, stored, sharing, strict=True):
                    pltpu.make_async_copy(
                        part.at[layer_ref[0], row, pl.ds(_quotient(source, count), 1)],
                        buffer.at[into, pl.ds(place, 1)],
                        semaphores.at[into],
                    ).start()

        lax.fori_loop(0, groups(flat, block), group, None)

    def wait(flat, block, into):
        def group(index, _):
            # The semaphore counts bytes: one wait of a group's size stands for its single rows.
            for buffer in stored:
                rows = buffer.at[into, pl.ds(pl.multiple_of(index * p.group, p.group), p.group)]
                pltpu.make_async_copy(rows, rows, semaphores.at[into]).wait()

        lax.fori_loop(0, groups(flat, block), group, None)

    @pl.when(step == 0)
    def _():
        slot[0] = 0
        fetch(flat, b, chosen, 0, 0)

    # A core's first step may fall inside a block of queries that another core began.
    @pl.when((step == 0) | (lax.rem(s, p.query_block) == 0))
    def _():
        fill_window(p, tuple(windows), window, start, query_block)

    query = q[0, 0]
    view = window_view(p)
    first: jax.Array | int = 0
    if p.source == "blocks":
        oldest = p.query_block + lax.rem(s, p.query_block) - p.window_size + 1
        first = jnp.minimum(oldest // ROW_TILE * ROW_TILE, p.window_rows - view)
        first = pl.multiple_of(first, ROW_TILE)
    positions = key_positions(p, iota(view, 1) + first, start, query_block)
    state = softmax_begin(sink[...], p.width)
    seen = in_window(p, positions, start + s)
    high[...], total[...], acc[...] = softmax_add(p, state, query, window[pl.ds(first, view), :], [seen])

    blocks = jnp.maximum(pl.cdiv(used_ref[flat], p.block), 1)
    first_slot = slot[0]

    def visit(block, _):
        current = lax.rem(first_slot + block, 2)

        @pl.when(block + 1 < blocks)
        def _():
            fetch(flat, b, chosen, block + 1, 1 - current)

        @pl.when((block + 1 == blocks) & (step + 1 < steps))
        def _():
            fetch(flat + 1, item(core, step + 1)[0], chosen_next, 0, 1 - current)

        wait(flat, block, current)
        rows = used_ref[flat] - block * p.block
        if p.rope_dims:
            decode_block(p, stored, current, chosen_mask.at[0, pl.ds(block, 1)], rows, decoded[0])
            keys = decoded[0][...]
        else:
            keys = unpack(p, stored[0][current], rows)
        selected = chosen_mask[0, pl.ds(block, 1), :] >= 0
        high[...], total[...], acc[...] = softmax_add(p, (high[...], total[...], acc[...]), query, keys, [selected])

    lax.fori_loop(0, blocks, visit, None)
    slot[0] = lax.rem(first_slot + blocks, 2)
    for ref, result in zip(out, finished(p, (high[...], total[...], acc[...])), strict=True):
        ref[0, 0] = result


def _quotient(index: jax.Array, divisor: int) -> jax.Array:
    """A number that is not negative, divided; by a shift where one does."""
    if divisor & (divisor - 1):
        return lax.div(index, jnp.int32(divisor))
    return index >> (divisor.bit_length() - 1) if divisor > 1 else index
