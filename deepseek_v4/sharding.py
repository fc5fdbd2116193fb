"""Where arrays live: one set of rules from logical axes to mesh axes, and the checks that a mesh fits a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4.config import Config
from deepseek_v4.dispatch import BY_SIZE, Dispatch, Exchange, Precision, exchange_of
from deepseek_v4.formats import ACTIVATION_BLOCK, FP4_BLOCK, FP8_BLOCK, as_bytes, from_bytes
from deepseek_v4.nn.variables import Storage
from deepseek_v4.relayout import ExpertShards, gather_weight, mesh_names, move, narrower, scatter_tokens

if TYPE_CHECKING:
    from deepseek_v4.parameters import ParameterSpec

MESH_AXES = ("data", "expert", "tensor", "context")

_MATRIX_ROLES = ("linear", "expert", "scale", "matrix", "embedding", "hyper", "adapter")
_ACTIVATION_ROLES = ("linear", "expert")

LEAST_TOKENS = 8
"""Tokens of a row that a device must get for the row to be split, a tile of theirs: decode and drafts stay whole."""


Axis = str | tuple[str, ...] | None
"""How one dim is split: by a logical axis, over mesh axes (of more than one device), or not at all."""


class MeshError(ValueError):
    """A mesh that does not fit the devices or the model."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of every logical axis; () keeps an axis whole.

    Attention splits by whole output groups (``heads`` follow ``o_groups``), because ``wo_a`` mixes the heads of one
    group; the single KV head has nothing to split, so rings and compressor state follow the batch. Compressed entries
    and index keys (``entries``) are split besides, each shard holding a contiguous range of a sequence's entries; every
    query meets every shard, and what it finds is merged. Routed experts split by expert and then by their width. The
    vocabulary takes every model axis: embedding and head are the largest dense tensors. Experts and vocabulary also
    take ``context``, over which tokens are repeated: an axis that splits caches then stores no weight twice but those
    of attention.

    Between sublayers the tokens of a row are split over ``sequence``, axes over which they would be repeated, where
    there are enough of them: residual streams, norms, routers and what is projected by whole weights are computed once.
    Sublayers gather what they need of other tokens (attention: latents of queries, keys and entries to be; experts:
    their input), and where they add up parts of their output, each device gets the sums of its own tokens.

    ``fsdp`` are axes of the batch over which matrices are cut once more where they are stored, with their gradients and
    what an optimizer keeps of them: routed experts by expert where that divides, other matrices along ``embed``, or
    else along the longer dim that divides. Each layer's are gathered when it runs. Activations and caches do not know.

    Where ``experts`` are axes of the batch (``expert_parallel``), tokens travel to experts and back (``dispatch``), and
    nothing else of a layer is computed twice. Experts are then cut over those axes of ``fsdp`` that they do not have.
    """

    batch: tuple[str, ...] = ("data",)
    entries: tuple[str, ...] = ("context",)
    sequence: tuple[str, ...] = ("expert", "tensor")
    vocab: tuple[str, ...] = ("expert", "tensor", "context")
    embed: tuple[str, ...] = ()
    q_lora: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    o_groups: tuple[str, ...] = ("tensor",)
    index_heads: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert", "context")
    expert_width: tuple[str, ...] = ("tensor",)
    fsdp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            unknown = set(getattr(self, field.name)) - set(MESH_AXES)
            if unknown:
                raise MeshError(f"rules.{field.name}: unknown mesh axes {sorted(unknown)}, expected {list(MESH_AXES)}")
        if self.heads != self.o_groups:
            raise MeshError(
                f"rules: heads {self.heads} and o_groups {self.o_groups} must be split alike: "
                "an output group mixes all of its heads"
            )
        for first, second in (
            ("experts", "expert_width"),
            ("batch", "heads"),
            ("batch", "vocab"),
            ("batch", "entries"),
            ("batch", "sequence"),
            ("heads", "entries"),
            ("index_heads", "entries"),
        ):
            both = set(getattr(self, first)) & set(getattr(self, second))
            if both:
                raise MeshError(f"rules: mesh axes {sorted(both)} are used by both {first} and {second}")
        for field in dataclasses.fields(self):
            both = set(getattr(self, field.name)) & set(self.fsdp)
            if both and field.name not in ("batch", "experts", "fsdp"):
                raise MeshError(f"rules: mesh axes {sorted(both)} are used by both {field.name} and fsdp")
        if set(self.fsdp) - set(self.batch):
            raise MeshError(f"rules: fsdp {self.fsdp} must be among the mesh axes of the batch, {self.batch}")
        if set(self.experts) & set(self.batch) and set(self.experts) - set(self.batch):
            raise MeshError(
                f"rules: of the mesh axes of experts, {self.experts}, the batch has some but not all, {self.batch}"
            )

    @classmethod
    def expert_parallel(cls, fsdp: bool = False) -> "Rules":
        """Rows of the batch over experts' axis too: attention is not repeated, tokens travel to their experts.

        With ``fsdp`` matrices are stored cut over all axes of the batch.
        """
        batch = ("data", "expert")
        vocab = ("tensor", "context")
        fsdp_axes = batch if fsdp else ()
        return cls(batch=batch, sequence=("tensor",), experts=("expert",), vocab=vocab, fsdp=fsdp_axes)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with its rules: the layouts of parameters, activations and caches on it."""

    mesh: Mesh
    rules: Rules = Rules()
    exchange: Exchange = BY_SIZE

    @classmethod
    def of(
        cls, mesh: Mesh, *, expert_parallel: bool = False, expert_precision: Precision = "exact", fsdp: bool = False
    ) -> "Placement":
        """What the options of scripts mean; raises ``ValueError`` for a precision of rows that do not travel."""
        exchange = exchange_of(expert_precision, expert_parallel)
        if expert_parallel:
            return cls(mesh, Rules.expert_parallel(fsdp), exchange)
        return cls(mesh, Rules(fsdp=Rules().batch if fsdp else ()), exchange)

    @property
    def platform(self) -> str:
        """What the mesh consists of: "tpu", "gpu" or "cpu"."""
        return self.mesh.devices.flat[0].platform

    def size(self, logical: str) -> int:
        """Number of shards that a logical axis is cut into."""
        return self._count(getattr(self.rules, logical))

    def spec(self, axes: Sequence[Axis]) -> PartitionSpec:
        """Axes (None: whole) to a partition spec."""
        return PartitionSpec(*(axis or None if isinstance(axis, tuple) else self._mesh_axes(axis) for axis in axes))

    def tokens(self, length: int) -> tuple[str, tuple[str, ...]]:
        """The axes of tokens [B, S] between sublayers, of rows of ``length`` tokens."""
        names = self.mesh_axes("sequence")
        shards = self._count(names)
        return "batch", names if length % shards == 0 and length >= LEAST_TOKENS * shards else ()

    def token_shards(self, length: int, without: Sequence[str | None] = ()) -> int:
        """How many devices share a row's tokens between sublayers, or within one over axes not split ``without``."""
        taken = {name for axis in without if axis is not None for name in self.mesh_axes(axis)}
        return self._count([name for name in self.tokens(length)[1] if name not in taken])

    def split_tokens(self, x: jax.Array, before: Axis = ()) -> jax.Array:
        """x [B, S, ...] with its tokens as between sublayers; its gradient is that of tokens split over ``before``."""
        return self._moved(x, self.tokens(x.shape[1]), ("batch", before))

    def gather_tokens(self, x: jax.Array) -> jax.Array:
        """x [B, S, ...] with whole rows on every device; the gradient goes back to tokens as between sublayers."""
        split = self.tokens(x.shape[1])
        if not split[1]:
            return x
        # Said of x too: a partitioner may else gather what x is made from, and make all of it on every device.
        return self._moved(self.constrain(x, split), ("batch",), split)

    def shift_tokens(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """x [B, S, ...] with each token's place taken by the one before it, the first by ``before`` [B, 1, ...].

        Tokens are split as between sublayers; a device gets the last one of the device before it.
        """
        tokens = self.tokens(x.shape[1])
        names = tokens[1]

        def shift(x, before):
            if names:
                last, count = x[:, -1:], jax.lax.axis_size(names)
                last = jax.lax.ppermute(last, names, [(n, n + 1) for n in range(count - 1)])
                before = jnp.where(jax.lax.axis_index(names) == 0, before, last)
            return jnp.concatenate([before, x[:, :-1]], axis=1)

        return self.per_shard(shift, (x, before), (tokens, ("batch",)), tokens)

    def _moved(self, x: jax.Array, to: Sequence[Axis], back: Sequence[Axis]) -> jax.Array:
        there, here = (NamedSharding(self.mesh, self.spec(axes)) for axes in (to, back))
        if there.is_equivalent_to(here, x.ndim):
            return x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.lax.with_sharding_constraint(x, there)
        return move(x, there, here)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """The layout of an array; with ``shape``, dims that do not divide evenly stay whole (scales of odd blocks)."""
        if shape is not None:
            axes = [
                axis if axis is None or size % self.size(axis) == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
        return NamedSharding(self.mesh, self.spec(axes))

    def parameter_sharding(self, spec: "ParameterSpec") -> NamedSharding:
        """The layout in which a parameter is stored, and so its gradient and what an optimizer keeps of it.

        That of ``sharding``, with matrices cut once more over ``rules.fsdp``.
        """
        return NamedSharding(self.mesh, self.stored_spec(spec.axes, spec.shape, spec.role in _MATRIX_ROLES))

    def stored_spec(self, axes: Sequence[str | None], shape: Sequence[int], matrix: bool = True) -> PartitionSpec:
        """The layout in which a parameter of these logical axes is stored, a ``matrix`` or not."""
        whole = self.sharding(axes, shape).spec
        cut = [mesh_names(entry) for entry in whole]
        names = tuple(name for name in self.mesh_axes("fsdp") if all(name not in held for held in cut))
        if not names or not matrix:
            return whole
        left = [size // self._count(held) for size, held in zip(shape, cut, strict=True)]
        last = range(len(shape) - 2, len(shape))
        preferred = [dim for name in ("experts", "embed") for dim, axis in enumerate(axes) if axis == name]
        for dim in (*preferred, *sorted(last, key=lambda dim: left[dim], reverse=True)):
            if left[dim] % self._count(names) == 0:
                cut[dim] += names
                break
        return PartitionSpec(*(held or None for held in cut))

    def _count(self, names: Sequence[str]) -> int:
        return int(np.prod([self.mesh.shape.get(name, 1) for name in names], dtype=int))

    def gathered(self, specs: Any, params: Any, dtype: jax.typing.DTypeLike) -> Any:
        """The parameters of one layer as computations want them: whole along ``rules.fsdp`` but for routed experts.

        ``specs`` describe ``params``, a tree of the same structure; ``run_experts`` gathers the experts. Weights that
        are only multiplied with activations, which are of ``dtype``, travel in that dtype if it is narrower. Gradients
        come back cut as the parameters are, summed in their dtype.
        """
        if not self.mesh_axes("fsdp"):
            return params

        def gather(spec: "ParameterSpec", value: jax.Array) -> jax.Array:
            whole, cut = self.sharding(spec.axes, spec.shape), self.parameter_sharding(spec)
            if "experts" in spec.axes or whole == cut:
                return value
            if value.dtype.itemsize == 1:
                return from_bytes(jax.lax.with_sharding_constraint(as_bytes(value), whole), value.dtype)
            moved = narrower(value.dtype, dtype) if spec.role in _ACTIVATION_ROLES else value.dtype
            return gather_weight(value, whole, cut, moved)

        return jax.tree.map(gather, specs, params)

    def constrain(self, x: jax.Array, axes: Sequence[Axis]) -> jax.Array:
        """Asks the partitioner for this layout of an activation."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(axes)))

    def replicated(self) -> NamedSharding:
        """The layout of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def _mesh_axes(self, logical: str | None) -> tuple[str, ...] | None:
        if logical is None:
            return None
        return tuple(axis for axis in getattr(self.rules, logical) if self.mesh.shape.get(axis, 1) > 1) or None

    def per_shard(self, function: Callable, args: Sequence[Any], in_axes: Sequence, out_axes: Sequence) -> jax.Array:
        """Runs ``function`` on the local shard of every argument (None for an absent one), by axes.

        For operations that are local by construction: what a partitioner would have to discover, and a Pallas kernel
        cannot express, is stated here once.
        """
        in_specs = tuple(None if arg is None else self.spec(axes) for arg, axes in zip(args, in_axes, strict=True))
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=self.spec(out_axes), check_vma=False
        )(*args)

    def mesh_axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that a logical axis is split over."""
        return self._mesh_axes(logical) or ()

    def run_experts(
        self,
        run: Callable,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        layer: jax.Array,
        stored: Sequence[Any],
        axes: Sequence[tuple[tuple[str | None, ...], ...]],
    ) -> jax.Array:
        """Runs the expert MLP where the experts live: every shard adds what its own experts contribute.

        x [B, S, d] or [N, d], ids and weights [..., K] are split by batch. A shard sees the ids relative to its first
        expert, so those of other shards fall outside its range; where experts are split over axes of the batch, tokens
        come to them as ``exchange`` says. ``stored`` are the (weight, scale) of the linears, then adapters (a, b) or
        None, and ``axes`` the logical axes of each of these arrays. The sum over expert and width shards is float32;
        of rows [B, S] each device gets that of its tokens. What ``rules.fsdp`` has cut is gathered here, of a stack the
        one layer, and again in the backward pass. ``run`` takes ``gather`` and ``exchange`` as ``expert_mlp`` does.
        """
        rows = self.spec(("batch",))
        expert_axes = self.mesh_axes("experts")
        cut = tuple(name for name in self.mesh_axes("fsdp") if name not in expert_axes)
        weight_specs = tuple(
            arrays
            and tuple(
                None if array is None else self.stored_spec(names, array.shape) if cut else self.spec(names)
                for array, names in zip(arrays, described, strict=True)
            )
            for arrays, described in zip(stored, axes, strict=True)
        )
        width_axes = self.mesh_axes("expert_width")
        local = stored[0][0].shape[-3] // self.size("experts")
        travel = tuple(axis for axis in expert_axes if axis in self.rules.batch)
        group = self._count(travel)
        form = self.exchange.form_for(x[..., 0].size // self.size("batch") * group) if travel else None
        summed = width_axes if travel else expert_axes + width_axes
        split = self.tokens(x.shape[1])[1] if x.ndim == 3 else ()
        split = split if set(split) <= set(summed) else ()
        summed = tuple(name for name in summed if name not in split)

        options: dict[str, Any] = {"gather": ExpertShards(cut, weight_specs, x.dtype)} if cut else {}
        if form == "dispatch":
            options["exchange"] = Dispatch(travel, self.exchange, native=self.platform != "cpu")

        def shard(x, ids, weights, layer, stored):
            if form == "gather":
                x, ids, weights = (jax.lax.all_gather(a, travel, tiled=True) for a in (x, ids, weights))
            if form != "dispatch":
                ids = ids - (jax.lax.axis_index(expert_axes) * local if expert_axes else 0)
            out = run(x, ids, weights, layer, *stored, **options)
            if form == "gather":
                out = jax.lax.psum_scatter(out, travel, tiled=True)
            out = jax.lax.psum(out, summed) if summed else out
            return scatter_tokens(out, split) if split else out

        return jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=(rows, rows, rows, PartitionSpec(), weight_specs),
            out_specs=self.spec(("batch", split)) if split else rows,
            check_vma=False,
        )(x, ids, weights, layer, tuple(stored))


def parse_mesh(text: str) -> dict[str, int]:
    """``"data=1,expert=4,tensor=2"`` to sizes by axis (unnamed axes are 1); raises ``MeshError``."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip()
        if name not in sizes or not equals:
            raise MeshError(f"mesh {text!r}: bad part {part!r}, expected AXIS=SIZE with AXIS one of {list(MESH_AXES)}")
        if name in seen:
            raise MeshError(f"mesh {text!r}: axis {name!r} is given twice")
        seen.add(name)
        if not value.strip().isdigit() or int(value) < 1:
            raise MeshError(f"mesh {text!r}: size of {name!r} must be a positive integer, found {value!r}")
        sizes[name] = int(value)
    return sizes


def axes_of(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh of these sizes: ``context`` is one only where it has several devices."""
    return tuple(axis for axis in MESH_AXES if axis != "context" or sizes.get(axis, 1) > 1)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """As on a command line."""
    return ",".join(f"{axis}={sizes.get(axis, 1)}" for axis in axes_of(sizes))


def make_mesh(sizes: Mapping[str, int] | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given sizes over ``devices`` (default: all); raises ``MeshError`` if their number differs."""
    if isinstance(sizes, str):
        sizes = parse_mesh(sizes)
    devices = list(jax.devices() if devices is None else devices)
    axes = axes_of(sizes)
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    needed = int(np.prod(shape))
    if needed != len(devices):
        raise MeshError(
            f"mesh {describe_mesh(sizes)} needs {needed} devices, found {len(devices)}; "
            f"choose sizes whose product is {len(devices)}"
        )
    # Split physical axes are allowed so that every shape works on every torus; whole ones are preferred.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes)


def check_placement(
    placement: Placement, config: Config, storage: Storage, simulate: frozenset[str] = frozenset()
) -> None:
    """Raises ``MeshError`` listing everything about the model that the mesh cannot split evenly, before compiling."""
    size, problems = placement.size, []

    def divides(logical: str, count: int, what: str) -> None:
        if count % size(logical):
            axes = "*".join(getattr(placement.rules, logical))
            problems.append(f"{what} {count} does not divide over {axes} = {size(logical)}")

    divides("o_groups", config.o_groups, "o_groups (heads split by whole output groups)")
    divides("vocab", config.vocab_size, "vocab_size")
    divides("experts", config.n_routed_experts, "n_routed_experts")
    divides("embed", config.hidden_size, "hidden_size")
    divides("q_lora", config.q_lora_rank, "q_lora_rank")
    if any(config.layer_ratios):
        divides("index_heads", config.index_n_heads, "index_n_heads")
    block = {"fp4": FP4_BLOCK, "fp8": FP8_BLOCK}.get(storage.experts, 1)
    if "activations" in simulate:
        block = max(block, ACTIVATION_BLOCK)  # the input of w2 is rounded in blocks along the width
    shards = size("expert_width")
    if shards > 1 and config.moe_intermediate_size % (shards * block):
        problems.append(
            f"moe_intermediate_size {config.moe_intermediate_size} does not divide over "
            f"{'*'.join(placement.rules.expert_width)} = {shards} in whole scale blocks of {block}"
        )
    if problems:
        raise MeshError(
            f"mesh {describe_mesh(placement.mesh.shape)} does not fit this model:\n"
            + "\n".join(f"  {p}" for p in problems)
        )
