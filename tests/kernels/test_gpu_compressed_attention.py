"""The GPU kernel of compressed_attention: its parts, lowered for CUDA, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered_for_cuda, served_on_gpus
from test_compressed_attention import IMPLEMENTATIONS, PROBLEMS, Problem, make

from pallas_kernels.compressed_attention import compressed_attention, gpu
from pallas_kernels.compressed_attention.blocks import TABLE
from pallas_kernels.registry import operations


@pytest.mark.parametrize("name", served_on_gpus("compressed_attention"))
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


def test_parts_change_no_bit(monkeypatch):
    """Entries in one part, or with more room behind them in several; all rows at a time, or one by one."""
    call = IMPLEMENTATIONS["gpu_interpret, small blocks"]
    args, kwargs = make(Problem((3, 30, 12), total=8, ring=9))
    roomy = kwargs | {"entries": jnp.pad(kwargs["entries"], [(0, 0), (0, 0), (0, 12), (0, 0)], constant_values=jnp.nan)}
    alone = np.asarray(call(*args, **kwargs))
    np.testing.assert_array_equal(np.asarray(call(*args, **roomy)), alone)
    monkeypatch.setattr(gpu, "_PART_BYTES", 1)
    np.testing.assert_array_equal(np.asarray(call(*args, **roomy)), alone)
    args, kwargs = make(PROBLEMS["all visible, few queries"])
    one_by_one = np.asarray(call(*args, **kwargs))
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(call(*args, **kwargs)), one_by_one)


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    args, kwargs = make(PROBLEMS["selected, words"])
    with pytest.raises(ValueError, match="'gpu': 8 heads are not a multiple of 16"):
        compressed_attention(*args, **kwargs, implementation="gpu")
