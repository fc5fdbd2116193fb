"""TPU kernel of ``index_topk``: scores of a block of queries in fast memory, and the selection made there.

One step of the grid is a block of queries of one row. Keys stay in HBM and stream through a ring of chunks, as many as
the block's last visible entry asks for; the first chunks of the next step are requested before this step's selection
begins. Scores never leave fast memory: they lie there as integers in the same order, a chunk of 1,024 keys in one tile
per query, where ``tpu_search`` and ``tpu_place`` find the k largest. XLA orders the k that come out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.stored_rows import KeyColumns
from pallas_kernels.index_topk.cost import topk_cost
from pallas_kernels.index_topk.tpu_keys import chunk_buffers, chunk_of_keys, readable, transfers
from pallas_kernels.index_topk.tpu_place import prepare, select
from pallas_kernels.index_topk.tpu_score import Plan, mirrored, score_chunk, spread_weights
from pallas_kernels.index_topk.tpu_search import CHUNK, LANES, SUBLANES, Memory, Selection, empty_chunks
from pallas_kernels.targets import current_chip
from pallas_kernels.tuned import tuned

_HEAD_TILE = 16
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes, the numbers that a tuner sweeps; none of them changes a result.

    ``queries`` of a step, which share passes over keys and scores; ``slots``, chunks of keys in flight.
    """

    queries: int = 16
    slots: int = 8


CANDIDATES = (
    Tiles(),
    *(Tiles(queries, slots) for queries in (8, 16, 32) for slots in (4, 8, 16) if (queries, slots) != (16, 8)),
)
"""What a tuner may try; too large ones are refused by the compiler."""


def shape_class(length: int) -> str:
    """The class of shapes that share a choice of ``Tiles``."""
    return "decode" if length <= Tiles.queries else "prefill"


def ranked_topk(
    *,
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array | KeyColumns,
    counts: jax.Array,
    layer: jax.Array | int,
    k: int,
    first_row: jax.Array | int = 0,
    tiles: Tiles | None = None,
    cores: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """What ``pallas_kernels.index_topk.index_topk`` selects with its scores: (float32 [B, S, K], int32 [B, S, K]).

    ``first_row`` is the row of the keys that belongs to the first of the B rows. ``cores`` are TensorCores to deal the
    steps to, where they divide.
    """
    q, weights, keys = lax.stop_gradient((q, weights, keys))
    batch, length, heads, width = q.shape
    chip = None if interpret else current_chip()
    tiles = tiles or tuned("index_topk", chip, shape_class(length), Tiles())
    k = min(k, keys.shape[2])
    stored, layer = readable(keys, layer, q.dtype)
    entries = stored[0].shape[2 if len(stored) == 1 else 3]
    filled = -heads % _HEAD_TILE
    q = jnp.pad(q, ((0, 0), (0, 0), (0, filled), (0, 0)))
    weights = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, 0), (0, filled)))
    if cores is None:
        cores = 1 if chip is None else chip.cores
    queries = min(tiles.queries, length)
    # Rows of a few queries make a step together, as long as every core has one.
    rows = max(1, min(tiles.queries // queries, -(-batch // cores))) if queries == length else 1
    plan = Plan(
        batch=batch,
        length=length,
        heads=heads + filled,
        width=width,
        dtype=q.dtype,
        entries=entries,
        queries=queries,
        rows=rows,
        cores=cores,
        slots=tiles.slots,
        selection=Selection.of(queries=rows * queries, entries=entries, k=k, interpreted=bool(interpret)),
        interpreted=bool(interpret),
    )
    if plan.steps % cores:
        plan = dataclasses.replace(plan, cores=1)
    indices, ordered = _call(plan, q, weights, stored, counts, layer, first_row, k, interpret)
    # Descending scores, ties to the lowest index; what was not selected comes last.
    falling, indices = lax.sort((~ordered, indices), dimension=-1, num_keys=2, is_stable=False)
    falling, indices = falling[..., :k], indices[..., :k]
    scores = lax.bitcast_convert_type(mirrored(~falling), jnp.float32)
    return jnp.where(indices >= 0, scores, -jnp.inf), indices


def interpreted(**arguments: Any) -> tuple[jax.Array, jax.Array]:
    """The kernel in Pallas' TPU interpreter, whose memory starts as NaN and whose transfers happen when awaited."""
    return ranked_topk(**arguments, interpret=pltpu.InterpretParams())


def _call(p: Plan, q, weights, keys, counts, layer, first_row, k, interpret) -> tuple[jax.Array, jax.Array]:
    """Indices and ordered scores [B, S, slots], in no particular order; -1 and LOWEST where there is none."""
    s = p.selection
    padding = p.blocks * p.queries - p.length
    counts = jnp.pad(jnp.clip(counts.astype(jnp.int32), 0, p.entries), ((0, 0), (0, padding)))
    counts = jnp.pad(counts.reshape(p.units, p.queries), ((0, p.steps * p.rows - p.units), (0, 0)))
    limits = jnp.max(counts, axis=1)
    steps = p.steps // p.cores

    def rows(*tail):
        def at(core, step, start, limits):
            flat = core * steps + step
            return flat // p.blocks, flat % p.blocks, *tail

        return at

    def flat(*tail):
        return lambda core, step, start, limits: (core * steps + step, *tail)

    key_bytes = sum(a.size * a.dtype.itemsize for a in keys) // (keys[0].shape[0] * keys[0].shape[1] * p.entries)
    cost = topk_cost(
        batch=p.batch, length=p.length, heads=p.heads, width=p.width, entries=p.entries, k=k, key_bytes=key_bytes
    )
    buffers = chunk_buffers(keys, p.slots)
    shape = jax.ShapeDtypeStruct((p.steps, s.queries, s.rows_out, LANES), jnp.int32)
    out_spec = pl.BlockSpec((1, s.queries, s.rows_out, LANES), flat(0, 0, 0))
    indices, scores = pl.pallas_call(
        functools.partial(_kernel, p, steps, len(keys)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(p.cores, steps),
            in_specs=[
                pl.BlockSpec((1, 1, s.queries), flat(0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((p.rows, p.queries, p.heads, p.width), rows(0, 0)),
                pl.BlockSpec((p.rows, p.queries, p.heads), rows(0)),
                *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in keys],
            ],
            out_specs=[out_spec, out_spec],
            scratch_shapes=[
                *buffers,
                pltpu.SemaphoreType.DMA((p.slots,)),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.VMEM((s.queries * p.heads, LANES), jnp.float32),
                *s.scratch_shapes(),
            ],
        ),
        out_shape=[shape, shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if p.cores > 1 else "arbitrary", "arbitrary"),
            vmem_limit_bytes=_fast_memory(p),
        ),
        cost_estimate=pl.CostEstimate(flops=cost.total_operations, bytes_accessed=cost.bytes_moved, transcendentals=0),
        interpret=interpret,
        name="index_topk",
    )(
        jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(first_row, jnp.int32)]),
        limits,
        counts.reshape(p.steps, 1, s.queries),
        q,
        weights,
        *keys,
    )

    def public(a):
        a = a.reshape(p.steps * p.rows, p.queries, -1)[: p.units]
        return a.reshape(p.batch, p.blocks * p.queries, -1)[:, : p.length]

    return public(indices), public(scores)


