"""The readable twin of the hyper-connection operations.

Mixes have gradients of their own: plain differentiation would pad every stream's part and add the n of them up.
"""

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


@jax.custom_vjp
def post_mix(y, streams, post, comb):
    """See ``pallas_kernels.hyper_connection.post_mix``."""
    n = streams.shape[-2]
    y = y.astype(jnp.float32)
    rows = _rows(streams)
    # Spelled out over the n streams so that no [B, S, n, n, d] product can be materialised.
    mixed = [post[..., k, None] * y + sum(comb[..., j, k, None] * rows[j] for j in range(n)) for k in range(n)]
    return jnp.stack(mixed, axis=-2).astype(streams.dtype)


def _post_mix_forward(y, streams, post, comb):
    return post_mix(y, streams, post, comb), (y, streams, post, comb)


def _post_mix_backward(saved, gradient):
    y, streams, post, comb = saved
    n = streams.shape[-2]
    rows = _rows(gradient)
    dy = sum(post[..., k, None] * rows[k] for k in range(n))
    dstreams = jnp.stack([sum(comb[..., j, k, None] * rows[k] for k in range(n)) for j in range(n)], axis=-2)
    return (
        dy.astype(y.dtype),
        dstreams.astype(streams.dtype),
        _dot("...d,...kd->...k", y, gradient).astype(post.dtype),
        _dot("...jd,...kd->...jk", streams, gradient).astype(comb.dtype),
    )


post_mix.defvjp(_post_mix_forward, _post_mix_backward)


def seam(*, y, streams, post, comb, fn, scale, base, **constants):
    """See ``pallas_kernels.hyper_connection.seam``."""
    streams = post_mix(y, streams, post, comb)
    return streams, *pre_mix(streams, fn, scale, base, **constants)


def head_mix(streams, fn, scale, base, *, norm_eps, hc_eps):
    """See ``pallas_kernels.hyper_connection.head_mix``."""
    return _collapse(streams, jax.nn.sigmoid(_mixes(streams, fn, norm_eps) * scale[0] + base) + hc_eps)


def _mixes(streams, fn, norm_eps):
    """Coefficients before their activations: the projection of all streams together, scaled by their joint RMS."""
    z = streams.astype(jnp.float32).reshape(*streams.shape[:-2], -1)
    project = _project_split if streams.dtype == jnp.bfloat16 else _project
    return project(z, fn) * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + norm_eps)


def _project(z, fn):
    return jnp.einsum("...z,mz->...m", z, fn, precision=jax.lax.Precision.HIGHEST)


_project_split = jax.custom_vjp(_project)
"""The same, with a gradient of z that is one bfloat16 product: hardware of bfloat16 multiplies float32 in six passes,
each of which pads the few rows of ``fn``; in one product they lie next to each other."""


def _project_backward(saved, gradient):
    z, fn = saved
    left, right = _parts(gradient), _parts(fn)
    # What is left out is below 2^-24 of a product.
    pairs = [(left[i], right[j]) for i in range(3) for j in range(3 - i)]
    together = [jnp.concatenate(parts, axis) for parts, axis in zip(zip(*pairs, strict=True), (-1, 0), strict=True)]
    dz = jnp.einsum("...m,mz->...z", *together, preferred_element_type=jnp.float32)
    return dz, jnp.einsum("...m,...z->mz", gradient, z, precision=jax.lax.Precision.HIGHEST)


_project_split.defvjp(lambda z, fn: (_project(z, fn), (z, fn)), _project_backward)


def _parts(x):
    """Three bfloat16 arrays whose sum is the float32 ``x``, largest first (not casts, which compilers may undo)."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


@jax.custom_vjp
def _collapse(streams, weights):
    total = sum(weights[..., i, None] * row for i, row in enumerate(_rows(streams)))
    return total.astype(streams.dtype)


def _collapse_forward(streams, weights):
    return _collapse(streams, weights), (streams, weights)


def _collapse_backward(saved, gradient):
    streams, weights = saved
    dstreams = weights[..., None] * gradient[..., None, :].astype(jnp.float32)
    return dstreams.astype(streams.dtype), _dot("...id,...d->...i", streams, gradient).astype(weights.dtype)


_collapse.defvjp(_collapse_forward, _collapse_backward)


def _rows(streams):
    """The n streams [..., n, d] in float32, each on its own."""
    return [streams[..., i, :].astype(jnp.float32) for i in range(streams.shape[-2])]


def _dot(equation, a, b):
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
