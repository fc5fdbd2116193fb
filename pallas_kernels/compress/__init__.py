"""Pooling token projections into compressed entries (architecture section 3)."""

import functools

import jax

from deepseek_v4.layer_spec import RopeSpec
from pallas_kernels.compress import gpu, tpu, xla
from pallas_kernels.gradients import with_twin_gradient
from pallas_kernels.implementation import Unserved, choose

_IMPLEMENTATIONS = {
    "xla": xla.compress,
    "tpu": with_twin_gradient(tpu.compress, xla.compress),
    "tpu_interpret": with_twin_gradient(functools.partial(tpu.compress, interpret=True), xla.compress),
    "gpu": with_twin_gradient(gpu.compress, xla.compress),
    "gpu_interpret": with_twin_gradient(functools.partial(gpu.compress, interpret=True), xla.compress),
}


def compress(
    kv: jax.Array,
    score: jax.Array,
    norm_weight: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    *,
    kv_ring: jax.Array | None = None,
    score_ring: jax.Array | None = None,
    layer: jax.Array | int = 0,
    ratio: int,
    overlap: bool,
    rope: RopeSpec,
    norm_eps: float,
    dtype: jax.typing.DTypeLike,
    implementation: str | None = None,
) -> jax.Array:
    """Entries of the windows that end in this call: those of start // ratio and the following.

    Shapes: kv and score float32 [B, S, lanes*c], position biases already added to score, rows of positions start ..
    start + S - 1, of which ``lengths`` [B] are real; start int32 [B]; norm_weight [c]. The projections of the tokens
    before the call are read from ``layer`` of the rings [n, B, N, lanes*c] (position p in slot p mod N, N at least the
    rows that a window pools less one), or are zero without rings. An entry pools per channel the ``ratio`` rows of its
    window or, with overlap (lanes = 2), lane [:c] of the window before and lane [c:] of its own, where the window
    before the first takes no part. It is cast to ``dtype``, RMS-normed and rotated at position window * ratio. Returns
    [B, ceil(S / ratio), c]; entries of windows that the real rows do not complete hold meaningless finite values that
    the caller drops. Storing what is returned, and the new rows in the rings, is the caller's: both are small.
    Gradients flow to kv, score, rings and norm_weight. Source: paper eq. 9-12, 20-23.
    """
    on_tpu = functools.partial(
        tpu.unserved, kv=kv, kv_ring=kv_ring, ratio=ratio, overlap=overlap, rope=rope, dtype=dtype
    )
    on_gpu = functools.partial(gpu.unserved, kv, kv_ring, overlap, rope, dtype)
    unserved: dict[str, Unserved] = {
        "tpu": on_tpu,
        "tpu_interpret": functools.partial(on_tpu, compiled=False),
        "gpu": lambda chip: on_gpu(),
        "gpu_interpret": lambda chip: on_gpu(compiled=False),
    }
    return choose("compress", _IMPLEMENTATIONS, implementation, unserved)(
        kv=kv,
        score=score,
        norm_weight=norm_weight,
        start=start,
        lengths=lengths,
        kv_ring=kv_ring,
        score_ring=score_ring,
        layer=layer,
        ratio=ratio,
        overlap=overlap,
        rope=rope,
        norm_eps=norm_eps,
        dtype=dtype,
    )


def pool_windows(
    kv: jax.Array,
    score: jax.Array,
    norm_weight: jax.Array,
    first_window: jax.Array,
    *,
    ratio: int,
    overlap: bool,
    rope: RopeSpec,
    norm_eps: float,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Entries of consecutive windows from rows that are aligned to them, as packed documents have them; XLA alone.

    Shapes: kv and score float32 [B, R, lanes*c]. Without overlap R = nW*ratio and row i belongs to window first_window
    + i // ratio. With overlap R = (nW+1)*ratio, and the first ``ratio`` rows belong to the window *before*
    first_window int32 [B]. Returns [B, nW, c]; otherwise as ``compress``.
    """
    return xla.pool_windows(
        kv, score, norm_weight, first_window, ratio=ratio, overlap=overlap, rope=rope, norm_eps=norm_eps, dtype=dtype
    )
