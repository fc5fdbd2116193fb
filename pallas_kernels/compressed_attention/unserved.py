"""What the kernels of ``compressed_attention`` ask of every call, on TPUs and GPUs alike."""

import jax
import jax.numpy as jnp

from deepseek_v4.stored_rows import STORED


def unserved_types(q: jax.Array, entries: jax.Array | None) -> str | None:
    """Why no kernel can serve queries [B, S, H, c] with entries [n, B, T, c] (or words [.., c/2]) or None; or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}, expected bfloat16 or float32"
    if entries is None:
        return None
    if isinstance(entries, STORED):
        return f"entries in the released bytes ({type(entries).__name__})"
    if entries.dtype not in ((jnp.uint32, jnp.bfloat16) if q.dtype == jnp.bfloat16 else (jnp.float32,)):
        return f"{entries.dtype} entries with {q.dtype} queries"
    if entries.shape[2] == 0:
        return "a cache without rows"
    return None