def _fast_memory(p: Plan) -> int:
    """Bytes of scratch, of double-buffered blocks and of a product's values, with room for what the compiler adds."""
    item = jnp.dtype(p.dtype).itemsize
    queries = p.selection.queries
    scratch = p.slots * CHUNK * p.width * item + 4 * queries * p.heads * LANES + p.selection.scratch_bytes
    blocks = 2 * queries * (p.heads * p.width * item + 4 * SUBLANES * p.heads + 8 * CHUNK)
    return scratch + blocks + 4 * p.queries * p.heads * CHUNK + 8 * _MIB


def _kernel(p: Plan, steps: int, parts: int, start_ref, limit_ref, counts, q, weights, *refs):
    keys, (indices, ordered), stored = refs[:parts], refs[parts : parts + 2], refs[parts + 2 : 2 * parts + 2]
    semaphores, progress, spread, *rest = refs[2 * parts + 2 :]
    memory = Memory(*rest)
    core, step = pl.program_id(0), pl.program_id(1)
    units = steps * p.rows

    def chunks_of(unit):
        """Chunks that a unit of this core reads: one at least, which keeps the order of transfers simple."""
        return jnp.maximum(pl.cdiv(limit_ref[core * units + unit], CHUNK), 1)

    def transfer(unit, chunk, slot, act):
        """Starts or awaits the transfer of one chunk of a unit's keys."""
        row = jnp.minimum((core * units + unit) // p.blocks, p.batch - 1)

        def each(count):
            at = start_ref[0], start_ref[1] + row, chunk * CHUNK, count
            for copy in transfers(keys, stored, semaphores.at[slot], *at, slot):
                act(copy)

        if p.remainder == 0:
            each(CHUNK)
            return
        whole = (chunk + 1) * CHUNK <= p.entries

        @pl.when(whole)
        def _():
            each(CHUNK)

        @pl.when(jnp.logical_not(whole))
        def _():
            each(p.remainder)

    def following(slot):
        return jnp.where(slot == p.slots - 1, 0, slot + 1)

    def request(*_):
        """Starts the next transfer of all that this core will make, if there is one."""
        unit, chunk, slot = progress[0], progress[1], progress[2]

        @pl.when(unit < units)
        def _():
            transfer(unit, chunk, slot, lambda copy: copy.start())
            last = chunk + 1 == chunks_of(unit)
            progress[0] = unit + last.astype(jnp.int32)
            progress[1] = jnp.where(last, 0, chunk + 1)
            progress[2] = following(slot)

    @pl.when(step == 0)
    def _():
        for place_of in range(4):
            progress[place_of] = 0
        lax.fori_loop(0, p.slots, request, None)

    spread_weights(p, weights, spread)
    prepare(p.selection, memory)

    def score_unit(unit, most):
        chunks = chunks_of(step * p.rows + unit)

        def visit(chunk, _):
            slot = progress[3]
            transfer(step * p.rows + unit, chunk, slot, lambda copy: copy.wait())
            score_chunk(p, unit, chunk, counts, q, spread, chunk_of_keys(stored, slot), memory)
            request()
            progress[3] = following(slot)

        lax.fori_loop(0, chunks, visit, None)
        return jnp.maximum(most, chunks)

    chunks = lax.fori_loop(0, p.rows, score_unit, jnp.int32(0))

    def fill_up(unit, _):
        first = chunks_of(step * p.rows + unit)
        empty_chunks(p.selection, memory.scores, range(p.queries), unit * p.queries, first, chunks)

    lax.fori_loop(0, p.rows, fill_up, None)
    select(p.selection, memory, chunks, lambda query: pl.cdiv(counts[0, 0, query], CHUNK), indices, ordered)
