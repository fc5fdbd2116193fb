"""Pooling token projections into compressed entries (architecture section 3)."""

import jax

from deepseek_v4.layer_spec import RopeSpec
from pallas_kernels.compress import xla
from pallas_kernels.implementation import choose

_IMPLEMENTATIONS = {"xla": xla.compress}


def compress(
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
    implementation: str | None = None,
) -> jax.Array:
    """Entries of consecutive windows from rows that are aligned to them.

    Shapes: kv and score float32 [B, R, lanes*c], position biases already added to score. Without overlap R = nW*ratio
    and row i belongs to window first_window + i // ratio. With overlap R = (nW+1)*ratio, lanes = 2, and the first
    ``ratio`` rows belong to the window *before* first_window: entry w pools, per channel, lane [:c] of window w-1 and
    lane [c:] of window w; for w = 0 the first half takes no part. first_window int32 [B]; norm_weight [c]. Each entry
    is cast to ``dtype``, RMS-normed and rotated at position w*ratio. Returns [B, nW, c]; entries of incomplete windows
    hold meaningless finite values that the caller drops. Source: paper eq. 9-12, 20-23.
    """
    function = choose("compress", _IMPLEMENTATIONS, implementation)
    return function(
        kv,
        score,
        norm_weight,
        first_window,
        ratio=ratio,
        overlap=overlap,
        rope=rope,
        norm_eps=norm_eps,
        dtype=dtype,
    )
