"""Manifold-constrained hyper-connections: n residual streams in and out of a sublayer (architecture section 5)."""

import jax

from pallas_kernels.hyper_connection import xla
from pallas_kernels.implementation import choose

_PRE = {"xla": xla.pre_mix}
_POST = {"xla": xla.post_mix}
_HEAD = {"xla": xla.head_mix}


def pre_mix(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    *,
    sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Streams to one sublayer input, and the coefficients that mix its output back.

    Shapes: streams [B, S, n, d]; fn [(2+n)n, n*d], scale [3], base [(2+n)n] float32. Returns the input [B, S, d] in
    the dtype of streams, post [B, S, n] and comb [B, S, n, n] float32, comb doubly stochastic after
    ``sinkhorn_iters`` alternating normalisations (columns last). All coefficient arithmetic is float32.
    """
    function = choose("hyper_connection", _PRE, implementation)
    return function(streams, fn, scale, base, sinkhorn_iters=sinkhorn_iters, norm_eps=norm_eps, hc_eps=hc_eps)


def post_mix(
    y: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """The streams after a sublayer: X'_k = post_k y + sum_j comb[j, k] X_j (comb enters transposed).

    Shapes: y [B, S, d], streams [B, S, n, d], post [B, S, n], comb [B, S, n, n] float32; returns [B, S, n, d] in the
    dtype of streams.
    """
    return choose("hyper_connection", _POST, implementation)(y, streams, post, comb)


def head_mix(
    streams: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    *,
    norm_eps: float,
    hc_eps: float,
    implementation: str | None = None,
) -> jax.Array:
    """Streams [B, S, n, d] to the model's output [B, S, d] by sigmoid weights, without Sinkhorn.

    fn [n, n*d], scale [1], base [n] float32.
    """
    return choose("hyper_connection", _HEAD, implementation)(streams, fn, scale, base, norm_eps=norm_eps, hc_eps=hc_eps)
