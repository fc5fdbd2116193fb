"""Bringing selected values together in fast memory, for the TPU kernel of ``index_topk``.

First along the chunks: the j-th selected value of each of the 1,024 places of a chunk goes to layer j, so that what was
spread over hundreds of chunks lies in a few. Then along rows and lanes: every element knows by how far it must move,
and moves by the powers of two in it from the lowest up, in which order no two meet.

With many chunks, candidates are picked first. The k-th largest of the maxima over groups of chunks is below the k-th
largest of all, and seldom far below: what reaches it fits in a few layers, which are then searched instead of all
chunks. Where it does not fit, as with many ties, all chunks are searched.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.index_topk.tpu_search import (
    CANDIDATES,
    CHUNK,
    FEW,
    GROUPS,
    HIGHEST,
    LANES,
    LOWEST,
    SUBLANES,
    TILE,
    Memory,
    Selection,
    empty_chunks,
    kth_largest,
    positions,
    search,
)

_MOVE_BITS = 13


def prepare(s: Selection, m: Memory) -> None:
    """Before the first ``keep`` of a step."""
    if s.narrows:

        def clear(query, _):
            for group in range(GROUPS):
                m.most[query, group] = jnp.full(TILE, LOWEST, jnp.int32)

        lax.fori_loop(0, s.queries, clear, None)


def keep(s: Selection, m: Memory, query, chunk, values: jax.Array) -> None:
    """Stores the values of a chunk."""
    m.scores[query, chunk] = values
    if s.narrows:
        group = lax.rem(chunk, GROUPS)
        m.most[query, group] = jnp.maximum(m.most[query, group], values)


def select(s: Selection, m: Memory, chunks, chunks_of: Callable[[Any], Any], indices, ordered) -> None:
    """Writes indices and values of the k largest of every query, in no particular order; -1 and LOWEST behind them.

    ``chunks`` is the most that a query has, ``chunks_of`` gives those of one; all hold values up to a loop's turn.
    """
    narrowed = narrow(s, m, chunks, chunks_of) if s.narrows else None

    def index_of(query, chunk):
        index = positions() + chunk * CHUNK
        if narrowed is None:
            return index
        return jnp.where(narrowed == 1, m.origin[query, jnp.minimum(chunk, CANDIDATES - 1)], index)

    def remaining(chunks):
        return chunks if narrowed is None else jnp.where(narrowed == 1, CANDIDATES, chunks)

    search(s, m, remaining(chunks), index_of)

    def finish(index, _):
        queries = [index * s.together + own for own in range(s.together)]
        _place(s, m, queries, lambda query: remaining(chunks_of(query)), index_of)
        for own, query in enumerate(queries):
            indices[0, query] = m.moves[own, : s.rows_out, :]
            ordered[0, query] = m.values[own, : s.rows_out, :]

    lax.fori_loop(0, s.queries // s.together, finish, None)


def narrow(s: Selection, m: Memory, chunks, chunks_of: Callable[[Any], Any]) -> jax.Array:
    """1 if candidates have taken the place of every query's first chunks, with their indices in ``origin``; or 0."""

    def pick() -> jax.Array:
        value, _, _ = kth_largest(s, m.most, GROUPS)
        m.kth[...] = jnp.broadcast_to(value, (s.queries, LANES))
        m.last[...] = jnp.full((s.queries, LANES), HIGHEST, jnp.int32)

        def fold(query, most):
            rank, found, origin = _layers(
                s, m, query, chunks_of(query), lambda query, chunk: positions() + chunk * CHUNK, 0, CANDIDATES
            )
            for layer in range(CANDIDATES):
                m.found[query, layer] = found[layer]
                m.origin[query, layer] = origin[layer]
            return jnp.maximum(most, jnp.max(rank))

        fits = lax.fori_loop(0, s.queries, fold, jnp.int32(0)) <= CANDIDATES

        @pl.when(fits)
        def replace():
            def each(query, _):
                m.scores[query, pl.ds(0, CANDIDATES)] = m.found[query]
                empty_chunks(s, m.scores, (0,), query, CANDIDATES, CANDIDATES)

            lax.fori_loop(0, s.queries, each, None)

        return fits.astype(jnp.int32)

    return lax.cond(chunks > FEW, pick, lambda: jnp.int32(0))


