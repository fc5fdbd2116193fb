"""GPU kernels at V4 shapes through the real CUDA compilers, where the extra [gpu] is installed; no GPU is needed.

Each target compiles in a process of its own: the plugin serves one kind of GPU per process. Without the extra,
tests/kernels/test_gpu_*.py lower the same shapes as far as jax goes alone.
"""

import importlib.util

import pytest
from test_compile_tpu import _compile

from pallas_kernels import targets
from pallas_kernels.registry import operations

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the CUDA plugin is not installed (extra [gpu])"
)


@needs_cuda
@pytest.mark.parametrize("target", ["h200", "b200"])
def test_representative_shapes_compile(target):
    _compile("--targets", target, "--representative")


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("target", ["h200", "b200"])
def test_every_shape_compiles(target):
    _compile("--targets", target)


@pytest.mark.parametrize("target", ["h200", "b200"])
def test_every_case_of_inference_has_a_kernel(target):
    """What inference runs is served at every named shape, in the form GPUs keep it; what only training runs is not."""
    chip = targets.chip(target)
    for operation in operations().values():
        for case in operation.cases():
            training = "/train/" in case.name
            assert (operation.unserved(chip, case.on(chip).arguments) is None) != training, case.name
