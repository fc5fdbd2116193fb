"""One step of Muon's Newton-Schulz iteration on a stack of matrices (report 2.4)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import choose
from pallas_kernels.newton_schulz_step import tpu, xla

_IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": xla.newton_schulz_step,
    "tpu": tpu.newton_schulz_step,
    "tpu_interpret": functools.partial(tpu.newton_schulz_step, interpret=True),
}


def newton_schulz_step(
    x: jax.Array,
    coefficients: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """a X + b (X X^T) X + c (X X^T)^2 X of every matrix of x [m, rows, cols] float32, coefficients (a, b, c) [3].

    ``dtype`` is that of the operands of products; sums, and what one product hands to the next, are float32. Kernels
    multiply float32 as it is stored, in the six bfloat16 passes of ``Precision.HIGHEST``; they compute no gradient.
    """
    reason = functools.partial(tpu.unserved, x=x, dtype=dtype)
    reasons = dict.fromkeys(("tpu", "tpu_interpret"), reason)
    function = choose("newton_schulz_step", _IMPLEMENTATIONS, implementation, reasons)
    stepped: jax.Array = function(x, coefficients, dtype=dtype)
    return stepped
