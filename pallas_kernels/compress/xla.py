"""The readable twin of ``compress``: align rows to windows, one softmax per channel, norm, rotate."""

import jax
import jax.numpy as jnp

from deepseek_v4.cache import ring_read
from deepseek_v4.nn.norm import rms_norm
from deepseek_v4.rope import apply_rope


def compress(kv, score, norm_weight, start, lengths, *, kv_ring, score_ring, layer, ratio, overlap, **options):
    """See ``pallas_kernels.compress.compress``."""
    # Rows in position order, from the window before the one that `start` falls in (CSA) or from that one (HCA).
    history = ratio * (2 if overlap else 1) - 1
    rows = (-(-kv.shape[1] // ratio) + (1 if overlap else 0)) * ratio
    offset = ratio - 1 - start % ratio

    def aligned(new, ring):
        if ring is None:
            before = jnp.zeros((new.shape[0], history, new.shape[2]), new.dtype)
        else:
            before = ring_read(ring, layer, start, history)
        joined = jnp.concatenate([before, new], axis=1)
        joined = jnp.pad(joined, [(0, 0), (0, max(0, ratio - 1 + rows - joined.shape[1])), (0, 0)])
        return jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, rows, axis=0))(joined, offset)

    aligned_kv, aligned_score = aligned(kv, kv_ring), aligned(score, score_ring)
    return pool_windows(aligned_kv, aligned_score, norm_weight, start // ratio, ratio=ratio, overlap=overlap, **options)


def pool_windows(kv, score, norm_weight, first_window, *, ratio, overlap, rope, norm_eps, dtype):
    """See ``pallas_kernels.compress.pool_windows``."""
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
