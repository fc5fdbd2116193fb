"""Choosing which implementation of an operation runs.

Names mean the same in every operation:

- ``"xla"``: the readable twin, on every backend; what the others are checked against.
- ``"tpu"``: the Pallas kernel for TPUs.
- ``"tpu_interpret"``: that same kernel run by Pallas' TPU interpreter on a CPU; slow, for tests.
- ``"gpu"``: the Pallas kernel for NVIDIA GPUs. ``"gpu_interpret"``: the same in its interpreter.

``"tpu_interpret|xla"`` takes the first of several that exists and serves the call: how a whole model runs on kernels
where an operation has none, or sizes are too small for one.

``None`` takes the kernel of the chip that the code is traced for, and the twin on CPUs, where an operation has no
kernel, where its kernel does not serve the arguments, and where arrays may be split over devices: a kernel sees one
device's arrays, so under a mesh it runs inside ``jax.shard_map`` (where the axes are manual) or not at all.
"""

from collections.abc import Callable, Mapping

import jax

from pallas_kernels.targets import Chip, current_chip

NAMES = ("xla", "tpu", "tpu_interpret", "gpu", "gpu_interpret")

_KERNEL_OF_PLATFORM = {"tpu": "tpu", "cuda": "gpu"}

Unserved = Callable[[Chip | None], str | None]


def choose(
    operation: str,
    implementations: Mapping[str, Callable],
    implementation: str | None,
    unserved: Mapping[str, Unserved] | None = None,
) -> Callable:
    """The named implementation of ``operation``, or the default for the chip in sight (module docstring).

    ``unserved`` maps a kernel's name to a function that says why it cannot serve this call on a chip (None: the
    chip is not known, as in an interpreter), or None if it can. Raises ``ValueError`` naming what exists for an
    unknown name, and with the reasons when kernels are asked for by name that cannot serve the call.
    """
    reasons = unserved or {}
    if implementation is None:
        return implementations[default_name(implementations, reasons)]
    names = implementation.split("|")
    refused = []
    for name in names:
        if name not in NAMES or (name not in implementations and len(names) == 1):
            raise ValueError(
                f"{operation}: no implementation {name!r}; available: {', '.join(sorted(implementations))}"
            )
        if name not in implementations:
            refused.append(f"{name!r}: there is none")
            continue
        chip = None if name.endswith("_interpret") else current_chip()
        reason = reasons[name](chip) if name in reasons else None
        if reason is None:
            return implementations[name]
        refused.append(f"{name!r}: {reason}")
    raise ValueError(f"{operation}: implementation does not serve this call: {'; '.join(refused)}")


def default_name(implementations: Mapping[str, Callable], unserved: Mapping[str, Unserved]) -> str:
    """The implementation that ``None`` stands for where this is called."""
    chip = current_chip()
    name = None if chip is None else _KERNEL_OF_PLATFORM.get(chip.platform)
    if name is None or name not in implementations or arrays_may_be_split():
        return "xla"
    reason = unserved[name](chip) if name in unserved else None
    return name if reason is None else "xla"


def arrays_may_be_split() -> bool:
    """Whether arrays seen here may be spread over devices by the partitioner, which cannot see into kernels."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    return any(size > 1 and axis not in mesh.manual_axes for axis, size in mesh.shape.items())
