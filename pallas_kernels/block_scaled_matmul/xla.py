"""The readable twin of ``block_scaled_matmul``: decode the weight, then multiply."""

import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import dequantize


def block_scaled_matmul(x, weight, scale, *, groups, layer=None):
    """See ``pallas_kernels.block_scaled_matmul.block_scaled_matmul``."""
    if layer is not None:
        weight, scale = (
            None if a is None else lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (weight, scale)
        )
    weight = dequantize(weight, scale, x.dtype)
    equation = "...k,nk->...n"
    if groups > 1:
        weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1])
        equation = "...gk,gnk->...gn"
    out = jnp.einsum(equation, x, weight, precision=dot_precision(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)
