"""One program on many processes: where jax.distributed is started, and which rows of a batch a process makes."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint.multihost import get_barrier_sync_fn

from deepseek_v4.sharding import MeshError, Placement


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of one run find each other; the defaults are a single process."""

    distributed: bool = False
    """Several processes, found by JAX itself on TPU pods, under Slurm, Open MPI and in Kubernetes jobs."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX cannot find it. Give num_processes and process_id too."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""


def start(processes: Processes = Processes()) -> None:
    """Joins the processes of a run; call it before anything else uses JAX. A single process starts nothing.

    On CPUs collectives run over Gloo. A SIGTERM to one process is announced to all (see ``trainer.Interruptions``).
    Raises ``ValueError`` for settings that do not go together, or where the other processes are not reached.
    """
    given = (processes.coordinator, processes.num_processes, processes.process_id)
    if not processes.distributed and given == (None, None, None):
        return
    if not processes.distributed and None in given:
        raise ValueError(
            "coordinator, num_processes and process_id go together, found "
            f"{', '.join(map(str, given))}; give all three, or distributed alone where JAX finds them by itself"
        )
    if processes.coordinator is not None and not processes.coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator: expected HOST:PORT, found {processes.coordinator!r}")
    if None not in given and not 0 <= (processes.process_id or 0) < (processes.num_processes or 0):
        raise ValueError(
            f"process_id: expected 0 to {(processes.num_processes or 0) - 1} of num_processes "
            f"{processes.num_processes}, found {processes.process_id}"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        where = processes.coordinator or "found by JAX"
        raise ValueError(
            f"the processes of this run did not meet (coordinator {where}): {error}; start one with every process_id "
            "from 0, all with the coordinator address of process 0, which must be reachable"
        ) from error


def is_main() -> bool:
    """Whether this process is the one that prints and writes what there is one of."""
    return jax.process_index() == 0


def meet(where: str, seconds: float = 7200) -> None:
    """Waits until every process of the run is at the point that ``where`` names (once), without using devices.

    For what takes each process its own time, such as compiling: a collective would not wait so long.
    """
    if jax.process_count() > 1:
        get_barrier_sync_fn()(key=where, timeout_ms=int(1000 * seconds))


def batch_share(placement: Placement | None) -> tuple[int, int]:
    """(index, count): the rows of a batch that this process's devices hold are part ``index`` of ``count`` equal ones.

    Processes whose devices hold the same rows get the same part. Raises ``MeshError`` for a mesh on which the rows of a
    process are not one contiguous part.
    """
    if placement is None:
        return 0, 1
    size = placement.size("batch")
    held = placement.sharding(("batch",)).addressable_devices_indices_map((size,)).values()
    rows = sorted({row for index in held for row in range(*(index or (slice(None),))[0].indices(size))})
    count = size // len(rows)
    if rows != list(range(rows[0], rows[0] + len(rows))) or size % len(rows) or rows[0] % len(rows):
        raise MeshError(
            f"mesh: process {jax.process_index()} holds parts {rows} of {size} of a batch; "
            "expected an equal, contiguous range for every process: make the data axis a multiple of the processes"
        )
    return rows[0] // len(rows), count


def place_rows(placement: Placement | None, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows [b, S] of a batch (see ``batch_share``) as arrays over all devices [B, S]."""
    if placement is None:
        return {name: jnp.asarray(rows) for name, rows in batch.items()}
    sharding = placement.sharding(("batch", None))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
