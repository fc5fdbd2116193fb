"""The GPU kernel of compressed_attention lowered for CUDA, and what it refuses."""

import pytest
from lowering import lowered_for_cuda
from test_compressed_attention import PROBLEMS, make

from pallas_kernels.compressed_attention import compressed_attention, gpu
from pallas_kernels.compressed_attention.blocks import TABLE
from pallas_kernels.registry import operations


@pytest.mark.parametrize("name", [c.name for c in operations()["compressed_attention"].cases() if c.representative])
def test_released_shapes_lower_for_cuda(name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    case = next(c for c in operations()["compressed_attention"].cases() if c.name == name)
    names = list(case.traced())

    def call(*arrays):
        arguments = dict(zip(names, arrays, strict=True)) | case.static()
        arguments = {"ring": None, "entries": None, "counts": None, "indices": None} | arguments
        return gpu.compressed_attention(**arguments, blocks=TABLE["h200"])

    exported = lowered_for_cuda(call, list(case.traced().values()))
    assert "triton" in exported.mlir_module()
    assert exported.out_avals[0].shape == case.arguments["q"].shape


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    args, kwargs = make(PROBLEMS["selected, words"])
    with pytest.raises(ValueError, match="'gpu': 8 heads are not a multiple of 16"):
        compressed_attention(*args, **kwargs, implementation="gpu")
