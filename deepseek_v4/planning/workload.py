"""What a pod shall do: the phase, how many sequences, how long they are; and the model that does it on a mesh."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from deepseek_v4.adapters import LoRA
from deepseek_v4.config import Config
from deepseek_v4.dispatch import Form, Precision
from deepseek_v4.execution import Execution
from deepseek_v4.layer_spec import LayerSpec, layer_specs
from deepseek_v4.model import Model
from deepseek_v4.nn.variables import MASTER, RELEASED, Storage
from deepseek_v4.parameters import ParameterSpec
from deepseek_v4.planning.topology import Topology
from deepseek_v4.sharding import MESH_AXES, Placement, axes_of

if TYPE_CHECKING:
    from deepseek_v4.training.step import Program

Phase = Literal["decode", "prefill", "train"]

BATCH = {"tokens": jnp.int32, "positions": jnp.int32, "targets": jnp.bool_, "real": jnp.bool_}
"""Arrays [B, S] of a training batch (``deepseek_v4.data``)."""


class WorkloadError(ValueError):
    """A workload that makes no sense, or that this project cannot run."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One compiled step and how large it is.

    ``batch`` sequences run together over the whole mesh. ``context`` is the tokens that every cache has room for, or
    the length of a training sequence. A ``decode`` call runs one token of every sequence at the end of its context, a
    ``prefill`` call ``chunk`` tokens of every sequence; with ``draft`` the MTP block runs too, and ``rollback`` tokens
    of every cache can be taken back. ``train`` keeps float32 masters with the state of Muon and AdamW, or with ``lora``
    the released weights and adapters of that rank. ``cache`` "fp8" keeps rows and index keys as the release does;
    ``expert_precision`` is that of rows which travel to experts, on meshes where they do.
    """

    phase: Phase
    batch: int
    context: int
    chunk: int = 2048
    draft: bool = True
    rollback: int = 4
    lora: int | None = None
    cache: Literal["bf16", "fp8"] = "bf16"
    expert_precision: Precision = "exact"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "chunk"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.rollback < 0:
            raise WorkloadError(f"rollback: expected at least 0, found {self.rollback}")
        if self.lora is not None and self.phase != "train":
            raise WorkloadError(f"lora: adapters are trained, but the phase is {self.phase}")

    @property
    def tokens(self) -> int:
        """Tokens of one sequence in one call."""
        if self.phase == "prefill":
            return min(self.chunk, self.context)
        return 1 if self.phase == "decode" else self.context

    @property
    def storage(self) -> Storage:
        """How the model's weights are stored."""
        return MASTER if self.phase == "train" and self.lora is None else RELEASED

    @property
    def adapters(self) -> LoRA | None:
        """What is trained beside packed weights."""
        return None if self.lora is None else LoRA(rank=self.lora, alpha=float(self.lora))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on a mesh of a slice, with its work: everything a plan is computed from.

    ``expert_parallel`` splits the batch over the expert axis too (``Rules.expert_parallel``).
    """

    config: Config
    topology: Topology
    mesh: tuple[tuple[str, int], ...]
    workload: Workload
    expert_parallel: bool = False

    @classmethod
    def of(
        cls,
        config: Config,
        topology: Topology,
        mesh: Mapping[str, int],
        workload: Workload,
        expert_parallel: bool = False,
    ) -> "Setting":
        """From sizes by axis (unnamed axes are 1)."""
        sizes = tuple((axis, mesh.get(axis, 1)) for axis in axes_of(mesh))
        return cls(config, topology, sizes, workload, expert_parallel)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of the mesh."""
        return dict(self.mesh)

    @property
    def mesh_text(self) -> str:
        """As on a command line, axes of one device left out."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh if size > 1) or f"{MESH_AXES[0]}=1"

    @property
    def title(self) -> str:
        """The mesh, and whether tokens travel to their experts."""
        return self.mesh_text + (", expert-parallel" if self.expert_parallel else "")

    @property
    def exchange(self) -> tuple[Form | None, int]:
        """How tokens come to experts (None: they are there), and how many devices are in a group."""
        group = self.placement.size("experts") if self.expert_parallel else 1
        if group == 1:
            return None, 1
        return self.placement.exchange.form_for(self.rows * self.workload.tokens * group), group

    @property
    def rows(self) -> int:
        """Sequences of one device's part of the batch."""
        return self.workload.batch // self.placement.size("batch")

    @property
    def scores_stay(self) -> bool:
        """Whether a kernel selects entries: index scores then stay on the chip.

        GPUs keep those of a few queries at a time, as many as their L2 cache takes.
        """
        return self.workload.phase != "train"

    @property
    def index_share(self) -> Literal["queries", "rows"] | None:
        """What devices with a part of the index heads each share out, to have all heads of it (None: nothing)."""
        split = self.placement.size("index_heads")
        if split == 1 or self.workload.phase == "train":
            return None
        if self.workload.tokens % split == 0:
            return "queries"
        return "rows" if self.rows % split == 0 else None

    @functools.cached_property
    def placement(self) -> Placement:
        """The mesh without devices: enough for layouts and bytes."""
        mesh: Any = AbstractMesh(tuple(self.sizes.values()), tuple(self.sizes))
        return self.place(mesh)

    def place(self, mesh: Mesh) -> Placement:
        """The setting on a mesh: training cuts what it stores over the batch's axes too."""
        return Placement.of(
            mesh,
            expert_parallel=self.expert_parallel,
            expert_precision=self.workload.expert_precision if self.expert_parallel else "exact",
            fsdp=self.workload.phase == "train",
        )

    def model(self, placement: Placement | None = None) -> Model:
        """The model as it runs there; raises ``MeshError`` where the mesh does not fit it."""
        published = self.workload.cache == "fp8"
        kernels = self.topology.chip.platform == "tpu" and self.workload.phase != "train"
        layout = ("columns" if published else "words") if kernels else "published" if published else "plain"
        execution = Execution(
            placement=placement or self.placement,
            simulate=frozenset({"kv", "indexer"} if published else ()),
            entry_layout=layout,
        )
        return Model(self.config, self.workload.storage, execution, self.workload.adapters)

    def program(self, placement: Placement | None = None) -> "Program":
        """The training step of a ``train`` workload, every layer recomputed in its backward pass."""
        from deepseek_v4.training.optimizer import OptimizerConfig
        from deepseek_v4.training.step import Program

        # Rates and their schedule are no part of what a step takes or costs.
        optimizer = OptimizerConfig(
            learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=1, decay_start=2, total_steps=3
        )
        only = () if self.workload.lora is None else ("*.lora_?",)
        return Program(model=self.model(placement), optimizer=optimizer, only=only, remat="full")

    @property
    def descriptions(self) -> "Descriptions":
        """Every parameter of the model, whatever the mesh."""
        return _descriptions(self.config, self.workload.storage, self.workload.adapters)

    def shard(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The part of a parameter that a device stores."""
        return self.placement.parameter_sharding(spec).shard_shape(spec.shape)

    def used_shard(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The part of a parameter that a device computes with."""
        return self.placement.sharding(spec.axes, spec.shape).shard_shape(spec.shape)


@dataclasses.dataclass(frozen=True)
class Descriptions:
    """What a model's parameters are: of all (as ``params``), of each kind of layer, and of an MTP block (or None)."""

    params: Any
    layers: Mapping[LayerSpec, Any]
    shell: Any
    draft: Any


@functools.lru_cache(maxsize=16)
def _descriptions(config: Config, storage: Storage, adapters: LoRA | None) -> Descriptions:
    model = Model(config, storage, adapters=adapters)
    draft = model.draft_specs(model.drafts[0]) if model.drafts else None
    layers = {spec: model.layer_specs(spec) for spec in set(layer_specs(config))}
    return Descriptions(model.parameter_specs(), layers, model.shell_specs(), draft)


def size_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array, without padding."""
    return math.prod(shape) * dtype.itemsize


def leaves_per_device(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of one device's shard of every leaf of a tree of abstract arrays with shardings."""
    return [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
