"""What the kernels of ``compress`` share: arrays that none of them serves, and which windows end in a call."""

import jax
import jax.numpy as jnp


def unserved_types(kv: jax.Array, kv_ring: jax.Array | None, dtype: jax.typing.DTypeLike) -> str | None:
    """Why no kernel can serve projections [B, S, lanes*c], rings [n, B, N, lanes*c] or None, entries of ``dtype``."""
    if kv.dtype != jnp.float32 or (kv_ring is not None and kv_ring.dtype != jnp.float32):
        return f"projections are {kv.dtype}, expected float32"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"entries are {jnp.dtype(dtype)}, expected bfloat16 or float32"
    return None


def ending(start: jax.Array, lengths: jax.Array, ratio: int, windows: int) -> tuple[jax.Array, jax.Array]:
    """(first, done) int32 [B]: the window that ``start`` falls in, and how many from it on end in this call."""
    first = start // ratio
    return first, jnp.clip((start + lengths) // ratio - first, 0, windows).astype(jnp.int32)


def beginnings(first: jax.Array, ratio: int, windows: int) -> jax.Array:
    """int32 [B, windows]: the position of the first token of every window from ``first`` on."""
    return (first[:, None] + jnp.arange(windows, dtype=jnp.int32)) * ratio
