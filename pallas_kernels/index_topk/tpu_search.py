"""The k-th largest of integers in fast memory, exactly, for the TPU kernel of ``index_topk``; its sizes and scratch.

Values lie as [Q, chunks, 8, 128], entry s of a query at chunk s / 1024, row s / 128 mod 8, lane s mod 128. The k-th
largest value of every query is found bit by bit, and where more values equal it than fit, the last index that still
counts. What is found does not depend on how values are laid out, nor on the other queries.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
CHUNK = SUBLANES * LANES
TILE = (SUBLANES, LANES)
LOWEST = -(1 << 31)
"""Below every score: what is not visible."""
HIGHEST = (1 << 31) - 1

MAX_ENTRIES = 1 << 18
"""Entries whose index fits in an integer beside the way that an element has to move (``tpu_place``)."""

GROUPS = 8
"""Groups of chunks, chunk c in group c mod 8, whose maxima bound what is selected from below."""
CANDIDATES = 8
"""Layers of candidates that stay of many chunks."""
FEW = 16
"""Chunks that are searched as they are."""

_LAYERS = 7
_TILES_AT_A_TIME = 16


@dataclasses.dataclass(frozen=True)
class Selection:
    """Sizes: ``chunks`` of 1,024 values, of which ``unroll`` are looked at in a turn of a loop; ``layers`` per pass.

    ``narrows``: chunks are so many that candidates are picked first (``tpu_place.narrow``).
    """

    queries: int
    chunks: int
    unroll: int
    layers: int
    k: int
    narrows: bool
    interpreted: bool

    @staticmethod
    def of(*, queries: int, entries: int, k: int, interpreted: bool) -> "Selection":
        """For ``entries`` values of each query."""
        chunks = -(-entries // CHUNK)
        unroll = 1
        while 2 * unroll * queries <= _TILES_AT_A_TIME and unroll < chunks:
            unroll *= 2
        fill = max(2, unroll)
        layers = min(_LAYERS, chunks)
        return Selection(queries, -(-chunks // fill) * fill, unroll, layers, k, chunks > FEW, interpreted)

    @property
    def fill(self) -> int:
        """Loops over chunks may look at the rest of so many."""
        return max(2, self.unroll)

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

    @property
    def together(self) -> int:
        """Queries that are packed at a time, for the sake of what a core can do at once."""
        return 2 - self.queries % 2

    def scratch_shapes(self) -> list[Any]:
        """What ``Memory`` holds."""
        shapes = [
            (self.queries, self.chunks, *TILE),
            (self.queries, LANES),
            (self.queries, LANES),
            (self.together, 2 * self.rows, LANES),
            (self.together, 2 * self.rows, LANES),
            (self.together, 2, self.rows + SUBLANES, LANES),
        ]
        if self.narrows:
            shapes += [(self.queries, count, *TILE) for count in (GROUPS, CANDIDATES, CANDIDATES)]
        return [pltpu.VMEM(shape, jnp.int32) for shape in shapes]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the scratch."""
        tiles = (
            self.queries * (self.chunks + self.narrows * (GROUPS + 2 * CANDIDATES) + 2) + 8 * self.together * self.rows
        )
        return 4 * CHUNK * tiles


class Memory(NamedTuple):
    """Scratch: values; the k-th value and the last index of each query; what is packed of a few queries, and its moves.

    For narrowing also the largest values of groups of chunks, place by place, and candidates with their indices.
    """

    scores: Any
    kth: Any
    last: Any
    values: Any
    moves: Any
    turned: Any
    most: Any = None
    found: Any = None
    origin: Any = None


def positions() -> jax.Array:
    """The place of each value of a chunk in it: [8, 128]."""
    return lax.broadcasted_iota(jnp.int32, TILE, 0) * LANES + lax.broadcasted_iota(jnp.int32, TILE, 1)


def empty_chunks(s: Selection, scores, queries, offset, first, chunks) -> None:
    """Fills up queries that have ``first`` chunks to the last turn of a loop over ``chunks``."""

    def empty(chunk, _):
        for query in queries:
            scores[offset + query, chunk] = jnp.full(TILE, LOWEST, jnp.int32)

    lax.fori_loop(first, pl.cdiv(chunks, s.fill) * s.fill, empty, None)


