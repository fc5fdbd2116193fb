"""GPU kernel (Pallas on Triton): attention over the window, compressed entries and the sink in one pass.

A program is one query and a block of its heads, which share every key: [heads, c] times [keys, c] feeds the tensor
cores. Keys come by row from where they lie, the window's from ring or chunk by position, entries by number, those
selected by index; each is loaded once and serves as value too. A row comes in tiles of channels, whatever form the
cache keeps it in (``gpu_rows``), and from there on all forms take the same path. The softmax starts at the sink,
(maximum, total, accumulator) = (sink, 1, 0), and visits blocks of keys in an order that depends on the row alone.

A decode step has few queries, and one that attends to all entries may have 8,192 of them: these are then split over
programs, a fixed number to each, and the parts are joined in order. They are few at a time, so that they take little
memory. How entries are split depends neither on the batch nor, as parts without keys change nothing, on the capacity.

Written on the Triton backend of Pallas, which jax 0.10.2 has and 0.11 calls deprecated. Nothing here was ever timed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.execution import dot_precision
from deepseek_v4.stored_rows import KVRows
from pallas_kernels.compressed_attention.blocks import Blocks, blocks_for
from pallas_kernels.compressed_attention.gpu_rows import (
    LEAST_PRODUCT,
    addressable,
    load_tiles,
    tiles_of,
    unserved_released,
)
from pallas_kernels.compressed_attention.unserved import unserved_types
from pallas_kernels.targets import Chip, current_chip

_FEW_QUERIES = 8
"""Most queries per row of calls whose entries are split; longer ones are chunks of prompts, which fill a GPU."""

_PART_BYTES = 15 << 20
"""Most memory of parts that wait to be joined."""

_NO_SCORE = -1e30
"""Below every score, and finite."""


def unserved(q: Any, entries: Any, ring: Any = None, *, compiled: bool = True) -> str | None:
    """Why the kernel cannot serve arguments of these shapes and types, or None. ``compiled``: not interpreted."""
    heads, width = q.shape[2:]
    for rows in (entries, ring):
        if isinstance(rows, KVRows) and (reason := unserved_released(q, rows, compiled=compiled)):
            return reason
    if isinstance(ring, KVRows) and not isinstance(entries, KVRows) and getattr(entries, "dtype", None) == jnp.uint32:
        return "entries in words beside a ring in the released bytes"
    if reason := unserved_types(q, None if isinstance(entries, KVRows) else entries):
        return reason
    if width % 2:
        return f"head_dim {width} is odd"
    if compiled and q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}, expected bfloat16"
    if compiled and (width & (width - 1) or width < 2 * LEAST_PRODUCT):
        return f"head_dim {width} is not a power of two of at least {2 * LEAST_PRODUCT}"
    if compiled and heads % LEAST_PRODUCT:
        return f"{heads} heads are not a multiple of {LEAST_PRODUCT}"
    return None


def unserved_by(q: Any, entries: Any, ring: Any) -> dict[str, Callable[[Chip | None], str | None]]:
    """The rule in the form that ``choose`` takes."""
    return {
        "gpu": lambda chip: unserved(q, entries, ring),
        "gpu_interpret": lambda chip: unserved(q, entries, ring, compiled=False),
    }


def compressed_attention(
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    ring: jax.Array | KVRows | None,
    entries: jax.Array | KVRows | None,
    layer: jax.Array | int,
    counts: jax.Array | None,
    indices: jax.Array | None,
    window_size: int,
    scale: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``pallas_kernels.compressed_attention.compressed_attention``.

    ``blocks`` are block sizes (default: the table's for the chip), ``interpret`` what ``pallas_call`` takes.
    """
    batch, length, heads, width = q.shape
    blocks = blocks or blocks_for(None if interpret else current_chip(), heads)
    rows: dict[str, Any] = {"window": window.astype(q.dtype)}
    scalars = {"layer": jnp.asarray(layer, jnp.int32).reshape(1), "start": start.astype(jnp.int32)}
    if ring is not None:
        rows["ring"] = addressable(ring) if isinstance(ring, KVRows) else ring.astype(q.dtype)
    if entries is not None:
        rows["entries"] = addressable(entries)
        if indices is None:
            assert counts is not None
            scalars["end"] = jnp.minimum(counts, entries.shape[2]).astype(jnp.int32)
        else:
            # -1 may lie anywhere; what follows the last index is not visited.
            place = jnp.arange(1, indices.shape[-1] + 1, dtype=jnp.int32)
            scalars["end"] = jnp.max(jnp.where(indices >= 0, place, 0), axis=-1)
            scalars["indices"] = indices.astype(jnp.int32)
    queries = q.reshape(batch * length, heads, width)
    parts = 1
    if entries is not None and indices is None and length <= _FEW_QUERIES:
        parts = pl.cdiv(entries.shape[2], blocks.split)
    launch = functools.partial(
        _launch,
        sink=sink.astype(jnp.float32),
        whole={**scalars, **rows},
        tiles=tiles_of(width, rows.values()),
        parts=parts,
        blocks=blocks,
        interpret=interpret,
        length=length,
        window_size=window_size,
        scale=scale,
    )
    if parts == 1:
        return launch(queries, jnp.int32(0))[0].reshape(q.shape)
    number = queries.shape[0]
    chunk = min(number, max(1, _PART_BYTES // (4 * parts * heads * (width + 2))))

    def some(index, out):
        # The last queries may be computed twice, with the same result.
        first = jnp.minimum(index * chunk, number - chunk)
        found = launch(lax.dynamic_slice_in_dim(queries, first, chunk), first)
        return lax.dynamic_update_slice_in_dim(out, _join(*found, dtype=q.dtype, interpret=interpret), first, 0)

    out = lax.fori_loop(0, pl.cdiv(number, chunk), some, jnp.zeros(queries.shape, q.dtype))
    return out.reshape(q.shape)


def _launch(q, first, *, sink, whole, parts, blocks: Blocks, interpret, **constants):
    """The kernel for queries [R, H, c], of which ``first`` is the number of the first: their results, or their parts.

    Parts are [R, parts, H, c] values that are not normalised, [R, parts, H] largest scores and sums of weights.
    """
    number, heads, width = q.shape
    head_block = _power_divisor(heads, blocks.heads)
    per_query = pl.BlockSpec((None, head_block, width), lambda h, i, part: (i, h, 0))
    arrays, structure = jax.tree.flatten({"first": first.reshape(1), **whole})
    if parts == 1:
        out_specs, out_shape = [per_query], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        per_part = pl.BlockSpec((None, None, head_block), lambda h, i, part: (i, part, h))
        out_specs = [pl.BlockSpec((None, None, head_block, width), lambda h, i, part: (i, part, h, 0))] + 2 * [per_part]
        out_shape = [
            jax.ShapeDtypeStruct((number, parts, heads, width), jnp.float32),
            *2 * [jax.ShapeDtypeStruct((number, parts, heads), jnp.float32)],
        ]
    kernel = functools.partial(
        _kernel, structure, parts=parts, keys=blocks.keys, split=blocks.split, interpret=interpret, **constants
    )
    return pl.pallas_call(
        kernel,
        # The first dim varies fastest: blocks of heads of one query run in turn and share its keys in the L2 cache.
        grid=(heads // head_block, number, parts),
        in_specs=[
            per_query,
            pl.BlockSpec((head_block,), lambda h, i, part: (h,)),
            *[pl.BlockSpec(a.shape, lambda h, i, part, n=a.ndim: (0,) * n) for a in arrays],
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="compressed_attention",
    )(q, sink, *arrays)


def _join(values, largest, total, *, dtype, interpret):
    """Parts [R, parts, H, c], [R, parts, H] (twice) as one softmax [R, H, c]; a part without keys changes no bit.

    A kernel too, so that one part alone and several, of which one has keys, are divided by the same instruction.
    """
    number, parts, heads, width = values.shape
    block = _power_divisor(heads, LEAST_PRODUCT)
    per_part = pl.BlockSpec((None, parts, block), lambda i, h: (i, 0, h))
    return pl.pallas_call(
        functools.partial(_join_kernel, parts),
        grid=(number, heads // block),
        in_specs=[pl.BlockSpec((None, parts, block, width), lambda i, h: (i, 0, h, 0)), per_part, per_part],
        out_specs=pl.BlockSpec((None, block, width), lambda i, h: (i, h, 0)),
        out_shape=jax.ShapeDtypeStruct((number, heads, width), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="compressed_attention_join",
    )(values, largest, total)


def _join_kernel(parts, values, largest, total, out):
    highest = lax.fori_loop(1, parts, lambda part, high: jnp.maximum(high, largest[part]), largest[0])

    def add(part, state):
        below, above = state
        weight = jnp.exp(largest[part] - highest)
        return below + weight * total[part], above + weight[:, None] * values[part]

    nothing = (jnp.zeros(highest.shape, jnp.float32), jnp.zeros(out.shape, jnp.float32))
    below, above = lax.fori_loop(0, parts, add, nothing)
    out[...] = (above / below[:, None]).astype(out.dtype)


def interpreted(**arguments: Any) -> jax.Array:
    """The kernel in Pallas' interpreter."""
    return compressed_attention(**arguments, interpret=True)


def _kernel(structure, q_ref, sink_ref, *refs, parts, tiles, length, window_size, scale, keys, split, interpret):
    at = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    results = refs[structure.num_leaves :]
    query, part_number = at["first"][0] + pl.program_id(1), pl.program_id(2)
    b, s = query // length, query % length
    q = [q_ref[:, tile] for tile in tiles]
    layer, start = at["layer"][0], at["start"][b]
    turn = jnp.arange(keys, dtype=jnp.int32)

    def dot(x, y, axis):
        if interpret:
            # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return lax.dot_general(
            x,
            y,
            (((1,), (axis,)), ((), ())),
            precision=dot_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    def rows(name, where, row, wanted):
        return load_tiles(at[name], where, row, wanted, tiles)

    def add(state, found, visible):
        high, total, acc = state
        scores = sum(dot(own, k, 1) for own, k in zip(q, found, strict=True)) * scale
        scores = jnp.where(visible[None, :], scores, -jnp.inf)
        highest = jnp.maximum(high, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - highest[:, None])
        shrink = jnp.exp(high - highest)
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = weights.astype(found[0].dtype)
        return highest, total, tuple(a * shrink[:, None] + dot(weights, k, 0) for a, k in zip(acc, found, strict=True))

    def visit_window(index, state):
        step = index * keys + turn
        position = start + s - (window_size - 1) + step
        visible = (position >= 0) & (step < window_size)
        if "ring" not in at:
            return add(state, rows("window", (b,), s + step, visible), visible)
        own, size = position >= start, jax.tree.leaves(at["ring"])[0].shape[2]
        new = rows("window", (b,), position - start, visible & own)
        old = rows("ring", (layer, b), lax.rem(jnp.maximum(position, 0), size), visible & ~own)
        return add(state, [jnp.where(own[:, None], n, o) for n, o in zip(new, old, strict=True)], visible)

    def visit_entries(index, state):
        place = index * keys + turn
        visible = place < at["end"][b, s]
        entry = place
        if "indices" in at:
            row = jnp.where(visible, place, 0)
            entry = plgpu.load(at["indices"].at[b, s, row], mask=visible, other=jnp.int32(-1))
            visible = entry >= 0
        return add(state, rows("entries", (layer, b), entry, visible), visible)

    sink = sink_ref[...]
    nothing = tuple(jnp.zeros(own.shape, jnp.float32) for own in q)
    state = (sink, jnp.ones_like(sink), nothing)
    window_turns, first_turn = pl.cdiv(window_size, keys), 0
    if parts > 1:
        # The first part has the sink and the window; the others begin with nothing.
        leading = part_number == 0
        state = (jnp.where(leading, sink, _NO_SCORE), jnp.where(leading, 1.0, jnp.zeros_like(sink)), state[2])
        window_turns = leading.astype(jnp.int32) * window_turns
        first_turn = part_number * (split // keys)
    state = lax.fori_loop(0, window_turns, visit_window, state)
    if "entries" in at:
        end = at["end"][b, s]
        if parts > 1:
            end = jnp.minimum(end, (part_number + 1) * split)
        state = lax.fori_loop(first_turn, pl.cdiv(end, keys), visit_entries, state)
    high, total, acc = state
    if parts > 1:
        values, largest, sums = results
        largest[...], sums[...] = high, total
    else:
        (values,) = results
        acc = tuple(value / total[:, None] for value in acc)
    for tile, value in zip(tiles, acc, strict=True):
        values[:, tile] = value.astype(values.dtype)


def _power_divisor(number: int, largest: int) -> int:
    """The largest power of two that divides ``number`` and is at most ``largest``."""
    power = 1
    while number % (2 * power) == 0 and 2 * power <= largest:
        power *= 2
    return power
