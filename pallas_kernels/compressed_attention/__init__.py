"""One softmax over a sliding window, compressed entries and a sink (architecture section 2, step 4)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.stored_rows import KVRows
from pallas_kernels.compressed_attention import gpu, merge, tpu, xla
from pallas_kernels.compressed_attention import gradient as of_training
from pallas_kernels.gradients import with_twin_gradient
from pallas_kernels.implementation import choose

_IMPLEMENTATIONS = {
    "xla": xla.compressed_attention,
    "tpu": of_training.with_training_kernels(tpu.compressed_attention),
    "tpu_interpret": of_training.with_training_kernels(tpu.interpreted, pltpu.InterpretParams()),
    "gpu": with_twin_gradient(gpu.compressed_attention, xla.compressed_attention),
    "gpu_interpret": with_twin_gradient(gpu.interpreted, xla.compressed_attention),
}

_SPLIT: dict[str, Callable] = {
    name: functools.partial(merge.split_attention, partial)
    for name, partial in (
        ("xla", xla.partial_attention),
        ("tpu", tpu.partial_attention),
        ("tpu_interpret", tpu.partial_interpreted),
    )
}


def compressed_attention(
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    ring: jax.Array | None = None,
    entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    counts: jax.Array | None = None,
    indices: jax.Array | None = None,
    window_counts: jax.Array | None = None,
    first_entries: jax.Array | None = None,
    window_size: int,
    scale: float,
    entries_over: tuple[str, ...] = (),
    implementation: str | None = None,
) -> jax.Array:
    """Attention of queries over their last ``window_size`` tokens and over compressed entries, K = V, one KV head.

    Shapes: q [B, S, H, c], RoPE applied; window [B, window_size - 1 + S, c], the rows of positions
    start - window_size + 1 .. start + S - 1 (rows of negative positions are ignored, whatever they hold); sink [H]
    float32 logits that enter the denominator only; start [B] int32, the position of the first query of each row;
    entries [n, B, T, c], the compressed cache of n stacked layers, of which ``layer`` is read; counts [B, S] int32,
    the entries visible to a query (s < counts); indices [B, S, K] int32, the entries a query selects (-1 pads, at any
    place; every index is below its count; an index that appears twice counts twice), or None to attend to all visible
    ones. Rows of ``entries`` at or beyond a batch row's largest count may hold anything, NaN included. Entries are
    plain, or uint32 [n, B, T, c/2] as ``deepseek_v4.formats.pack_words`` makes them, which TPU kernels read in place.
    Entries and ring may also be ``KVRows`` of ``deepseek_v4.stored_rows``, which kernels for GPUs read in place, and
    entries ``KVColumns`` where all are seen and ``KVWords`` where they are selected, which those for TPUs read so.

    With ``ring`` [n, B, R, c], R >= window_size - 1, the tokens before the call are read from the ring of ``layer``,
    position p in slot p mod R (``deepseek_v4.cache``), and window [B, S, c] holds the rows of the call alone.

    Where rows hold several documents, ``window_counts`` [B, S] int32 says how many of its last ``window_size`` tokens a
    query sees (itself among them; 0 for none), and ``first_entries`` [B, S] from which entry on it sees them; the
    kernels of training alone serve these.

    ``entries_over`` names the mesh axes that split the entries (inside ``shard_map``): ``entries`` are then this
    device's range of them, the others' follow in the order of the mesh; counts and indices number them all, everything
    else is the same on these devices, and so is the result. There is no gradient then, and no kernel for GPUs.

    Softmax and accumulation are float32. Returns [B, S, H, c] in the dtype of q, still rotated. A row's output does
    not depend on the other rows, on T, or on the padding of indices. Gradients flow to q, window, sink, ring and plain
    entries. On TPUs they have kernels (``gradient.unserved`` says for what), otherwise they are the twin's, recomputed.
    Source: paper 2.3.
    """
    unserved = tpu.unserved_by(q, entries, indices, window_size) | gpu.unserved_by(q, entries, ring)
    if isinstance(ring, KVRows):
        unserved |= dict.fromkeys(("tpu", "tpu_interpret"), lambda chip: "a ring in the published layout")
    more: dict[str, Any] = {}
    if window_counts is not None:
        more = {"window_counts": window_counts, "first_entries": first_entries}
        unserved = dict.fromkeys(unserved, lambda chip: "rows of several documents")
        if ring is None and not isinstance(entries, KVRows):
            unserved |= of_training.unserved_by(q, entries, indices, window_size)
    implementations = _IMPLEMENTATIONS
    if entries_over and entries is not None:
        more["entries_over"] = entries_over
        implementations = _SPLIT
    function = choose("compressed_attention", implementations, implementation, unserved)
    return function(
        q=q,
        window=window,
        sink=sink,
        start=start,
        ring=ring,
        entries=entries,
        layer=layer,
        counts=counts,
        indices=indices,
        window_size=window_size,
        scale=scale,
        **more,
    )


def index_divergence(
    scores: jax.Array,
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    ring: jax.Array | None,
    entries: jax.Array,
    layer: jax.Array | int,
    counts: jax.Array,
    indices: jax.Array | None,
    window_counts: jax.Array | None,
    first_entries: jax.Array | None,
    *,
    window_size: int,
    scale: float,
    sum_over: tuple[str, ...] = (),
) -> jax.Array:
    """How far the indexer is from the attention that it should foresee: KL(p || softmax(scores)) per query, float32.

    p is what ``compressed_attention`` with the same arguments gives to each entry, summed over heads and normalised
    over the entries (the selected ones, with ``indices``; the softmax that it is part of includes window and sink);
    scores [B, S, T] float32 are the indexer's, -inf where an entry is not visible. Returns [B, S], 0 for queries
    without entries; gradients reach the scores alone. ``sum_over`` names mesh axes that split the heads. There is one
    implementation, in XLA. Source: V3.2 report, indexer training.
    """
    return xla.index_divergence(
        scores,
        q,
        window,
        sink,
        start,
        ring=ring,
        entries=entries,
        layer=layer,
        counts=counts,
        indices=indices,
        window_counts=window_counts,
        first_entries=first_entries,
        window_size=window_size,
        scale=scale,
        sum_over=sum_over,
    )
