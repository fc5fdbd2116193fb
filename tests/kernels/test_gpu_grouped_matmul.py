"""The GPU kernels of the expert MLP: decoding, any block size, what they read, and lowered for CUDA."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lowering import lowered_for_cuda
from test_grouped_matmul import E2M1, LIMIT, check, equations, rows, weights

from pallas_kernels import gpu_decode
from pallas_kernels.block_scaled_matmul.blocks import Blocks
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.registry import operations


def test_every_fp4_byte_decodes_exactly():
    """All bytes in every place of a word, at all scales from 2^-125 to 2^121."""
    rng = np.random.default_rng(0)
    packed = np.stack([rng.permutation(256)[:64] for _ in range(1024)]).astype(np.uint8)
    scale = rng.permuted(np.tile(np.arange(2, 249), 17)[:4096]).astype(np.uint8).reshape(1024, 4)
    words = (gpu_decode.as_words(jnp.asarray(a)) for a in (packed, scale.view(ml_dtypes.float8_e8m0fnu)))
    tile, scales = words
    found = gpu_decode.fp4_tile(tile, scales[:, 0], jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(1024, 128)
    expected = E2M1[codes] * np.repeat(2.0 ** (scale.astype(int) - 127), 32, axis=-1)
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_every_e4m3_byte_decodes_exactly():
    codes = np.random.default_rng(1).permuted(np.tile(np.arange(256, dtype=np.uint8), (8, 1)), axis=1)
    codes = codes.view(ml_dtypes.float8_e4m3fn)
    found = gpu_decode.e4m3_tile(gpu_decode.as_words(jnp.asarray(codes)), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float64), codes.astype(np.float64))


@pytest.mark.parametrize("blocks", [Blocks(outputs=64, rows=16), Blocks(outputs=128, rows=64)], ids=["16", "64"])
def test_a_token_is_the_same_in_any_company(blocks):
    """Forty tokens at two experts, in three blocks of rows each or in one that they do not fill; one token alone."""
    packed, values = weights("fp4")
    x, routing = rows(8, tokens=40)
    ids = np.tile([[2, 1, 9]], (40, 1))
    call = functools.partial(gpu.expert_mlp, limit=LIMIT, simulate_activations=False, layer=None, interpret=True)

    def run(which):
        arguments = (x[which], jnp.asarray(ids, jnp.int32)[which], routing[which])
        return np.asarray(jax.jit(functools.partial(call, blocks=blocks))(*arguments, *packed))

    together = run(slice(None))
    check(together, x, ids, routing, values)
    np.testing.assert_array_equal(run(slice(38, 39)), together[38:39])


@pytest.mark.parametrize("name", ["block_scaled_matmul", "expert_mlp"])
def test_no_array_is_read_whose_elements_triton_counts_wrongly(name):
    """Between 2^31 elements and 4 GiB: a layer of Pro's experts is there, as bytes, and so may be a stack of any."""
    operation = operations()[name]
    seen = False
    for case in operation.cases():
        if "decode" not in case.name:
            continue
        names = list(case.traced())

        def call(*arrays, case=case, names=names):
            arguments = dict(zip(names, arrays, strict=True)) | case.static()
            return operation.function(**arguments, implementation="gpu_interpret")

        traced = jax.make_jaxpr(call)(*case.traced().values())
        calls = [e for e in equations(traced.jaxpr) if e.primitive.name == "pallas_call"]
        assert calls
        for variable in (v for e in calls for v in e.invars):
            elements = math.prod(variable.aval.shape)
            # One layer more or fewer in the stack must not matter either.
            assert variable.aval.dtype.itemsize > 1 or elements < 1 << 20, (case.name, variable.aval)
            seen |= 1 << 31 < elements * variable.aval.dtype.itemsize <= 1 << 32
    assert seen == (name == "expert_mlp")


@pytest.mark.parametrize("name", [c.name for c in operations()["expert_mlp"].cases() if c.representative])
def test_released_shapes_lower_for_cuda(name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    operation = operations()["expert_mlp"]
    case = next(c for c in operation.cases() if c.name == name)
    names = list(case.traced())

    def call(*arrays):
        arguments = dict(zip(names, arrays, strict=True)) | case.static()
        return operation.function(**arguments, implementation="gpu")

    exported = lowered_for_cuda(call, list(case.traced().values()))
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 2
