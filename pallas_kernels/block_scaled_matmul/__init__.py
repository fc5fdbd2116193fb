"""Dense linears whose weights stay in their stored format (architecture section 7)."""

import jax

from pallas_kernels.block_scaled_matmul import xla
from pallas_kernels.implementation import choose

_IMPLEMENTATIONS = {"xla": xla.block_scaled_matmul}


def block_scaled_matmul(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    *,
    groups: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """x W^T with W stored as E4M3 with one scale per 128 x 128 block, or plain.

    Shapes: weight [N, K]; scale [ceil(N/128), ceil(K/128)] (E8M0 or float32), or None for a plain BF16/F32 weight.
    With groups = 1, x [..., K] gives [..., N]. With groups = g > 1 (``wo_a``), x [..., g, K] gives [..., g, N/g]:
    group i uses its own rows i*N/g .. (i+1)*N/g of the weight. Weights are decoded to the dtype of x (exact for E8M0
    scales), products are accumulated in float32 and returned in the dtype of x.
    """
    function = choose("block_scaled_matmul", _IMPLEMENTATIONS, implementation)
    return function(x, weight, scale, groups=groups)
