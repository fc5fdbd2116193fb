"""TPU kernel of ``compress``: a call's projections cross HBM once, a row's history only if a window of it ends.

A grid step takes a block of new rows, for a long call of one sequence, for a short one of many. It puts them behind
the rows before them (the end of the block before, or of the ring in position order) and pools every window that ends
in the block out of fast memory, at whatever row the windows begin. The same code serves a chunk of thousands of tokens
and a single one, and it is the single one that it was written for: 127 of 128 tokens complete no HCA window, and such
a row reads no history, where the twin gathers, joins, aligns and pools 520 KiB of it (36 KiB to 60 KiB in CSA, where
three of four tokens complete none). Counted for 64 sequences of one token in one HCA layer: 33 MB of history, which
the twin reads and writes at least three times (200 MB), against 0.5 MB on average here. For a chunk of 2,048 tokens
of a CSA layer the projections are 17 MB; the twin joins and aligns them first (67 MB more).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.layer_spec import RopeSpec
from deepseek_v4.rope import rope_angles
from pallas_kernels.compress.cost import kernel_bytes
from pallas_kernels.compress.windows import beginnings, ending, unserved_types
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

LANES = 128
SUBLANES = 8
_STRIDED_ROWS = 16
"""Most rows of a pool that are taken one by one from all windows at once; longer ones window by window."""
_MAX_LENGTH = 16384
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes: new rows per step, rows of the batch per step of short calls, rings read ahead of their use."""

    rows: int = 512
    group: int = 64
    ahead: int = 4


CANDIDATES = (
    Tiles(),
    *(
        Tiles(rows, group, ahead)
        for rows in (256, 512, 1024)
        for group in (16, 64)
        for ahead in (2, 4, 8)
        if (rows, group, ahead) != (512, 64, 4)
    ),
)
"""What a tuner may try: an entry is the same bits with each of them."""


