"""Root-mean-square normalisation, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.nn.variables import Weight, variable


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x [..., d] / sqrt(mean(x^2) + eps), times ``weight`` [d] if there is one; one rounding, to the dtype of x."""
    value = x.astype(jnp.float32)
    value = value * jax.lax.rsqrt(jnp.mean(jnp.square(value), axis=-1, keepdims=True) + eps)
    if weight is not None:
        value = value * weight.astype(jnp.float32)
    return value.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned weight [d]."""

    def __init__(self, size: int, eps: float, dtype: str, axis: str | None = None):
        self.eps = eps
        self.weight = variable(Weight, (size,), dtype, (axis,), "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d], normed, in its own dtype."""
        return rms_norm(x, self.weight[...], self.eps)
