"""Descriptions of every parameter, read off the modules: shape, dtype, logical axes, role.

The same descriptions serve restoring, converting, sharding, planning and the optimiser. A path is the tensor name of
the release split at its dots, with the routed experts of a layer stacked: ``layers.3.ffn.experts.7.w1.weight`` is row 7
of the leaf ("ffn", "experts", "w1", "weight") of layer 3.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_v4.adapters import LoRA, adapt
from deepseek_v4.config import Config
from deepseek_v4.formats import as_stored
from deepseek_v4.layer_spec import LayerSpec
from deepseek_v4.nn.block import Block, DraftBlock, OutputHead
from deepseek_v4.nn.linear import PlainLinear
from deepseek_v4.nn.variables import Storage, Weight, variable

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """One parameter: shape, dtype, logical axis per dim, role, kind, fused matrices (see ``nn.variables.variable``)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    role: str
    kind: type[nnx.Variable]
    matrices: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Shell(OutputHead):
    """What surrounds the layers: embedding, output head, vocabulary projection."""

    def __init__(self, config: Config, storage: Storage):
        super().__init__(config, storage)
        self.embed = Embedding(config, storage)
        self.head = PlainLinear(config.vocab_size, config.hidden_size, ("vocab", "embed"), storage, role="embedding")


class Embedding(nnx.Module):
    """Token embedding [vocab, d]."""

    def __init__(self, config: Config, storage: Storage):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = variable(Weight, shape, storage.matrices, ("vocab", "embed"), "embedding")


def shell_module(config: Config, storage: Storage) -> nnx.Module:
    """The abstract module around the layers."""
    return nnx.eval_shape(lambda: Shell(config, storage))


def block_module(config: Config, spec: LayerSpec, storage: Storage, adapters: LoRA | None = None) -> nnx.Module:
    """The abstract module of a layer (no arrays), with its adapters."""
    return nnx.eval_shape(lambda: adapt(Block(config, spec, storage), adapters))


def draft_module(config: Config, spec: LayerSpec, storage: Storage, adapters: LoRA | None = None) -> nnx.Module:
    """The abstract module of an MTP block, with its adapters."""
    return nnx.eval_shape(lambda: adapt(DraftBlock(config, spec, storage), adapters))


def describe(module: nnx.Module) -> dict[Path, ParameterSpec]:
    """Every parameter of an abstract module by path, in a fixed (sorted) order."""
    described = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        metadata = leaf.get_metadata()
        value = leaf.get_value()
        described[tuple(str(key) for key in path)] = ParameterSpec(
            tuple(value.shape),
            jnp.dtype(value.dtype),
            tuple(metadata["axes"]),
            metadata["role"],
            type(leaf),
            metadata["matrices"],
        )
    return dict(sorted(described.items()))


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{("a", "b"): x} to {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """The inverse of ``nest``."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        else:
            flat[(*prefix, key)] = value
    return flat


def stacked(spec: ParameterSpec, repeats: int) -> ParameterSpec:
    """The description of ``repeats`` such parameters stacked on a new first dim, which is never sharded."""
    return dataclasses.replace(spec, shape=(repeats, *spec.shape), axes=(None, *spec.axes))


def is_spec(value: Any) -> bool:
    """For ``jax.tree.map(..., is_leaf=is_spec)`` over trees of descriptions."""
    return isinstance(value, ParameterSpec)


def map_specs(function: Callable[[ParameterSpec], Any], tree: Any) -> Any:
    """Applies ``function`` to every description of a tree."""
    return jax.tree.map(function, tree, is_leaf=is_spec)


def map_members(function: Callable[..., Any], *trees: Any) -> Any:
    """Applies ``function`` to the nested dicts that trees like ``params`` consist of: shell, group members, drafts."""
    shells, groups, drafts = ([tree[part] for tree in trees] for part in ("shell", "groups", "drafts"))
    return {
        "shell": function(*shells),
        "groups": tuple(
            tuple(function(*members) for members in zip(*group, strict=True)) for group in zip(*groups, strict=True)
        ),
        "drafts": tuple(function(*blocks) for blocks in zip(*drafts, strict=True)),
    }


def stored_as(specs: Any, params: Any, storage: Storage | None) -> Any:
    """Unquantised parameters as a checkpoint of ``storage`` would hold them (None: as they are), straight-through.

    ``specs`` describe ``params``; every leaf keeps its shape and dtype. One layer at a time is what to call it with:
    the rounded weights, routed experts among them, are arrays beside the others.
    """
    if storage is None:
        return params

    def rounded(spec: ParameterSpec, value: jax.Array) -> jax.Array:
        stored = storage.format_of(spec.role)
        return value if stored is None else as_stored(value, stored, storage.scales)

    return jax.tree.map(rounded, specs, params, is_leaf=is_spec)