def shape_class(length: int, channels: int) -> str:
    """The class of shapes that share tiles."""
    return f"{'decode' if length <= 2 * SUBLANES else 'prefill'}, {channels} channels"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: sizes, and ``rows`` new rows of ``group`` sequences per step."""

    batch: int
    length: int
    ratio: int
    overlap: bool
    width: int
    ring_rows: int
    rows: int
    group: int
    ahead: int
    rope_dims: int
    norm_eps: float
    dtype: Any

    @property
    def pool_rows(self) -> int:
        """Rows that an entry pools."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def history(self) -> int:
        """Rows before a block that a window which ends in it may need."""
        return self.pool_rows - 1

    @property
    def carry(self) -> int:
        """Rows kept for them, in whole tiles."""
        return _round_up(self.history, SUBLANES)

    @property
    def channels(self) -> int:
        """Width of the projections."""
        return self.width * (2 if self.overlap else 1)

    @property
    def blocks(self) -> int:
        """Blocks of new rows; the last one may be partial."""
        return -(-self.length // self.rows)

    @property
    def block_windows(self) -> int:
        """Windows that end in a block of rows, or of which eight at a time are pooled."""
        windows = -(-self.rows // self.ratio)
        return _round_up(windows, SUBLANES) if self.strided else windows

    @property
    def ring_buffer(self) -> int:
        """Rows of a ring in fast memory: its first ones once more behind it, and a tile to read beyond them."""
        return _round_up(self.ring_rows + self.history, SUBLANES) + SUBLANES

    @property
    def strided(self) -> bool:
        """Whether the rows of a pool are taken one by one, each from several windows at once."""
        return self.pool_rows <= _STRIDED_ROWS

    @property
    def windows(self) -> int:
        """Entries returned per sequence."""
        return -(-self.length // self.ratio)

    @property
    def joined(self) -> int:
        """Rows of a block behind those kept, with room for a last window that does not end."""
        return _round_up(self.carry + self.block_windows * self.ratio, SUBLANES) + SUBLANES


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def unserved(
    chip: Chip | None,
    kv: jax.Array,
    kv_ring: jax.Array | None,
    ratio: int,
    overlap: bool,
    rope: RopeSpec,
    dtype: jax.typing.DTypeLike,
    *,
    compiled: bool = True,
) -> str | None:
    """Why the kernel cannot serve projections [B, S, lanes*c] (and rings [n, B, N, lanes*c] or None), or None.

    ``compiled``: not interpreted.
    """
    batch, length, channels = kv.shape
    pool_rows = ratio * (2 if overlap else 1)
    if reason := unserved_types(kv, kv_ring, dtype):
        return reason
    if channels % (LANES * (2 if overlap else 1)) or rope.dims > LANES // 2:
        return (
            f"{channels} channels, {rope.dims} of them rotated: expected whole tiles of {LANES}, at most {LANES // 2}"
        )
    if pool_rows > _STRIDED_ROWS and (overlap or ratio % SUBLANES):
        return f"windows of {pool_rows} rows that overlap or are no multiple of {SUBLANES}"
    if compiled and kv_ring is not None and kv_ring.shape[2] % SUBLANES:
        return f"rings of {kv_ring.shape[2]} rows are no whole tiles of {SUBLANES}"
    if batch * length == 0 or length > _MAX_LENGTH:
        return f"{batch} sequences of {length} tokens, at most {_MAX_LENGTH}"
    return None


def compress(
    *,
    kv,
    score,
    norm_weight,
    start,
    lengths,
    kv_ring,
    score_ring,
    layer,
    ratio,
    overlap,
    rope,
    norm_eps,
    dtype,
    tiles: Tiles | None = None,
    interpret=False,
):
    """See ``pallas_kernels.compress.compress``."""
    batch, length, channels = kv.shape
    chip = None if interpret else current_chip()
    tiles = tiles or tuned("compress", chip, shape_class(length, channels), Tiles())
    block = _round_up(tiles.rows, ratio * SUBLANES if ratio % SUBLANES else ratio)
    rows = length if length <= block else block
    # Short calls share a step, in equal parts and on every core.
    most = max(1, min(tiles.group, tiles.rows // rows, batch // (1 if chip is None else chip.cores)))
    plan = Plan(
        batch=batch,
        length=length,
        ratio=ratio,
        overlap=overlap,
        width=channels // (2 if overlap else 1),
        ring_rows=0 if kv_ring is None else kv_ring.shape[2],
        rows=rows,
        group=next(g for g in range(most, 0, -1) if batch % g == 0) if rows == length else 1,
        ahead=tiles.ahead,
        rope_dims=rope.dims,
        norm_eps=norm_eps,
        dtype=jnp.dtype(dtype),
    )
    start = start.astype(jnp.int32)
    first, done = ending(start, lengths, ratio, plan.windows)
    slot = (start - plan.history) % max(1, plan.ring_rows)
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), start % ratio, first, done, slot)
    rings = () if kv_ring is None else (kv_ring, score_ring)
    return _call(plan, scalars, kv, score, _rotations(plan, first, rope), norm_weight, rings, interpret)


def _rotations(plan: Plan, first: jax.Array, rope: RopeSpec) -> jax.Array:
    """Cosines and signed sines of every entry's position as the lanes want them: [B, windows, 128]."""
    angles = rope_angles(beginnings(first, plan.ratio, plan.windows), rope)
    cos, sin = jnp.repeat(jnp.cos(angles), 2, axis=-1), jnp.sin(angles)
    signed = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
    return jnp.pad(jnp.concatenate([cos, signed], axis=-1), ((0, 0), (0, 0), (LANES - 2 * rope.dims, 0)))


def _call(plan: Plan, scalars, kv, score, rotations, norm_weight, rings, interpret):
    new = pl.BlockSpec((plan.group, plan.rows, plan.channels), lambda g, j, *_: (g, j, 0))
    per_sequence = (plan.group, plan.windows)
    moved = kernel_bytes(
        batch=plan.batch,
        length=plan.length,
        channels=plan.channels,
        width=plan.width,
        ratio=plan.ratio,
        ring_rows=plan.ring_rows,
        itemsize=plan.dtype.itemsize,
    )
    # Rows in strips of 128 channels, from which a load may take every fourth row.
    joined = pltpu.VMEM((plan.channels // LANES, plan.joined, LANES), jnp.float32)
    scratch = [
        joined,
        joined,
        pltpu.VMEM((_round_up(plan.blocks * plan.block_windows, SUBLANES), plan.width), jnp.float32),
    ]
    if rings:
        ring = pltpu.VMEM((plan.ahead, plan.ring_buffer, plan.channels), jnp.float32)
        scratch += [ring, ring, pltpu.SemaphoreType.DMA((plan.ahead, 2))]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.batch // plan.group, plan.blocks),
            in_specs=[
                new,
                new,
                pl.BlockSpec((*per_sequence, LANES), lambda g, j, *_: (g, 0, 0)),
                pl.BlockSpec((1, plan.width), lambda g, j, *_: (0, 0)),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in rings),
            ],
            out_specs=pl.BlockSpec((*per_sequence, plan.width), lambda g, j, *_: (g, 0, 0)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((plan.batch, plan.windows, plan.width), plan.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_fast_memory(plan)
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * plan.batch * plan.length * plan.channels,
            bytes_accessed=moved,
            transcendentals=plan.batch * plan.length * plan.channels,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="compress",
    )(*scalars, kv, score, rotations, norm_weight.astype(jnp.float32)[None], *rings)


def _kernel(plan: Plan, layer, offset, first, done, slot, kv, score, rotations, weight, *rest):
    rings = rest[: 2 if plan.ring_rows else 0]
    out, kv_rows, score_rows, pooled, *read = rest[len(rings) :]
    sequence, block = pl.program_id(0) * plan.group, pl.program_id(1)
    last = plan.blocks - 1

    def transfers(i):
        buffers, semaphores = read[:2], read[2]
        at = lax.rem(i, plan.ahead)
        return [
            pltpu.make_async_copy(
                ring.at[layer[0], sequence + i], buffer.at[at, pl.ds(0, plan.ring_rows)], semaphores.at[at, which]
            )
            for which, (ring, buffer) in enumerate(zip(rings, buffers, strict=True))
        ]

    def fetch(i):
        @pl.when((block == 0) & (i < plan.group))
        def _():
            @pl.when(done[sequence + jnp.minimum(i, plan.group - 1)] > 0)
            def _():
                for transfer in transfers(i):
                    transfer.start()

    def keep_history(i):
        """The rows before this block's, at the end of those kept."""

        @pl.when(block > 0)
        def _():
            for joined in (kv_rows, score_rows):
                joined[:, : plan.carry] = joined[:, plan.rows : plan.rows + plan.carry]

        @pl.when(block == 0)
        def _():
            if not rings:
                for joined in (kv_rows, score_rows):
                    joined[:, : plan.carry] = jnp.zeros((plan.channels // LANES, plan.carry, LANES), jnp.float32)
                return
            at, where = lax.rem(i, plan.ahead), slot[sequence + i]
            for transfer, buffer, joined in zip(transfers(i), read[:2], (kv_rows, score_rows), strict=True):
                transfer.wait()
                # The ring once more behind itself, so that rows in position order lie behind each other.
                again = pl.ds(plan.ring_rows, plan.history)
                buffer[at, again] = buffer[at, : plan.history]
                _put(joined, plan.carry - plan.history, _rows(buffer.at[at], where, plan.history))

    def each(i, _):
        complete = done[sequence + i]

        @pl.when(complete > block * plan.block_windows)
        def _():
            keep_history(i)
            _put(kv_rows, plan.carry, kv[i])
            _put(score_rows, plan.carry, score[i])
            begin = plan.carry - plan.history + plan.ratio - 1 - offset[sequence + i]
            window = 0 if plan.blocks == 1 else block * plan.block_windows
            _pool(plan, kv_rows, score_rows, pooled, begin, window, first[sequence + i])

        @pl.when((block == last) & (complete > 0))
        def _():
            _finish(plan, pooled, rotations, weight, out, i, complete)

        @pl.when((block == last) & (complete == 0))
        def _():
            out[i] = jnp.zeros((plan.windows, plan.width), plan.dtype)

        if rings:
            fetch(i + plan.ahead)

    if rings:
        for i in range(min(plan.ahead, plan.group)):
            fetch(jnp.int32(i))
    lax.fori_loop(0, plan.group, each, None)


def _pool(plan: Plan, kv, score, pooled, begin, window, first):
    """Pools the windows of a block, whose first rows lie at ``begin`` and further on, as ``window`` and the next."""
    strips = plan.width // LANES
    if not plan.strided:

        def one(w, _):
            row = lax.rem(window + w, SUBLANES)
            tile = pl.ds(pl.multiple_of(window + w - row, SUBLANES), SUBLANES)
            place = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) == row
            for strip in range(strips):
                at = pl.ds(strip * LANES, LANES)
                values, scores = (_rows(a.at[strip], begin + w * plan.ratio, plan.ratio) for a in (kv, score))
                weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
                entry = jnp.sum(weights * values, axis=0, keepdims=True) / jnp.sum(weights, axis=0, keepdims=True)
                pooled[tile, at] = jnp.where(place, entry, pooled[tile, at])

        lax.fori_loop(0, plan.block_windows, one, None)
        return

    def several(n, _):
        windows = n * SUBLANES
        number = first + window + windows + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        for strip in range(strips):
            values, scores = [], []
            for i in range(plan.pool_rows):
                before = plan.overlap and i < plan.ratio
                lane = strip + (strips if plan.overlap and not before else 0)
                rows = pl.ds(begin + windows * plan.ratio + i, SUBLANES, stride=plan.ratio)
                value, logit = kv[lane, rows], score[lane, rows]
                values.append(jnp.where(number == 0, 0.0, value) if before else value)
                scores.append(jnp.where(number == 0, -jnp.inf, logit) if before else logit)
            highest = functools.reduce(jnp.maximum, scores)
            weights = [jnp.exp(s - highest) for s in scores]
            total = functools.reduce(jnp.add, weights)
            entry = functools.reduce(jnp.add, [w * v for w, v in zip(weights, values, strict=True)]) / total
            where = pl.ds(pl.multiple_of(window + windows, SUBLANES), SUBLANES)
            pooled[where, strip * LANES : (strip + 1) * LANES] = entry

    lax.fori_loop(0, plan.block_windows // SUBLANES, several, None)


def _put(joined, first, rows):
    """Stores rows [n, channels] in strips, from row ``first`` on."""
    for strip in range(joined.shape[0]):
        joined[strip, first : first + rows.shape[0]] = rows[:, strip * LANES : (strip + 1) * LANES]


def _rows(ref, first, count):
    """``count`` rows of ``ref`` from any row on; a load itself begins at a whole tile."""
    size = _round_up(count, SUBLANES) + SUBLANES
    tile = pl.multiple_of(first // SUBLANES * SUBLANES, SUBLANES)
    loaded = ref[pl.ds(tile, size)]
    return pltpu.roll(loaded, lax.rem(size - lax.rem(first, SUBLANES), size), 0)[:count]


def _finish(plan: Plan, pooled, rotations, weight, out, i, complete):
    """Casts, norms and rotates a sequence's entries; those of windows that did not end are zero."""
    most = 64

    def part(low, count):
        rows = pooled[pl.ds(low, count)].astype(plan.dtype).astype(jnp.float32)
        rows = rows * lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + plan.norm_eps) * weight[...]
        index = low + lax.broadcasted_iota(jnp.int32, (count, LANES), 0)
        lane = lax.broadcasted_iota(jnp.int32, (count, LANES), 1)
        for at in range(0, plan.width, LANES):
            x = rows[:, at : at + LANES].astype(plan.dtype)
            if at == plan.width - LANES:
                x = x.astype(jnp.float32)
                table = rotations[i, pl.ds(low, count)]
                partner = jnp.where(lane % 2 == 0, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
                turned = x * pltpu.roll(table, plan.rope_dims, 1) + partner * table
                x = jnp.where(lane >= LANES - plan.rope_dims, turned, x).astype(plan.dtype)
            out[i, pl.ds(low, count), at : at + LANES] = jnp.where(index < complete, x, jnp.zeros_like(x))

    whole = plan.windows // most
    if whole:
        lax.fori_loop(0, whole, lambda n, _: part(pl.multiple_of(n * most, most), most), None)
    if plan.windows % most:
        part(whole * most, plan.windows % most)


def _fast_memory(plan: Plan) -> int:
    """Double-buffered blocks, joined rows, rings, entries, and what the compiler needs beside them."""
    new = 2 * 2 * plan.group * _round_up(plan.rows, SUBLANES) * plan.channels
    joined = 2 * plan.joined * plan.channels
    rings = 2 * plan.ahead * plan.ring_buffer * plan.channels if plan.ring_rows else 0
    windows = _round_up(plan.windows, 2 * SUBLANES)
    entries = windows * plan.width + 2 * plan.group * windows * (plan.width + LANES)
    return 4 * (new + joined + rings + entries) + 8 * _MIB
