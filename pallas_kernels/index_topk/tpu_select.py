"""The exact k largest of integers in fast memory, for the TPU kernel of ``index_topk``.

Values lie as [Q, chunks, 8, 128], entry s of a query at chunk s / 1024, row s / 128 mod 8, lane s mod 128. ``search``
finds the k-th largest value of every query bit by bit, and where more values equal it than fit, the last index that
still counts. ``place`` moves what is selected to the front. First along the chunks: the j-th selected value of each of
the 1,024 positions of a chunk goes to layer j, a few layers per pass, so that what was spread over hundreds of chunks
lies in a few. Then along rows and lanes: every element knows by how far it must move, and moves by the powers of two in
it from the lowest up, in which order no two meet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
CHUNK = SUBLANES * LANES
LOWEST = -(1 << 31)
"""Below every score: what is not visible."""

MAX_ENTRIES = 1 << 18
"""Entries whose index fits in an integer beside the way that an element has to move."""

_LAYERS = 7
_MOVE_BITS = 13
_TILES_AT_A_TIME = 16


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sizes: ``chunks`` of 1,024 values, of which ``unroll`` are looked at in a turn of a loop; ``layers`` per pass."""

    queries: int
    chunks: int
    unroll: int
    layers: int
    k: int
    interpreted: bool

    @staticmethod
    def of(*, queries: int, entries: int, k: int, interpreted: bool) -> "Selection":
        """For ``entries`` values of each query."""
        chunks = -(-entries // CHUNK)
        unroll = min(max(1, _TILES_AT_A_TIME // queries), chunks)
        return Selection(queries, -(-chunks // unroll) * unroll, unroll, min(_LAYERS, chunks), k, interpreted)

    @property
    def rows_out(self) -> int:
        """Rows of 128 that hold k."""
        return -(-self.k // LANES)

    @property
    def collected(self) -> int:
        """Rows in whole tiles that hold what has been collected."""
        return -(-self.k // CHUNK) * SUBLANES

    @property
    def rows(self) -> int:
        """Rows that are packed at a time: what has been collected, and the layers of a pass."""
        return self.collected + self.layers * SUBLANES

    def scratch_shapes(self) -> list[Any]:
        """Values; the k-th value and the last index per query; what is being packed; constants of its sums."""
        return [
            pltpu.VMEM((self.queries, self.chunks, SUBLANES, LANES), jnp.int32),
            pltpu.VMEM((self.queries, LANES), jnp.int32),
            pltpu.VMEM((self.queries, LANES), jnp.int32),
            pltpu.VMEM((2 * self.rows, LANES), jnp.int32),
            pltpu.VMEM((2 * self.rows, LANES), jnp.int32),
        ]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the scratch."""
        return 4 * LANES * (self.queries * (SUBLANES * self.chunks + 2 * SUBLANES) + 4 * self.rows)


def empty_chunks(s: Selection, scores, queries, offset, first, chunks) -> None:
    """Fills up queries that have ``first`` chunks to the last turn of a loop over ``chunks``."""

    def empty(chunk, _):
        for query in queries:
            scores[offset + query, chunk] = jnp.full((SUBLANES, LANES), LOWEST, jnp.int32)

    lax.fori_loop(first, pl.cdiv(chunks, s.unroll) * s.unroll, empty, None)


def search(s: Selection, scores, chunks, kth, last, *_) -> None:
    """Writes the smallest selected value of each query, and the last index at which that value is selected."""

    def counted(selects: Callable[[int, jax.Array, Any], jax.Array]) -> jax.Array:
        """How many of each query's values [8, 128] of a chunk ``selects(query, values, chunk)``: float32 [Q, 1]."""

        def turn(index, totals):
            totals = list(totals)
            for query in range(s.queries):
                tiles = scores[query, pl.ds(index * s.unroll, s.unroll)]
                for tile in range(s.unroll):
                    hits = selects(query, tiles[tile], index * s.unroll + tile)
                    totals[query] = totals[query] + jnp.where(hits, 1.0, 0.0)
            return tuple(totals)

        zeros = jnp.zeros((SUBLANES, LANES), jnp.float32)
        totals = lax.fori_loop(0, pl.cdiv(chunks, s.unroll), turn, (zeros,) * s.queries)
        rows = jnp.concatenate([jnp.sum(total, axis=0, keepdims=True) for total in totals], axis=0)
        return jnp.sum(rows, axis=1, keepdims=True)

    def each(column: jax.Array) -> list[jax.Array]:
        """[Q, 1] as a tile for each query."""
        return [jnp.broadcast_to(column[query : query + 1], (SUBLANES, LANES)) for query in range(s.queries)]

    def open_after(done: jax.Array) -> jax.Array:
        return jnp.max(1 - done)

    visible = counted(lambda query, values, chunk: values > LOWEST)
    wanted = jnp.minimum(visible, float(s.k))
    done = (visible <= s.k).astype(jnp.int32)
    value = jnp.where(done == 1, LOWEST + 1, LOWEST)

    def next_bit(state):
        bit, value, done, _ = state
        # Adding the highest bit to LOWEST makes 0: from there on bits are added to a number that lacks them.
        trial = value + (jnp.int32(1) << bit)
        tiles = each(trial)
        count = counted(lambda query, values, chunk: values >= tiles[query])
        value = jnp.where((done == 0) & (count >= wanted), trial, value)
        done = done | (count == wanted).astype(jnp.int32)
        return bit - 1, value, done, open_after(done)

    def unfinished(state):
        return (state[0] >= 0) & (state[-1] > 0)

    _, value, done, some_tie = lax.while_loop(unfinished, next_bit, (jnp.int32(31), value, done, open_after(done)))
    tiles = each(value)
    kth[...] = jnp.broadcast_to(value, (s.queries, LANES))
    last[...] = jnp.full((s.queries, LANES), (1 << 31) - 1, jnp.int32)

    @pl.when(some_tie > 0)
    def resolve_ties():
        position = positions()
        missing = wanted - counted(lambda query, values, chunk: values > tiles[query])

        def next_index_bit(step, index):
            trial = index + (jnp.int32(1) << (bits - 1 - step))
            ends = each(trial)
            count = counted(
                lambda query, values, chunk: (values == tiles[query]) & (position + chunk * CHUNK < ends[query])
            )
            return jnp.where(count < missing, trial, index)

        # The largest index before which too few are tied: with the one at it they are enough.
        bits = (s.chunks * CHUNK - 1).bit_length()
        index = lax.fori_loop(0, bits, next_index_bit, jnp.zeros((s.queries, 1), jnp.int32))
        index = jnp.where(done == 0, index, (1 << 31) - 1)
        last[...] = jnp.broadcast_to(index, (s.queries, LANES))


def place(s: Selection, scores, query, chunks, indices, ordered, kth, last, values, moves) -> None:
    """Writes indices and values of what ``search`` selected of one query, packed in no particular order; -1, LOWEST."""
    smallest = jnp.broadcast_to(kth[pl.ds(query, 1), :], (SUBLANES, LANES))
    final = jnp.broadcast_to(last[pl.ds(query, 1), :], (SUBLANES, LANES))
    position = positions()
    tile = (SUBLANES, LANES)
    moves[...] = jnp.full(moves.shape, -1, jnp.int32)
    values[...] = jnp.full(values.shape, LOWEST, jnp.int32)

    def collect(state):
        """Layers first .. first + layers - 1 to the front; how many there are follows from the first pass."""
        first, _ = state

        def look(chunk, carry):
            rank, found, where = carry
            some = scores[query, chunk]
            index = position + chunk * CHUNK
            selected = (some > smallest) | ((some == smallest) & (index <= final))
            hits = [selected & (rank == layer) for layer in range(s.layers)]
            found = tuple(jnp.where(hit, some, old) for hit, old in zip(hits, found, strict=True))
            where = tuple(jnp.where(hit, index, old) for hit, old in zip(hits, where, strict=True))
            return rank + selected.astype(jnp.int32), found, where

        nothing = (jnp.full(tile, LOWEST, jnp.int32),) * s.layers, (jnp.full(tile, -1, jnp.int32),) * s.layers
        rank, found, where = lax.fori_loop(0, chunks, look, (jnp.full(tile, 0, jnp.int32) - first, *nothing))
        for layer in range(s.layers):
            at = pl.ds(s.collected + layer * SUBLANES, SUBLANES)
            values[at, :] = found[layer]
            moves[at, :] = where[layer]
        _pack(s, values, moves)
        return first + s.layers, jnp.max(rank) + first

    lax.while_loop(lambda state: state[0] < state[1], collect, (jnp.int32(0), jnp.int32(1)))
    indices[0, query] = moves[: s.rows_out, :]
    ordered[0, query] = values[: s.rows_out, :]


def _pack(s: Selection, values, moves) -> None:
    """Moves elements (index in ``moves`` not negative) of the first ``rows`` rows to the front, rows of 128 in order.

    Rows behind them are empty (-1) and stay so.
    """
    rows = s.rows
    index = moves[:rows, :]
    row = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    there = (index >= 0).astype(jnp.float32)
    before = _product(s, there, _triangle(LANES))
    total = _product(s, there, jnp.ones((LANES, LANES), jnp.float32))
    above = _product(s, _triangle(rows).T, total)
    distance = row * LANES + lane - (above + before).astype(jnp.int32)
    moves[:rows, :] = jnp.where(index >= 0, (index << _MOVE_BITS) + distance, -1)

    def moving(packed, bit):
        return (packed & (LOWEST | (1 << bit))) == (1 << bit)

    for bit in range((rows * LANES - 1).bit_length()):
        by = 1 << bit
        own, value = moves[:rows, :], values[:rows, :]
        if by < LANES:
            follows = lane < LANES - by
            arriving, its_value = (_from_lanes(ref, rows, by, follows) for ref in (moves, values))
        else:
            at = slice(by // LANES, rows + by // LANES)
            arriving, its_value = moves[at, :], values[at, :]
        comes = moving(arriving, bit)
        moves[:rows, :] = jnp.where(comes, arriving, jnp.where(moving(own, bit), -1, own))
        values[:rows, :] = jnp.where(comes, its_value, value)
    packed = moves[:rows, :]
    moves[:rows, :] = packed >> _MOVE_BITS
    values[:rows, :] = jnp.where(packed < 0, LOWEST, values[:rows, :])


def _from_lanes(ref, rows: int, by: int, follows: jax.Array) -> jax.Array:
    """What lies ``by`` < 128 places behind each place of the first rows; ``follows``: in the same row."""
    turned, below = (pltpu.roll(ref[start : rows + start, :], LANES - by, 1) for start in (0, 1))
    return jnp.where(follows, turned, below)


def positions() -> jax.Array:
    """The place of each value of a chunk in it: [8, 128]."""
    shape = (SUBLANES, LANES)
    return lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lax.broadcasted_iota(jnp.int32, shape, 1)


def _triangle(size: int) -> jax.Array:
    """Ones above the diagonal: x @ triangle sums what is before."""
    shape = (size, size)
    above = lax.broadcasted_iota(jnp.int32, shape, 0) < lax.broadcasted_iota(jnp.int32, shape, 1)
    return above.astype(jnp.float32)


def _product(s: Selection, a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b of whole numbers up to 256, which bfloat16 holds; sums are exact in float32."""
    if not s.interpreted:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
