"""The readable twin of ``newton_schulz_step``."""

import jax.numpy as jnp
from jax import lax


def newton_schulz_step(x, coefficients, *, dtype):
    """See ``pallas_kernels.newton_schulz_step``."""

    def matmul(a, b):
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    a, b, c = coefficients
    gram = matmul(x, x.mT)
    return a * x + matmul(b * gram + c * matmul(gram, gram), x)
