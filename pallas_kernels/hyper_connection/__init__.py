"""Manifold-constrained hyper-connections: n residual streams in and out of a sublayer (architecture section 5)."""

import functools
from collections.abc import Callable

import jax

from pallas_kernels.gradients import with_twin_gradient
from pallas_kernels.hyper_connection import gpu, tpu, xla
from pallas_kernels.implementation import Unserved, choose


def _implementations(twin: Callable, on_tpu: Callable, on_gpu: Callable) -> dict[str, Callable]:
    """By name; kernels differentiate as the twin does."""
    found = {"xla": twin}
    for name, kernel in (("tpu", on_tpu), ("gpu", on_gpu)):
        found[name] = with_twin_gradient(kernel, twin)
        found[f"{name}_interpret"] = with_twin_gradient(functools.partial(kernel, interpret=True), twin)
    return found


def _unserved(streams: jax.Array) -> dict[str, Unserved]:
    return {
        "tpu": lambda chip: tpu.unserved(chip, streams),
        "tpu_interpret": lambda chip: tpu.unserved(None, streams, compiled=False),
        "gpu": lambda chip: gpu.unserved(chip, streams),
        "gpu_interpret": lambda chip: gpu.unserved(None, streams, compiled=False),
    }


_PRE = _implementations(xla.pre_mix, tpu.pre_mix, gpu.pre_mix)
_POST = _implementations(xla.post_mix, tpu.post_mix, gpu.post_mix)
_SEAM = _implementations(xla.seam, tpu.seam, gpu.seam)
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
    return choose("pre_mix", _PRE, implementation, _unserved(streams))(
        streams=streams,
        fn=fn,
        scale=scale,
        base=base,
        sinkhorn_iters=sinkhorn_iters,
        norm_eps=norm_eps,
        hc_eps=hc_eps,
    )


def post_mix(
    y: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """The streams after a sublayer: X'_k = post_k y + sum_j comb[j, k] X_j (comb enters transposed).

    Shapes: y [B, S, d], streams [B, S, n, d], post [B, S, n], comb [B, S, n, n] float32; returns [B, S, n, d] in the
    dtype of streams.
    """
    function = choose("post_mix", _POST, implementation, _unserved(streams))
    return function(y=y, streams=streams, post=post, comb=comb)


def seam(
    y: jax.Array,
    streams: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    fn: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    *,
    sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``post_mix`` of one sublayer and ``pre_mix`` of the next; a kernel reads and writes the streams once for both.

    Shapes: y [B, S, d], streams [B, S, n, d], post [B, S, n], comb [B, S, n, n] float32 of the sublayer that ends;
    fn, scale and base of the one that begins, as in ``pre_mix``. Returns the new streams, and x, post and comb of the
    sublayer that begins.
    """
    return choose("seam", _SEAM, implementation, _unserved(streams))(
        y=y,
        streams=streams,
        post=post,
        comb=comb,
        fn=fn,
        scale=scale,
        base=base,
        sinkhorn_iters=sinkhorn_iters,
        norm_eps=norm_eps,
        hc_eps=hc_eps,
    )


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
