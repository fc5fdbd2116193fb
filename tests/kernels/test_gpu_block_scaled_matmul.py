"""The GPU kernel of block_scaled_matmul, interpreted: against float64, in company, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered_for_cuda
from test_block_scaled_matmul import activations, check, weight

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, gpu
from pallas_kernels.block_scaled_matmul.blocks import TABLE, Blocks
from pallas_kernels.registry import operations

interpreted = functools.partial(block_scaled_matmul, implementation="gpu_interpret")


@pytest.mark.parametrize("scales", ["e8m0", "float32"])
@pytest.mark.parametrize("rows", [1, 20])
def test_matches_float64(rows, scales):
    rng = np.random.default_rng(0)
    codes, scale, value = weight(rng, 384, 256, scales)
    x = activations(rng, rows, 256)
    out = interpreted(x, codes, scale)
    assert out.dtype == jnp.bfloat16
    check(out, x, value, scales)


def test_groups_use_their_own_rows():
    rng = np.random.default_rng(2)
    codes, scale, value = weight(rng, 512, 128, "e8m0")
    x = activations(rng, 2, 3, 2, 128)
    check(interpreted(x, codes, scale, groups=2), x, value.reshape(2, 256, 128), "e8m0", "bngk,gmk->bngm")


def test_a_layer_of_stacked_weights_is_that_layer():
    rng = np.random.default_rng(4)
    codes, scale, value = weight(rng, 256, 128, "e8m0", layers=3)
    x = activations(rng, 4, 128)
    for layer in (0, 2):
        check(interpreted(x, codes, scale, layer=jnp.int32(layer)), x, value[layer], "e8m0")


def test_a_row_is_the_same_in_any_company():
    """Alone, among few and among several tiles of rows, the last of them partial: the same bits."""
    rng = np.random.default_rng(6)
    codes, scale, value = weight(rng, 256, 384, "e8m0")
    x = activations(rng, 150, 384)
    call = functools.partial(gpu.block_scaled_matmul, groups=1, layer=None, interpret=True)
    together = call(x, codes, scale, blocks=Blocks(outputs=64, rows=64))
    check(together, x, value, "e8m0")
    for rows in (slice(70, 71), slice(140, 150), slice(30, 100)):
        alone = call(x[rows], codes, scale, blocks=Blocks(outputs=64, rows=64))
        np.testing.assert_array_equal(np.asarray(alone, np.float32), np.asarray(together[rows], np.float32))


def test_gradients_are_the_twins():
    rng = np.random.default_rng(7)
    codes, scale, _ = weight(rng, 128, 256, "e8m0")
    x = activations(rng, 3, 256)

    def gradient(implementation):
        def value(x):
            out = block_scaled_matmul(x, codes, scale, implementation=implementation).astype(jnp.float32)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

        return np.asarray(jax.grad(value)(x), np.float32)

    np.testing.assert_array_equal(gradient("gpu_interpret"), gradient("xla"))


@pytest.mark.parametrize("name", [c.name for c in operations()["block_scaled_matmul"].cases() if c.representative])
def test_released_shapes_lower_for_cuda(name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    case = next(c for c in operations()["block_scaled_matmul"].cases() if c.name == name)
    choice = TABLE["h200"]
    blocks = choice.decode if "decode" in name else choice.prefill

    def call(x, weight, scale, layer):
        return gpu.block_scaled_matmul(x, weight, scale, layer=layer, groups=case.arguments["groups"], blocks=blocks)

    arguments = [case.arguments[key] for key in ("x", "weight", "scale", "layer")]
    exported = lowered_for_cuda(call, arguments)
    assert "triton" in exported.mlir_module()


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    rng = np.random.default_rng(8)
    codes, scale, _ = weight(rng, 128, 256, "e8m0")
    with pytest.raises(ValueError, match="'gpu': rows are float32; the kernel multiplies bfloat16"):
        block_scaled_matmul(jnp.ones((2, 256)), codes, scale, implementation="gpu")
