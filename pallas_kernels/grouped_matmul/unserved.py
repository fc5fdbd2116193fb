"""What keeps every kernel of the expert MLP from serving a call; each adds the sizes that its tiles ask for."""

import jax
import jax.numpy as jnp


def unserved_inputs(x: jax.Array, w1: tuple[jax.Array, jax.Array | None], *, adapted: bool) -> str | None:
    """Why no kernel can serve a call, or None: bfloat16 rows, packed or bfloat16 weights, and no adapters."""
    weight, scale = w1
    if adapted:
        return "the kernel has no adapters"
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}; the kernel multiplies bfloat16"
    if scale is None and weight.dtype != jnp.bfloat16:
        return f"unquantised weights are {weight.dtype}; the kernel multiplies bfloat16"
    if x.shape[0] == 0:
        return "there are no rows"
    return None


def unserved_weights(w1: tuple[jax.Array, jax.Array | None]) -> str | None:
    """Why weights have no gradient of their own, or None: packed ones are constants."""
    return None if w1[1] is None else "packed weights are constants"
