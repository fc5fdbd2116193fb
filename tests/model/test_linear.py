"""Products with weights that no release quantises, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.nn.linear import plain_matmul


def operands(rows=5, inputs=4096, outputs=48):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((rows, inputs), (outputs, inputs)))


def in_float32(x, weight):
    return plain_matmul(x, weight, jnp.float32)


def test_bfloat16_operands_have_the_product_and_gradients_of_float32():
    x, weight = operands()
    out, pull = jax.vjp(in_float32, x, weight)
    wide = [np.asarray(a, np.float64) for a in (x, weight)]
    # A float32 sum of 4,096 products of order one.
    np.testing.assert_allclose(out, wide[0] @ wide[1].T, rtol=0, atol=1e-3)
    gradient = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    for found, expected in zip(pull(jnp.asarray(gradient)), (gradient @ wide[1], gradient.T @ wide[0]), strict=True):
        # Rounded to bfloat16 once, at the end: half a unit in its last place, and a little for the sum before.
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.01 * 2**-8, atol=1e-4)


@pytest.mark.parametrize(("platform", "types"), [("tpu", "bf16"), ("cuda", "bf16"), ("cpu", "f32")])
def test_accelerators_multiply_bfloat16_as_it_is(platform, types):
    """One pass instead of the six of a float32 product; gradients of float32 keep all of them."""
    x, weight = operands()

    def products(function):
        lowered = jax.jit(function).trace(x, weight).lower(lowering_platforms=(platform,)).as_text()
        return [line for line in lowered.splitlines() if "dot_general" in line]

    (forward,) = products(in_float32)
    assert f"x{types}>, tensor<48x4096x{types}>) -> tensor<5x48xf32>" in forward
    backward = products(jax.grad(lambda *a: jnp.sum(jnp.square(in_float32(*a))), argnums=(0, 1)))[1:]
    assert len(backward) == 2
    assert all("HIGHEST" in line and "bf16" not in line for line in backward)
