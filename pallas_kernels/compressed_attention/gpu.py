"""GPU kernel (Pallas on Triton): attention over the window, compressed entries and the sink in one pass.

A program is one query and a block of its heads, which share every key: [heads, c] times [keys, c] feeds the tensor
cores. Keys come by row from where they lie, the window's from ring or chunk by position, entries by number, those
selected by index; each is loaded once and serves as value too. A row lies in two halves, channels 0..c/2-1 and the
rest: the halves that a word of the cache holds, so that plain rows and words take the same path. The softmax starts at
the sink, (maximum, total, accumulator) = (sink, 1, 0), and visits blocks of keys in an order that depends on the row
alone.

A query's keys are not split over programs: a decode step of few rows leaves most of a GPU idle.

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
from pallas_kernels.compressed_attention.blocks import Blocks, blocks_for
from pallas_kernels.compressed_attention.unserved import unserved_types
from pallas_kernels.targets import Chip, current_chip

_LEAST_PRODUCT = 16
"""Rows and columns of the smallest product that Triton gives to tensor cores."""


def unserved(q: Any, entries: Any, *, compiled: bool = True) -> str | None:
    """Why the kernel cannot serve arguments of these shapes and types, or None. ``compiled``: not interpreted."""
    heads, width = q.shape[2:]
    if reason := unserved_types(q, entries):
        return reason
    if width % 2:
        return f"head_dim {width} is odd"
    if compiled and q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}, expected bfloat16"
    if compiled and (width & (width - 1) or width < 2 * _LEAST_PRODUCT):
        return f"head_dim {width} is not a power of two of at least {2 * _LEAST_PRODUCT}"
    if compiled and heads % _LEAST_PRODUCT:
        return f"{heads} heads are not a multiple of {_LEAST_PRODUCT}"
    return None


def unserved_by(q: Any, entries: Any) -> dict[str, Callable[[Chip | None], str | None]]:
    """The rule in the form that ``choose`` takes."""
    return {
        "gpu": lambda chip: unserved(q, entries),
        "gpu_interpret": lambda chip: unserved(q, entries, compiled=False),
    }


def compressed_attention(
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    ring: jax.Array | None,
    entries: jax.Array | None,
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
    head_block = _power_divisor(heads, blocks.heads)
    rows: dict[str, jax.Array] = {"window": window.astype(q.dtype)}
    scalars = {"layer": jnp.asarray(layer, jnp.int32).reshape(1), "start": start.astype(jnp.int32)}
    if ring is not None:
        rows["ring"] = ring.astype(q.dtype)
    if entries is not None:
        rows["entries"] = entries
        if indices is None:
            assert counts is not None
            scalars["end"] = jnp.minimum(counts, entries.shape[2]).astype(jnp.int32)
        else:
            # -1 may lie anywhere; what follows the last index is not visited.
            place = jnp.arange(1, indices.shape[-1] + 1, dtype=jnp.int32)
            scalars["end"] = jnp.max(jnp.where(indices >= 0, place, 0), axis=-1)
            scalars["indices"] = indices.astype(jnp.int32)
    whole = {**scalars, **rows}
    per_query = pl.BlockSpec((None, None, head_block, width), lambda query, h: (query // length, query % length, h, 0))
    kernel = functools.partial(
        _kernel,
        tuple(whole),
        length=length,
        window_size=window_size,
        scale=scale,
        keys=blocks.keys,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        # Blocks of heads of one query are neighbours in time and share its keys in the L2 cache.
        grid=(batch * length, heads // head_block),
        in_specs=[
            per_query,
            pl.BlockSpec((head_block,), lambda query, h: (h,)),
            *[pl.BlockSpec(a.shape, lambda query, h, n=a.ndim: (0,) * n) for a in whole.values()],
        ],
        out_specs=per_query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="compressed_attention",
    )(q, sink.astype(jnp.float32), *whole.values())


def interpreted(**arguments: Any) -> jax.Array:
    """The kernel in Pallas' interpreter."""
    return compressed_attention(**arguments, interpret=True)


def _kernel(names, q_ref, sink_ref, *refs, length, window_size, scale, keys, interpret):
    at = dict(zip(names, refs[:-1], strict=True))
    out_ref = refs[-1]
    query = pl.program_id(0)
    b, s = query // length, query % length
    half = q_ref.shape[1] // 2
    halves = (slice(0, half), slice(half, 2 * half))
    q = [q_ref[:, part] for part in halves]
    layer, start = at["layer"][0], at["start"][b]
    channel = lax.broadcasted_iota(jnp.int32, (keys, half), 1)
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

    def rows(ref, where, row, wanted):
        """Both halves of rows [keys] of ``ref``, zero where not wanted; no other row is touched."""
        wanted = jnp.broadcast_to(wanted[:, None], (keys, half))
        row = jnp.broadcast_to(jnp.where(wanted, row[:, None], 0), (keys, half))
        if ref.dtype == jnp.uint32:
            words = plgpu.load(ref.at[(*where, row, channel)], mask=wanted, other=jnp.uint32(0))
            parts = (words << 16, words & jnp.uint32(0xFFFF0000))
            # Each float32 holds a bfloat16 and sixteen zeros: the cast rounds nothing.
            return [lax.bitcast_convert_type(part, jnp.float32).astype(jnp.bfloat16) for part in parts]
        zero = jnp.zeros((), ref.dtype)
        return [plgpu.load(ref.at[(*where, row, channel + offset)], mask=wanted, other=zero) for offset in (0, half)]

    def add(state, found, visible):
        high, total, acc = state
        scores = (dot(q[0], found[0], 1) + dot(q[1], found[1], 1)) * scale
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
            return add(state, rows(at["window"], (b,), s + step, visible), visible)
        own, size = position >= start, at["ring"].shape[2]
        new = rows(at["window"], (b,), position - start, visible & own)
        old = rows(at["ring"], (layer, b), lax.rem(jnp.maximum(position, 0), size), visible & ~own)
        return add(state, [jnp.where(own[:, None], n, o) for n, o in zip(new, old, strict=True)], visible)

    def visit_entries(index, state):
        place = index * keys + turn
        visible = place < at["end"][b, s]
        entry = place
        if "indices" in at:
            row = jnp.where(visible, place, 0)
            entry = plgpu.load(at["indices"].at[b, s, row], mask=visible, other=jnp.int32(-1))
            visible = entry >= 0
        return add(state, rows(at["entries"], (layer, b), entry, visible), visible)

    sink = sink_ref[...]
    nothing = jnp.zeros((sink.shape[0], half), jnp.float32)
    state = (sink, jnp.ones_like(sink), (nothing, nothing))
    state = lax.fori_loop(0, pl.cdiv(window_size, keys), visit_window, state)
    if "entries" in at:
        state = lax.fori_loop(0, pl.cdiv(at["end"][b, s], keys), visit_entries, state)
    _, total, acc = state
    for part, value in zip(halves, acc, strict=True):
        out_ref[:, part] = (value / total[:, None]).astype(out_ref.dtype)


def _power_divisor(number: int, largest: int) -> int:
    """The largest power of two that divides ``number`` and is at most ``largest``."""
    power = 1
    while number % (2 * power) == 0 and 2 * power <= largest:
        power *= 2
    return power
