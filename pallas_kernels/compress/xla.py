"""The readable twin of ``compress``: reshape rows into windows, one softmax per channel, norm, rotate."""

import jax
import jax.numpy as jnp

from deepseek_v4.nn.norm import rms_norm
from deepseek_v4.rope import apply_rope


def compress(kv, score, norm_weight, first_window, *, ratio, overlap, rope, norm_eps, dtype):
    """See ``pallas_kernels.compress.compress``."""
    batch, rows, width = kv.shape
    kv = kv.reshape(batch, rows // ratio, ratio, width)
    score = score.reshape(batch, rows // ratio, ratio, width)
    if overlap:
        c = width // 2
        windows = first_window[:, None] + jnp.arange(rows // ratio - 1)
        is_first = (windows == 0)[..., None, None]
        kv = jnp.concatenate([kv[:, :-1, :, :c], kv[:, 1:, :, c:]], axis=2)
        score = jnp.concatenate([jnp.where(is_first, -jnp.inf, score[:, :-1, :, :c]), score[:, 1:, :, c:]], axis=2)
    else:
        windows = first_window[:, None] + jnp.arange(rows // ratio)
    # A softmax with one division per channel and not per row; its product, spelled as one, fuses on every backend.
    weights = jnp.exp(score - jax.lax.stop_gradient(jnp.max(score, axis=2, keepdims=True)))
    pooled = jnp.einsum("bwrc,bwrc->bwc", weights, kv, precision=jax.lax.Precision.HIGHEST)
    entry = pooled / jnp.sum(weights, axis=2)
    entry = rms_norm(entry.astype(dtype), norm_weight, norm_eps)
    return apply_rope(entry, windows * ratio, rope)
