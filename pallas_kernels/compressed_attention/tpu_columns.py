"""Entries in columns (``deepseek_v4.stored_rows.KVColumns``) for the dense TPU kernel of ``compressed_attention``.

Their keys are decoded as [c, K], channels along the rows: products contract the other axis, nothing is transposed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import KV_BLOCK
from pallas_kernels.compressed_attention.tpu_common import Plan
from pallas_kernels.tpu_decode import e4m3_to_e4m3b11


def keys_of_columns(plan: Plan, stored: list[jax.Array], columns: jax.Array | int) -> jax.Array:
    """Words of codes, RoPE dims and scales [.., K] to keys [c, K]; those from ``columns`` on become zero."""
    index = lax.broadcasted_iota(jnp.int32, (1, stored[0].shape[1]), 1)
    codes, rope, scales = (jnp.where(index < columns, words, jnp.zeros_like(words)) for words in stored)
    factor = 1.0
    if plan.native_fp8:
        content = pltpu.bitcast(codes, jnp.float8_e4m3fn)
    else:
        content, factor = pltpu.bitcast(e4m3_to_e4m3b11(codes), jnp.float8_e4m3b11fnuz), 16.0
    parts = []
    for first in range(0, content.shape[0], KV_BLOCK):
        word, byte = divmod(first // KV_BLOCK, 4)
        bits = ((scales[word : word + 1] >> (8 * byte)) & 255) << 23
        scale = lax.bitcast_convert_type(bits, jnp.float32) * factor
        values = content[first : first + KV_BLOCK].astype(jnp.float32) * scale
        parts.append(values.astype(jnp.bfloat16))
    parts.append(pltpu.bitcast(rope, jnp.bfloat16))
    return jnp.concatenate(parts, axis=0).astype(plan.dtype)
