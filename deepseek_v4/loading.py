"""From the words of a command line to a model on devices: simulated devices, mesh, execution, checkpoint."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.config import Config
from deepseek_v4.dispatch import Precision, exchange_of
from deepseek_v4.execution import SIMULATIONS, Execution
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Storage
from deepseek_v4.sharding import MeshError, Placement, check_placement, describe_mesh, make_mesh
from deepseek_v4.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """Options of scripts: how a model is split over devices."""

    mesh: str | None = None
    """For example data=1,expert=4,tensor=2. Default: all devices, most of them along expert, some along tensor."""
    expert_parallel: bool = False
    """Split the sequences over the expert axis too: attention is not repeated there, tokens travel to their experts."""
    expert_precision: Precision = "exact"
    """With --expert-parallel: fp8 sends tokens in FP8, as experts take them with --simulate activations; fp8-bfloat16
    gets bfloat16 results back instead of float32. Tokens of a group that are few are gathered, and sent as they are."""

    def place(self, mesh: Mesh) -> Placement:
        """These options on a mesh; raises ``ValueError`` for those that contradict each other."""
        return Placement.of(mesh, expert_parallel=self.expert_parallel, expert_precision=self.expert_precision)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint opened for devices; ``tokenizer`` is None if it has none. Its weights are not read yet."""

    model: Model
    tokenizer: Tokenizer | None
    checkpoint: Any

    def restore(self) -> Params:
        """The parameters, read straight onto their devices; raises ``CheckpointError``."""
        return self.checkpoint.load(self.model)

    @property
    def chips(self) -> int:
        """Devices that work together."""
        placement = self.model.execution.placement
        return 1 if placement is None else placement.mesh.size

    @property
    def description(self) -> str:
        """Where and how the model runs, in one line."""
        placement = self.model.execution.placement
        device = jax.devices()[0]
        mesh = "one device" if placement is None else describe_mesh(placement.mesh.shape)
        simulated = ",".join(sorted(self.model.execution.simulate))
        return f"{device.device_kind}, {mesh}, {self.model.execution.dtype}" + (
            simulated and f", simulating {simulated}"
        )


_IN_ORDER = ("--xla_cpu_multi_thread_eigen=false", "--xla_cpu_enable_concurrency_optimized_scheduler=false")
"""XLA flags with which a simulated device runs its operations one after the other."""


def simulate_devices(count: int | None) -> None:
    """Makes ``count`` simulated CPU devices JAX's devices; call it before anything uses JAX (None: do nothing).

    Each runs its operations in order, as an accelerator does: XLA's CPU backend would start independent collectives in
    an order of its own on each device, which ends in deadlocks and in sums of parts that do not belong together. The
    flags for that are not set where XLA_FLAGS is set already.
    Raises ``ValueError`` for a count below 1 and ``RuntimeError`` if JAX has started already.
    """
    if count is None:
        return
    if count < 1:
        raise ValueError(f"simulated devices: expected at least 1, found {count}")
    os.environ.setdefault("XLA_FLAGS", " ".join(_IN_ORDER))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def parse_simulations(text: str) -> frozenset[str]:
    """``"kv,indexer"`` to names; raises ``ValueError`` for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SIMULATIONS:
            raise ValueError(f"simulate: unknown {name!r}, expected any of {','.join(SIMULATIONS)}")
    return frozenset(names)


def choose_placement(
    parallelism: Parallelism, config: Config, storage: Storage, simulate: frozenset[str] = frozenset()
) -> Placement | None:
    """The placement of these options, on the mesh of ``default_placement`` where they name none; None: one device."""
    exchange_of(parallelism.expert_precision, parallelism.expert_parallel)
    if parallelism.mesh is not None:
        return parallelism.place(make_mesh(parallelism.mesh))
    placement = default_placement(config, storage, jax.devices(), simulate)
    return None if placement is None else parallelism.place(placement.mesh)


def default_placement(
    config: Config, storage: Storage, devices: Sequence[jax.Device], simulate: frozenset[str] = frozenset()
) -> Placement | None:
    """A mesh over all ``devices`` that fits the model; None for one device.

    Experts are most of the weights and split best, so the expert axis takes most devices; every doubling of both axes
    beyond that goes to the tensor axis, which also splits attention (8 devices: expert=4,tensor=2). Falls back to
    other splits, ``data`` last, since it repeats the weights. Raises ``MeshError`` if none fits.
    """
    count = len(devices)
    if count == 1:
        return None
    sizes = [
        (data, expert, count // data // expert)
        for data in range(1, count + 1)
        if count % data == 0
        for expert in range(1, count // data + 1)
        if count // data % expert == 0
    ]
    # tensor closest below expert / 2 in ratio: 2 of 8, 4 of 32; ties to the larger expert axis.
    sizes.sort(key=lambda size: (size[0], abs(2 * size[2] - size[1]), -size[1]))
    for data, expert, tensor in sizes:
        placement = Placement(make_mesh({"data": data, "expert": expert, "tensor": tensor}, devices))
        try:
            check_placement(placement, config, storage, simulate)
        except MeshError:
            continue
        return placement
    raise MeshError(f"no mesh of {count} devices fits this model; choose one with --mesh over fewer devices")


def open_model(
    checkpoint: str | Path,
    *,
    dtype: str = "bfloat16",
    simulate: str = "",
    parallelism: Parallelism = Parallelism(),
    implementation: str | None = None,
) -> Loaded:
    """Opens a Hugging Face or Orbax directory and decides where and how it runs (see ``Execution``).

    Raises ``CheckpointError``, ``ConfigError``, ``MeshError``, ``TokenizerError`` or ``ValueError``, each saying what
    was wrong where.
    """
    execution = Execution(dtype, parse_simulations(simulate), implementation=implementation)
    opened = open_checkpoint(checkpoint)
    placement = choose_placement(parallelism, opened.config, opened.storage, execution.simulate)
    model = Model(opened.config, opened.storage, dataclasses.replace(execution, placement=placement))
    tokenizer = None if opened.tokenizer_path is None else Tokenizer.from_file(opened.tokenizer_path)
    return Loaded(model, tokenizer, opened)
