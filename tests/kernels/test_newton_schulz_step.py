"""Newton-Schulz steps, every implementation against float64; what the kernel serves; whole iterations on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.training.muon import newton_schulz
from pallas_kernels import targets
from pallas_kernels.newton_schulz_step import newton_schulz_step, tpu

COEFFICIENTS = jnp.asarray([3.4445, -4.7750, 2.0315], jnp.float32)


def matrices(seed, *shape):
    """Of singular values up to 1, as the iteration keeps them."""
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, ord=2, axis=(-2, -1), keepdims=True), jnp.float32)


# One block and several of each side; sides smaller than a block; blocks of different sizes.
@pytest.mark.parametrize("shape", [(2, 128, 256), (1, 256, 640), (1, 640, 768), (3, 4, 128), (1, 64, 384)])
@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
def test_matches_float64(implementation, shape):
    x = matrices(0, *shape)
    out = jax.jit(functools.partial(newton_schulz_step, implementation=implementation))(x, COEFFICIENTS)
    a, b, c = np.asarray(COEFFICIENTS, np.float64)
    exact = np.asarray(x, np.float64)
    gram = exact @ exact.swapaxes(-1, -2)
    expected = a * exact + b * gram @ exact + c * gram @ gram @ exact
    # Entries are sums of at most ``columns`` float32 products of a row of norm <= 1, rounded at 2^-24 a few times.
    bound = 8 * 2.0**-24 * np.sqrt(shape[-1])
    assert np.max(np.abs(np.asarray(out, np.float64) - expected)) < bound


def test_a_whole_iteration_is_that_of_the_twin():
    x = matrices(1, 2, 256, 128)  # tall: it works on the transposed
    kernel = newton_schulz(x, implementation="tpu_interpret")
    twin = newton_schulz(x, implementation="xla")
    # Rounding differs by the order of sums; small singular values grow by up to 3.4445^8 in eight steps.
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(twin), atol=2.0**-24 * 3.4445**8)
    np.testing.assert_allclose(np.asarray(kernel.mT @ kernel), np.tile(np.eye(128), (2, 1, 1)), atol=1e-3)


def test_refusals_say_why():
    chip = targets.chip("v6e")
    x = jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)
    assert tpu.unserved(chip, x, jnp.float32) is None
    assert "bfloat16" in tpu.unserved(chip, x, jnp.bfloat16)
    assert "200 x 512" in tpu.unserved(chip, jax.ShapeDtypeStruct((2, 200, 512), jnp.float32), jnp.float32)
    assert "GPU" in tpu.unserved(targets.chip("h200"), x, jnp.float32)
