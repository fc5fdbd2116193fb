"""TPU kernel: gradients of the experts' matrices, from rows that the backward pass left sorted by expert.

The grid is (columns of D, tile of M, visit). A visit multiplies a block of one expert's rows into a tile of that
expert's three gradients, which stay in VMEM until the expert's last block: every tile is written once. An expert
without rows has one visit, which writes zeros. What is added to comes by a transfer of its own, hidden behind the
expert's products. No sum depends on anything but the expert's rows and their order.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu_plan import LANES
from pallas_kernels.targets import Chip

_MIB = 1 << 20

_LARGE_MEMORY = 128 * _MIB


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """Block sizes, the numbers that a tuner sweeps: at most so many, in multiples of 128 that divide a dim.

    A grid step has ``width`` of M and ``columns`` of D; a product has ``rows`` of a block and gives ``left`` by
    ``right`` numbers.
    """

    width: int = 1024
    columns: int = 1024
    rows: int = 256
    left: int = 256
    right: int = 1024


def candidates(chip: Chip) -> tuple[WeightTiles, ...]:
    """What a tuner may try."""
    return (
        default_tiles(chip),
        *(
            WeightTiles(width, columns, rows, left)
            for width, columns in ((1024, 1024), (1024, 2048), (512, 2048), (512, 1024))
            for rows in (256, 512)
            for left in (256, 512)
            if WeightTiles(width, columns, rows, left) != default_tiles(chip)
        ),
    )


def default_tiles(chip: Chip | None) -> WeightTiles:
    """Tiles that fit the memory of ``chip``: of twice the columns, rows of M are read half as often."""
    large = chip is not None and chip.fast_memory >= _LARGE_MEMORY
    return WeightTiles(columns=2048) if large else WeightTiles()


class BlockRows(NamedTuple):
    """bfloat16 rows in blocks: x and the result's gradient [B, R, D], those of gate and up, and the input of W2
    [B, R, M]. Rows beyond a block's size hold anything.
    """

    x: jax.Array
    gradient: jax.Array
    of_gate: jax.Array
    of_up: jax.Array
    hidden: jax.Array


class Visits(NamedTuple):
    """What grid steps do: ``block`` of ``expert``, of which ``size`` rows count [B + E]; ``used`` of them."""

    expert: jax.Array
    block: jax.Array
    size: jax.Array
    used: jax.Array


def visits_of(expert: jax.Array, size: jax.Array, experts: int) -> Visits:
    """The visits to blocks [B] that are sorted by expert, those of no rows last; at least one of every expert."""
    every = jnp.arange(experts, dtype=jnp.int32)
    mine = (expert[None, :] == every[:, None]) & (size > 0)[None, :]
    count = jnp.sum(mine, axis=1, dtype=jnp.int32)
    first = jnp.sum(jnp.where(every[None, :] < every[:, None], count[None, :], 0), axis=1, dtype=jnp.int32)
    visits = jnp.maximum(count, 1)
    before = jnp.sum(jnp.where(every[None, :] < every[:, None], visits[None, :], 0), axis=1, dtype=jnp.int32)
    index = jnp.arange(expert.size + experts, dtype=jnp.int32)
    chosen = (before <= index[:, None]) & (index[:, None] < before + visits)

    def look_up(values):
        return jnp.sum(jnp.where(chosen, values, 0), axis=1, dtype=jnp.int32)

    nth = index - look_up(before)
    block = jnp.minimum(look_up(first) + nth, expert.size - 1)
    return Visits(look_up(every), block, jnp.where(nth < look_up(count), size[block], 0), jnp.sum(visits))


def weight_gradients(
    rows: BlockRows,
    expert: jax.Array,
    size: jax.Array,
    experts: int,
    totals: tuple[jax.Array, ...] | None,
    *,
    tiles: WeightTiles,
    cores: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """float32 gradients of W1 [E, M, D], W2 [E, D, M] and W3 [E, M, D], added to ``totals`` if there are any.

    Blocks are those of ``expert`` and ``size`` [B], as ``visits_of`` takes them; ``cores`` share the columns of D.
    """
    _, block_rows, hidden = rows.x.shape
    width = rows.hidden.shape[-1]
    visits = visits_of(expert, size, experts)
    tiles = _fitted(tiles, block_rows, hidden // cores, width)
    shapes = ((experts, width, hidden), (experts, hidden, width), (experts, width, hidden))
    blocks = ((tiles.width, tiles.columns), (tiles.columns, tiles.width), (tiles.width, tiles.columns))
    of_columns = pl.BlockSpec((None, block_rows, tiles.columns), lambda i, j, v, e, b, s: (b[v], 0, i))
    of_width = pl.BlockSpec((None, block_rows, tiles.width), lambda i, j, v, e, b, s: (b[v], 0, j))
    result = pl.BlockSpec((None, *blocks[0]), lambda i, j, v, e, b, s: (e[v], j, i))
    of_down = pl.BlockSpec((None, *blocks[1]), lambda i, j, v, e, b, s: (e[v], i, j))
    prefetch, added = visits[:3], totals or ()
    scratch = [*(pltpu.VMEM(block, jnp.float32) for block in blocks), pltpu.SemaphoreType.DMA((3,))]
    found = pl.pallas_call(
        functools.partial(_kernel, tiles, bool(added)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(hidden // tiles.columns, width // tiles.width, visits.used),
            in_specs=[of_columns, of_columns, of_width, of_width, of_width]
            + [pl.BlockSpec(memory_space=pltpu.HBM)] * len(added),
            out_specs=[result, of_down, result],
            scratch_shapes=scratch if added else [],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        input_output_aliases={len(prefetch) + len(rows) + i: i for i in range(len(added))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(tiles, block_rows, bool(added)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * rows.x.size * width,
            bytes_accessed=_moved(rows, tiles, experts, bool(added)),
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="expert_weight_gradient",
    )(*prefetch, *rows, *added)
    return tuple(found)


def _fitted(tiles: WeightTiles, rows: int, columns: int, width: int) -> WeightTiles:
    """The sizes that divide what there is."""
    columns, width = _divisor(columns, tiles.columns), _divisor(width, tiles.width)
    return WeightTiles(width, columns, _divisor(rows, tiles.rows), tiles.left, tiles.right)


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides ``size`` and is at most ``most``."""
    return next(part for part in range(min(size, most) // LANES * LANES, 0, -LANES) if size % part == 0)


def _vmem_bytes(tiles: WeightTiles, rows: int, adds: bool) -> int:
    """Two buffers of results and of rows, one of what is added to, and what the compiler needs beside them."""
    result = 3 * 4 * tiles.width * tiles.columns
    of_rows = 2 * rows * (2 * tiles.columns + 3 * tiles.width)
    return (3 if adds else 2) * result + 2 * of_rows + 8 * _MIB


def _moved(rows: BlockRows, tiles: WeightTiles, experts: int, adds: bool) -> int:
    """Bytes: rows are read once per tile of the other dim, results written once, and read if they are added to."""
    hidden, width = rows.x.shape[-1], rows.hidden.shape[-1]
    read = 2 * 2 * rows.x.size * (width // tiles.width) + 2 * 3 * rows.hidden.size * (hidden // tiles.columns)
    return read + (2 if adds else 1) * 3 * 4 * experts * hidden * width


def _kernel(tiles: WeightTiles, adds: bool, expert, block, size, x, gradient, of_gate, of_up, hidden, *refs):
    del block
    totals, results = (refs[:3], refs[3:6]) if adds else ((), refs[:3])
    column, tile, visit = (pl.program_id(i) for i in range(3))
    here, count = expert[visit], size[visit]
    last = pl.num_programs(2) - 1
    begins = (visit == 0) | (expert[jnp.maximum(visit - 1, 0)] != here)
    ends = (visit == last) | (expert[jnp.minimum(visit + 1, last)] != here)

    def copies():
        *targets, semaphores = refs[6:]
        wide, deep = pl.ds(column * tiles.columns, tiles.columns), pl.ds(tile * tiles.width, tiles.width)
        places = ((deep, wide), (wide, deep), (deep, wide))
        return [
            pltpu.make_async_copy(total.at[here, *place], target, semaphores.at[i])
            for i, (total, place, target) in enumerate(zip(totals, places, targets, strict=True))
        ]

    @pl.when(begins)
    def begin():
        for copy in copies() if adds else ():
            copy.start()
        for result in results:
            _each_rows(result, lambda result, at: jnp.zeros((LANES, result.shape[1]), jnp.float32))

    def add(start, valid):
        at = pl.ds(pl.multiple_of(start, tiles.rows), tiles.rows)
        w1, w2, w3 = results
        for result, left, right in ((w1, of_gate, x), (w2, gradient, hidden), (w3, of_up, x)):
            _add_product(tiles, result, left, right, at, valid)

    whole = count // tiles.rows
    lax.fori_loop(0, whole, lambda i, _: add(i * tiles.rows, None), None)
    pl.when(whole * tiles.rows < count)(lambda: add(whole * tiles.rows, count - whole * tiles.rows))

    if adds:

        @pl.when(ends)
        def add_totals():
            for copy, result, total in zip(copies(), results, refs[6:9], strict=True):
                copy.wait()
                _each_rows(result, lambda result, at, total=total: result[at, :] + total[at, :])


def _each_rows(result, value) -> None:
    """``result`` becomes ``value(result, rows)`` of every 128 of its rows."""

    def put(i, _):
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        result[at, :] = value(result, at)

    lax.fori_loop(0, result.shape[0] // LANES, put, None)


def _add_product(tiles: WeightTiles, result, left, right, rows, valid) -> None:
    """Adds left^T right of these rows, of which the first ``valid`` count (None: all), to a tile of a result."""
    some, many = _divisor(left.shape[1], tiles.left), _divisor(right.shape[1], tiles.right)

    def columns(ref, i, count):
        value = ref[rows, pl.ds(pl.multiple_of(i * count, count), count)]
        if valid is None:
            return value
        # What lies beyond may be NaN, on both sides of the product.
        inside = lax.broadcasted_iota(jnp.int32, value.shape, 0) < valid
        return jnp.where(inside, value.astype(jnp.float32), 0.0).astype(value.dtype)

    def of_left(i, _):
        transposed = columns(left, i, some).T

        def of_right(j, _):
            at = pl.ds(pl.multiple_of(i * some, some), some), pl.ds(pl.multiple_of(j * many, many), many)
            result[at] += jnp.dot(transposed, columns(right, j, many), preferred_element_type=jnp.float32)

        lax.fori_loop(0, right.shape[1] // many, of_right, None)

    lax.fori_loop(0, left.shape[1] // some, of_left, None)
