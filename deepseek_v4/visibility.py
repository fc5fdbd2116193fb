"""Which compressed entries a token may see: the one place that states the causal rule."""

import jax


def visible_entries(positions: jax.Array, ratio: int) -> jax.Array:
    """Entries visible to tokens at ``positions`` (0-based): s < floor((t + 1) / ratio).

    A token that completes a window sees that window; one earlier does not (architecture section 2).
    """
    return (positions + 1) // ratio
