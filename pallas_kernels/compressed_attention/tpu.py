"""The TPU implementation of ``compressed_attention``: which kernel serves a call, with which block sizes.

Entries are read where they lie: as words (``deepseek_v4.formats.pack_words``), as float32, or in released bytes as
``KVColumns`` where all are seen and as ``KVWords`` where they are selected. Plain bfloat16 entries, which cannot be
gathered by rows, are packed first, at the cost of a copy, so caches should be kept as words.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.cache import ring_read
from deepseek_v4.formats import pack_words
from deepseek_v4.stored_rows import KVColumns, KVWords
from pallas_kernels.compressed_attention.blocks import shape_class
from pallas_kernels.compressed_attention.cost import attention_cost
from pallas_kernels.compressed_attention.tpu_common import LANES, Plan, Tiles
from pallas_kernels.compressed_attention.tpu_dense import dense_attention
from pallas_kernels.compressed_attention.tpu_gather import gather_attention
from pallas_kernels.compressed_attention.unserved import unserved_types
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

_MAX_QUERIES = 1 << 16
"""Queries of one call whose counts fit in scalar memory beside everything else (4 bytes each of 1 MiB)."""


def unserved(q: Any, entries: Any, indices: Any, window_size: int, *, compiled: bool = True) -> str | None:
    """Why the kernel cannot serve arguments of these shapes and types, or None. ``compiled``: not interpreted."""
    batch, length, heads, width = q.shape
    columns, words = isinstance(entries, KVColumns), isinstance(entries, KVWords)
    if columns and indices is not None:
        return "selected entries in columns"
    if words and indices is None:
        return "entries in words of released bytes that are not selected"
    if words and compiled and width % (4 * LANES):
        return f"released bytes of head_dim {width}, which is not a multiple of {4 * LANES}"
    if columns and (entries.shape[2] == 0 or entries.shape[2] % LANES):
        return f"{entries.shape[2]} columns of entries are not a multiple of {LANES}"
    if reason := unserved_types(q, None if columns or words else entries):
        return reason
    if words and entries.shape[2] == 0:
        return "a cache without rows"
    if indices is not None and batch * length > _MAX_QUERIES:
        return f"{batch * length} queries in one call, at most {_MAX_QUERIES}"
    if window_size - 1 > Tiles.query_block and length > Tiles.decode_queries:
        return f"a window of {window_size} tokens, at most {Tiles.query_block + 1}"
    if compiled and width % (2 * LANES):
        return f"head_dim {width} is not a multiple of {2 * LANES}"
    if compiled and heads % 8:
        return f"{heads} heads are not a multiple of 8"
    return None


def compressed_attention(*arrays: jax.Array, **options: Any) -> jax.Array:
    """See ``pallas_kernels.compressed_attention.compressed_attention``.

    Besides: ``tiles`` are block sizes, ``cores`` the TensorCores to deal the steps to where they divide evenly
    (default: those of the chip), ``interpret`` what ``pallas_call`` takes.
    """
    return _run(*arrays, **options, partial=False)[0]


def partial_attention(*, q: jax.Array, **arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``xla.partial_attention``; the sum of weights of a query that sees nothing is arbitrary."""
    nothing = jnp.full(q.shape[2], jnp.finfo(jnp.float32).min)
    values, of_softmax = _run(q=q, sink=nothing, **arguments, partial=True)
    return values, of_softmax[..., :1], of_softmax[..., 1:2]