def _counted(s: Selection, ref, chunks, selects: Callable[[int, jax.Array, Any], jax.Array]) -> jax.Array:
    """How many of each query's values [8, 128] of a chunk ``selects(query, values, chunk)``: float32 [Q, 1]."""

    def turn(index, totals):
        totals = list(totals)
        for query in range(s.queries):
            tiles = ref[query, pl.ds(index * s.unroll, s.unroll)]
            for tile in range(s.unroll):
                hits = selects(query, tiles[tile], index * s.unroll + tile)
                totals[query] = totals[query] + jnp.where(hits, 1.0, 0.0)
        return tuple(totals)

    zeros = jnp.zeros(TILE, jnp.float32)
    totals = lax.fori_loop(0, pl.cdiv(chunks, s.unroll), turn, (zeros,) * s.queries)
    rows = jnp.concatenate([jnp.sum(total, axis=0, keepdims=True) for total in totals], axis=0)
    return jnp.sum(rows, axis=1, keepdims=True)


def _each(s: Selection, column: jax.Array) -> list[jax.Array]:
    """[Q, 1] as a tile for each query."""
    return [jnp.broadcast_to(column[query : query + 1], TILE) for query in range(s.queries)]


def kth_largest(s: Selection, ref, chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A value of each query that at least k of its values reach, all that are visible if these are fewer; [Q, 1] each.

    With ``done`` 1 no more than k reach it; otherwise it is the k-th largest, and too many equal it. Also how many are
    wanted: k, or all that are visible.
    """
    visible = _counted(s, ref, chunks, lambda query, values, chunk: values > LOWEST)
    wanted = jnp.minimum(visible, float(s.k))
    done = (visible <= s.k).astype(jnp.int32)
    value = jnp.where(done == 1, LOWEST + 1, LOWEST)

    def pending(done):
        return jnp.max(1 - done)

    def next_bit(state):
        bit, value, done, _ = state
        # Adding the highest bit to LOWEST makes 0: from there on bits are added to a number that lacks them.
        trial = value + (jnp.int32(1) << bit)
        tiles = _each(s, trial)
        count = _counted(s, ref, chunks, lambda query, values, chunk: values >= tiles[query])
        value = jnp.where((done == 0) & (count >= wanted), trial, value)
        done = done | (count == wanted).astype(jnp.int32)
        return bit - 1, value, done, pending(done)

    def unfinished(state):
        return (state[0] >= 0) & (state[-1] > 0)

    _, value, done, _ = lax.while_loop(unfinished, next_bit, (jnp.int32(31), value, done, pending(done)))
    return value, done, wanted


def search(s: Selection, m: Memory, chunks, index_of: Callable[[int, Any], jax.Array]) -> None:
    """Writes the smallest selected value of each query, and the last index at which that value is selected.

    ``index_of(query, chunk)`` gives the indices of a chunk's values.
    """
    value, done, wanted = kth_largest(s, m.scores, chunks)
    tiles = _each(s, value)
    m.kth[...] = jnp.broadcast_to(value, (s.queries, LANES))
    m.last[...] = jnp.full((s.queries, LANES), HIGHEST, jnp.int32)

    @pl.when(jnp.min(done) == 0)
    def resolve_ties():
        missing = wanted - _counted(s, m.scores, chunks, lambda query, values, chunk: values > tiles[query])

        def next_bit(step, index):
            trial = index + (jnp.int32(1) << (bits - 1 - step))
            ends = _each(s, trial)

            def before(query, values, chunk):
                return (values == tiles[query]) & (index_of(query, chunk) < ends[query])

            return jnp.where(_counted(s, m.scores, chunks, before) < missing, trial, index)

        # The largest index before which too few are tied: with the one at it they are enough.
        bits = (s.chunks * CHUNK - 1).bit_length()
        index = lax.fori_loop(0, bits, next_bit, jnp.zeros((s.queries, 1), jnp.int32))
        index = jnp.where(done == 0, index, HIGHEST)
        m.last[...] = jnp.broadcast_to(index, (s.queries, LANES))
