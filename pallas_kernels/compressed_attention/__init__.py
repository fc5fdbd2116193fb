"""One softmax over a sliding window, compressed entries and a sink (architecture section 2, step 4)."""

import jax

from pallas_kernels.compressed_attention import xla
from pallas_kernels.implementation import choose

_IMPLEMENTATIONS = {"xla": xla.compressed_attention}


def compressed_attention(
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    counts: jax.Array | None = None,
    indices: jax.Array | None = None,
    window_size: int,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of queries over their last ``window_size`` tokens and over compressed entries, K = V, one KV head.

    Shapes: q [B, S, H, c], RoPE applied; window [B, window_size - 1 + S, c], the rows of positions
    start - window_size + 1 .. start + S - 1 (rows of negative positions are ignored, whatever they hold); sink [H]
    float32 logits that enter the denominator only; start [B] int32, the position of the first query of each row;
    entries [n, B, T, c], the compressed cache of n stacked layers, of which ``layer`` is read; counts [B, S] int32,
    the entries visible to a query (s < counts); indices [B, S, K] int32, the entries a query selects (-1 pads;
    every index is below its count), or None to attend to all visible ones. Rows of ``entries`` at or beyond a
    batch row's largest count may hold anything, NaN included. Softmax and accumulation are float32. Returns
    [B, S, H, c] in the dtype of q, still rotated. Source: paper 2.3.
    """
    function = choose("compressed_attention", _IMPLEMENTATIONS, implementation)
    return function(
        q,
        window,
        sink,
        start,
        entries=entries,
        layer=layer,
        counts=counts,
        indices=indices,
        window_size=window_size,
        scale=scale,
    )
