"""The readable twin of the hyper-connection operations."""

import jax
import jax.numpy as jnp


def pre_mix(streams, fn, scale, base, *, sinkhorn_iters, norm_eps, hc_eps):
    """See ``pallas_kernels.hyper_connection.pre_mix``."""
    n = streams.shape[-2]
    mixes = _mixes(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(mixes[..., :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * jax.nn.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mixes[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*mixes.shape[:-1], n, n)
    comb = sinkhorn(logits, sinkhorn_iters, hc_eps)
    return _collapse(streams, pre), post, comb


def sinkhorn(logits, iterations, eps):
    """[..., n, n] logits to a doubly stochastic matrix: softmax over the last axis, then alternating normalisation."""
    comb = jax.nn.softmax(logits, axis=-1) + eps
    comb = comb / (jnp.sum(comb, axis=-2, keepdims=True) + eps)

    def alternate(comb, _):
        comb = comb / (jnp.sum(comb, axis=-1, keepdims=True) + eps)
        return comb / (jnp.sum(comb, axis=-2, keepdims=True) + eps), None

    # A scan and not an unrolled loop: the iterations are two fifths of a model's compile time otherwise.
    return jax.lax.scan(alternate, comb, None, length=iterations - 1)[0]


def post_mix(y, streams, post, comb):
    """See ``pallas_kernels.hyper_connection.post_mix``."""
    n = streams.shape[-2]
    y = y.astype(jnp.float32)
    rows = [streams[..., j, :].astype(jnp.float32) for j in range(n)]
    # Spelled out over the n streams so that no [B, S, n, n, d] product can be materialised.
    mixed = [post[..., k, None] * y + sum(comb[..., j, k, None] * rows[j] for j in range(n)) for k in range(n)]
    return jnp.stack(mixed, axis=-2).astype(streams.dtype)


def head_mix(streams, fn, scale, base, *, norm_eps, hc_eps):
    """See ``pallas_kernels.hyper_connection.head_mix``."""
    return _collapse(streams, jax.nn.sigmoid(_mixes(streams, fn, norm_eps) * scale[0] + base) + hc_eps)


def _mixes(streams, fn, norm_eps):
    """Coefficients before their activations: the projection of all streams together, scaled by their joint RMS."""
    z = streams.astype(jnp.float32).reshape(*streams.shape[:-2], -1)
    projected = jnp.einsum("...z,mz->...m", z, fn, precision=jax.lax.Precision.HIGHEST)
    return projected * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + norm_eps)


def _collapse(streams, weights):
    n = streams.shape[-2]
    total = sum(weights[..., i, None] * streams[..., i, :].astype(jnp.float32) for i in range(n))
    return total.astype(streams.dtype)
