"""Which calls the kernels of ``block_scaled_matmul`` serve, on TPUs and GPUs alike."""

import jax
import jax.numpy as jnp

from deepseek_v4.formats import FP8_BLOCK
from pallas_kernels.targets import Chip


def unserved(chip: Chip | None, x: jax.Array, weight: jax.Array, scale: jax.Array | None, groups: int) -> str | None:
    """Why no kernel can serve a call, or None: bfloat16 rows, E4M3 weights [.., N, K], N and K multiples of 128."""
    if scale is None:
        return "the weight is not quantised, which XLA's own product serves"
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}; the kernel multiplies bfloat16"
    if weight.dtype != jnp.float8_e4m3fn:
        return f"the weight is {weight.dtype}, expected float8_e4m3fn"
    outputs, inputs = weight.shape[-2:]
    if inputs % FP8_BLOCK or outputs % (groups * FP8_BLOCK):
        return f"the weight [{outputs}, {inputs}] in {groups} groups does not consist of whole blocks of {FP8_BLOCK}"
    if x.size == 0:
        return "there are no rows"
    return None
