"""Lowering a GPU kernel to Triton's language, as far as jax goes without NVIDIA's compiler."""

from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.registry import operations
from pallas_kernels.targets import chip


def lowered_for_cuda(call: Callable, arguments: Sequence[jax.ShapeDtypeStruct]) -> jax.export.Exported:
    """``call`` of arrays like ``arguments``, exported for an H200 that need not be there."""
    # jax 0.11 asks which GPU it is; 0.10.2 does not mind being told.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    # Triton's call promises no compatibility between versions of jax; nothing is kept here.
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        return jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=unchecked)(*arguments)


def served_on_gpus(name: str) -> Iterator[str]:
    """The names of an operation's representative cases that a GPU kernel serves."""
    operation = operations()[name]
    for case in operation.cases():
        if case.representative and operation.unserved(chip("h200"), case.on(chip("h200")).arguments) is None:
            yield case.name