def _layers(s: Selection, m: Memory, query, chunks, index_of, first, count: int):
    """Selected values of a query by their rank among those of their place: ranks first .. first + count - 1.

    Returns how many each place has, less ``first``; the values and the indices of each rank, LOWEST and -1 for none.
    """
    smallest = jnp.broadcast_to(m.kth[pl.ds(query, 1), :], TILE)
    final = jnp.broadcast_to(m.last[pl.ds(query, 1), :], TILE)

    def look(pair, carry):
        rank, found, origin = carry
        for chunk in (2 * pair, 2 * pair + 1):
            some, index = m.scores[query, chunk], index_of(query, chunk)
            selected = (some > smallest) | ((some == smallest) & (index <= final))
            hits = [selected & (rank == layer) for layer in range(count)]
            found = tuple(jnp.where(hit, some, old) for hit, old in zip(hits, found, strict=True))
            origin = tuple(jnp.where(hit, index, old) for hit, old in zip(hits, origin, strict=True))
            rank = rank + selected.astype(jnp.int32)
        return rank, found, origin

    nothing = (jnp.full(TILE, LOWEST, jnp.int32),) * count, (jnp.full(TILE, -1, jnp.int32),) * count
    return lax.fori_loop(0, pl.cdiv(chunks, 2), look, (jnp.full(TILE, 0, jnp.int32) - first, *nothing))


def _place(s: Selection, m: Memory, queries: list, chunks_of: Callable[[Any], Any], index_of) -> None:
    """Packs what ``search`` selected of a few queries to the front of ``values``, with its indices in ``moves``."""
    m.moves[...] = jnp.full(m.moves.shape, -1, jnp.int32)
    m.values[...] = jnp.full(m.values.shape, LOWEST, jnp.int32)
    m.turned[:, :, s.rows :, :] = jnp.full((s.together, 2, SUBLANES, LANES), -1, jnp.int32)

    def collect(state):
        """Adds a few layers; how many there are follows from the first pass."""
        first, most = state
        for own, query in enumerate(queries):
            rank, found, origin = _layers(s, m, query, chunks_of(query), index_of, first, s.layers)
            for layer in range(s.layers):
                at = pl.ds(s.collected + layer * SUBLANES, SUBLANES)
                m.values[own, at, :] = found[layer]
                m.moves[own, at, :] = origin[layer]
            most = jnp.maximum(most, jnp.max(rank) + first)
        _pack(s, [(m.values.at[own], m.moves.at[own], m.turned.at[own]) for own in range(len(queries))])
        return first + s.layers, most

    lax.while_loop(lambda state: state[0] < state[1], collect, (jnp.int32(0), jnp.int32(1)))


def _pack(s: Selection, several: list) -> None:
    """Moves elements (index in ``moves`` not negative) of the first ``rows`` rows to the front, rows of 128 in order.

    ``several`` are (values, moves, room for both, turned); rows behind the first are empty (-1) and stay so.
    """
    rows = s.rows
    row = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    for _, moves, _ in several:
        index = moves[:rows, :]
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
        for values, moves, turned in several:
            own, value = moves[:rows, :], values[:rows, :]
            if by < LANES:
                arriving = _from_lanes(own, turned.at[0], by, lane)
                its_value = _from_lanes(value, turned.at[1], by, lane)
            else:
                at = slice(by // LANES, rows + by // LANES)
                arriving, its_value = moves[at, :], values[at, :]
            comes = moving(arriving, bit)
            moves[:rows, :] = jnp.where(comes, arriving, jnp.where(moving(own, bit), -1, own))
            values[:rows, :] = jnp.where(comes, its_value, value)
    for values, moves, _ in several:
        packed = moves[:rows, :]
        moves[:rows, :] = packed >> _MOVE_BITS
        values[:rows, :] = jnp.where(packed < 0, LOWEST, values[:rows, :])


def _from_lanes(own: jax.Array, turned, by: int, lane: jax.Array) -> jax.Array:
    """What lies ``by`` < 128 places behind each place of rows; ``turned`` is room for one row more, which is empty."""
    rows = own.shape[0]
    same = pltpu.roll(own, LANES - by, 1)
    turned[:rows, :] = same
    return jnp.where(lane < LANES - by, same, turned[1 : rows + 1, :])


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