def _run(
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
    partial: bool,
    tiles: Tiles | None = None,
    cores: int | None = None,
    interpret: Any = False,
) -> list[jax.Array]:
    """What ``tpu_common.results`` says."""
    batch, length, heads, width = q.shape
    chip = None if interpret else current_chip()
    tiles = tiles or tuned("compressed_attention", chip, shape_class(heads), Tiles())
    columns, words = isinstance(entries, KVColumns), entries if isinstance(entries, KVWords) else None
    entry_dtype: Any = None if entries is None or columns else jnp.dtype(jnp.uint32)
    if isinstance(entries, jax.Array):
        entries = pack_words(entries) if entries.dtype == jnp.bfloat16 else entries
        entry_dtype = entries.dtype
    window = window.astype(q.dtype)
    decode = length <= tiles.decode_queries
    gather = indices is not None
    if not decode:
        source = "blocks"
        windows = _blocks(window, ring, layer, start, window_size, tiles.query_block)
    elif ring is not None:
        source, windows = "ring", (ring.astype(q.dtype), window)
    else:
        source, windows = "whole", (window,)
    query_block = length if decode else tiles.query_block
    # In decode every head shares the one pass over the entries; in prefill a block of queries already does.
    head_block = heads if decode or gather else _divisor(heads, tiles.heads)
    queries = _divisor(query_block, max(1, tiles.product_rows // head_block))
    plan = Plan(
        batch=batch,
        length=length,
        heads=heads,
        width=width,
        dtype=q.dtype,
        window_size=window_size,
        scale=scale,
        source=source,
        ring_rows=ring.shape[2] if ring is not None and source == "ring" else 0,
        entry_rows=0 if entries is None else entries.shape[2],
        entry_dtype=entry_dtype,
        query_block=query_block,
        head_block=head_block,
        product_rows=queries * head_block,
        block=max(LANES, tiles.entries) if columns else tiles.entries,
        chunk=LANES if columns else tiles.chunk,
        group=tiles.group,
        interpreted=bool(interpret),
        partial=partial,
        columns=columns,
        rope_dims=0 if words is None else words.rope_dims,
        native_fp8=chip is not None and "float8_e4m3fn" in chip.peak,
    )
    steps = batch * length if gather else batch * plan.query_blocks * plan.head_blocks
    if cores is None:
        cores = 1 if chip is None else chip.cores
    plan = dataclasses.replace(plan, cores=1 if steps % cores else cores)
    cost = attention_cost(
        batch=batch,
        length=length,
        heads=heads,
        width=width,
        window=window_size,
        entries=plan.entry_rows if indices is None else indices.shape[-1],
        indices=gather,
        itemsize=q.dtype.itemsize,
        entry_bytes=None if words is None else words.fetched_bytes,
    )
    estimate = pl.CostEstimate(
        flops=cost.total_operations,
        bytes_accessed=cost.bytes_moved,
        transcendentals=cost.total_operations // (4 * width),
    )
    start = start.astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    if indices is not None and entries is not None:
        return gather_attention(
            plan, q, windows, sink, start, layer, entries, indices, cost=estimate, interpret=interpret
        )
    return dense_attention(plan, q, windows, sink, start, layer, entries, counts, cost=estimate, interpret=interpret)


def interpreted(**arguments: Any) -> jax.Array:
    """The kernel in Pallas' TPU interpreter, whose memory starts as NaN and whose transfers happen when awaited."""
    return compressed_attention(**arguments, interpret=pltpu.InterpretParams())


def partial_interpreted(**arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``partial_attention`` in the interpreter."""
    return partial_attention(**arguments, interpret=pltpu.InterpretParams())


def unserved_by(q, entries, indices, window_size) -> dict[str, Callable[[Chip | None], str | None]]:
    """The rule in the form that ``choose`` takes."""
    return {
        "tpu": lambda chip: unserved(q, entries, indices, window_size),
        "tpu_interpret": lambda chip: unserved(q, entries, indices, window_size, compiled=False),
    }


def _blocks(window, ring, layer, start, window_size, size):
    """(rows before the call, rows of the call twice): what the kernel reads as earlier, previous and own block."""
    history = window_size - 1
    if ring is not None:
        before, new = ring_read(ring, layer, start, history).astype(window.dtype), window
    else:
        before, new = window[:, :history], window[:, history:]
    before = jnp.pad(before, ((0, 0), (size - history, 0), (0, 0)))
    return before, new, new


def _divisor(number: int, largest: int) -> int:
    """The largest divisor of ``number`` that is at most ``largest``."""
    return max(d for d in range(1, min(number, largest) + 1) if number % d == 0)
