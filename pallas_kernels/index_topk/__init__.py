"""The lightning indexer: scores of compressed entries and the exact top-k of them (architecture section 4)."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.implementation import choose
from pallas_kernels.index_topk import gpu, merge, tpu, xla
from pallas_kernels.index_topk.unserved import unserved_by

_IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": functools.partial(merge.twin_topk, xla.ranked_topk),
    "tpu": functools.partial(merge.kernel_topk, tpu.ranked_topk),
    "tpu_interpret": functools.partial(merge.kernel_topk, tpu.interpreted),
    "gpu": functools.partial(merge.kernel_topk, gpu.ranked_topk),
    "gpu_interpret": functools.partial(merge.kernel_topk, gpu.interpreted),
}


def index_topk(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    counts: jax.Array,
    *,
    first_entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    k: int,
    sum_over: tuple[str, ...] = (),
    keys_over: tuple[str, ...] = (),
    implementation: str | None = None,
) -> jax.Array:
    """The entries each query attends to: I[t, s] = sum_h weights[t, h] * relu(q[t, h] . keys[s]), the k largest.

    Shapes: q [B, S, Hi, di]; weights [B, S, Hi] float32, already scaled; keys [n, B, T, di] (or ``KeyRows`` or
    ``KeyColumns`` of ``deepseek_v4.stored_rows``), of which ``layer`` is read; counts [B, S] int32, entry s is visible
    iff s < count (and s >= ``first_entries`` [B, S], where rows hold several documents). Returns int32
    [B, S, min(k, T)]: the selected entries, in descending score with ties to the lowest index, padded with -1 where
    fewer are visible. Scores are accumulated in float32; -0 counts as 0; rows of ``keys`` that no query may see may
    hold anything. ``sum_over`` names the mesh axes that split the heads (inside ``shard_map``): devices bring them
    together, each for a share of the queries or rows; where neither divides, the twin adds partial scores before
    anything is compared. ``keys_over`` names those that split the keys: ``keys`` are then this device's range of them,
    the others' follow in the order of the mesh; counts and what is returned number them all, and the result is that of
    unsplit keys. No kernel serves ``first_entries``, and none for TPUs ``KeyRows``. There is no gradient. Source: paper
    eq. 13-17.
    """
    # A kernel is given all heads of a query.
    heads = q.shape[2] * jax.lax.axis_size(sum_over) if sum_over else q.shape[2]
    whole = jax.ShapeDtypeStruct((*q.shape[:2], heads, q.shape[3]), q.dtype)
    function = choose("index_topk", _IMPLEMENTATIONS, implementation, unserved_by(whole, keys, k, first_entries))
    split: dict[str, Any] = {"sum_over": sum_over, "keys_over": keys_over}
    if function is _IMPLEMENTATIONS["xla"]:
        split["first_entries"] = first_entries
    return function(q=q, weights=weights, keys=keys, counts=counts, layer=layer, k=k, **split)


def index_scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    counts: jax.Array,
    *,
    first_entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    sum_over: tuple[str, ...] = (),
) -> jax.Array:
    """The scores that ``index_topk`` compares, for training: float32 [B, S, T], -inf where not visible.

    Arguments are those of ``index_topk``. Differentiable with respect to q, weights and keys.
    """
    return xla.all_scores(q, weights, keys, counts, first_entries=first_entries, layer=layer, sum_over=sum_over)


def select_topk(scores: jax.Array, k: int) -> jax.Array:
    """The selection of ``index_topk`` from scores [B, S, T]."""
    return xla.select(jax.lax.stop_gradient(scores), k)
