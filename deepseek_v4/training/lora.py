"""Adapters of a model: made, kept apart from the weights they stand beside, saved and loaded.

With ``Model(..., adapters=LoRA(...))`` every linear that is named has two more leaves beside its weight, ``lora_a``
[rank, in] and ``lora_b`` [out, rank] (routed experts: stacked by expert), float32 whatever the weight is stored in.
Weights stay as they are: packed ones are decoded where they are multiplied, also in the backward pass.

    model = Model(config, RELEASED, execution, LoRA(rank=16, alpha=32, patterns=("attn.w*", "ffn.experts")))
    base = load_base(checkpoint, model)
    params = attach(base, init_adapters(model, seed=0))
    trained, frozen = partition.split(params, partition.trainable_mask(model.parameter_specs(), only=("*.lora_?",)))
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from deepseek_v4.adapters import LoRA
from deepseek_v4.checkpoint import Checkpoint, CheckpointError
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.checkpoint.safetensors import SafetensorsFile, write_safetensors
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Buffer
from deepseek_v4.parameters import ParameterSpec, flatten, map_members, nest
from deepseek_v4.sharding import Placement
from deepseek_v4.training.partition import parameter_names

Adapters = dict[str, Any]
"""The adapter leaves of ``Params``, in its structure."""

_LEAVES = ("lora_a", "lora_b")
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def split_adapters(params: Params) -> tuple[Params, Adapters]:
    """(base, adapters): the parameters of the model without adapters, and the rest."""

    def keep(adapters: bool) -> Params:
        return map_members(
            lambda member: nest({p: a for p, a in flatten(member).items() if (p[-1] in _LEAVES) == adapters}), params
        )

    return keep(False), keep(True)


def attach(base: Params, adapters: Adapters) -> Params:
    """The inverse of ``split_adapters``."""
    return map_members(
        lambda member, added: nest(dict(sorted((flatten(member) | flatten(added)).items()))), base, adapters
    )


def base_model(model: Model) -> Model:
    """``model`` without its adapters."""
    return dataclasses.replace(model, adapters=None)


def load_base(checkpoint: Checkpoint, model: Model) -> Params:
    """The parameters that a checkpoint holds of a model with adapters: all but these. Raises ``CheckpointError``."""
    return checkpoint.load(base_model(model))


def init_adapters(model: Model, seed: int) -> Adapters:
    """New adapters: a is normal with variance 1 / in, b is zero, so that at first nothing changes.

    A leaf depends on ``seed`` and its name alone, not on the mesh.
    """
    specs = split_adapters(model.parameter_specs())[1]
    names = split_adapters(parameter_names(model.parameter_specs()))[1]
    placement = model.execution.placement

    def make(spec: ParameterSpec, leaf: Sequence[str]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(leaf[0].encode()))
        return _initial(spec, leaf[0].endswith("lora_a"), placement)(key)

    return map_members(
        lambda described, named: nest({p: make(s, flatten(named)[p]) for p, s in flatten(described).items()}),
        specs,
        names,
    )


@functools.lru_cache(maxsize=64)
def _initial(spec: ParameterSpec, drawn: bool, placement: Placement | None) -> Callable:
    def values(key):
        if not drawn:
            return jnp.zeros(spec.shape, spec.dtype)
        return jax.random.normal(key, spec.shape, spec.dtype) * spec.shape[-1] ** -0.5

    return jax.jit(values, out_shardings=None if placement is None else placement.parameter_sharding(spec))


# --- files ------------------------------------------------------------------------------------------------------------


def fingerprint(model: Model, params: Params) -> str:
    """A digest of the weights that adapters were trained beside, the same on every mesh.

    Adapters are left out, and so are buffers: the balance biases move while adapters are trained.
    """
    base = base_model(model)
    digest = hashlib.sha256(json.dumps([base.config.to_dict(), dataclasses.asdict(base.storage)]).encode())
    specs, names = base.parameter_specs(), parameter_names(base.parameter_specs())

    def add(described: Mapping[str, Any], named: Mapping[str, Any], member: Mapping[str, Any]) -> None:
        values, leaf_names = flatten(member), flatten(named)
        for path, spec in flatten(described).items():
            if spec.kind is not Buffer:
                digest.update(f"{leaf_names[path]} {int(checksum(values[path]))}\n".encode())

    map_members(add, specs, names, params)
    return digest.hexdigest()


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """A fingerprint of an array's bits, uint32 [], the same on every mesh."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # Elements weigh differently by place, so that exchanged ones show; integer sums do not depend on their order.
    place = jnp.uint32(1)
    for dim in range(array.ndim):
        place += lax.broadcasted_iota(jnp.uint32, array.shape, dim) * jnp.uint32(0x9E3779B1 + 2 * dim)
    place ^= place >> 15
    return jnp.sum((bits + 1) * (2 * place + 1), dtype=jnp.uint32)


def save_adapters(directory: str | FilePath, model: Model, params: Params) -> None:
    """Writes the adapters of ``params`` alone: ``adapter_model.safetensors`` and ``adapter_config.json``.

    A tensor is named like the released weight it stands beside: "layers.3.attn.wq_b.lora_a"; those of a layer's routed
    experts are stacked, "layers.3.ffn.experts.w1.lora_b" [E, out, rank]. The config holds rank, alpha, patterns and the
    ``fingerprint`` of the weights. Every process calls this; the first one writes.
    """
    lora = lora_of(model)
    base = fingerprint(model, params)
    tensors: dict[str, np.ndarray] = {}

    def collect(named: Mapping[str, Any], member: Mapping[str, Any]) -> None:
        for path, array in flatten(member).items():
            leaf = flatten(named)[path]
            whole = np.asarray(
                array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
            )
            tensors.update(zip(leaf, whole if leaf[0].startswith("layers.") else whole[None], strict=True))

    map_members(collect, split_adapters(parameter_names(model.parameter_specs()))[1], split_adapters(params)[1])
    if jax.process_index() == 0:
        directory = FilePath(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            directory / _TENSORS,
            {name: ("F32", array.shape) for name, array in tensors.items()},
            lambda entries: (tensors[entry.name] for entry in entries),
        )
        config = {"type": "lora", **dataclasses.asdict(lora), "base_fingerprint": base}
        write_atomically(directory / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_adapter_config(directory: str | FilePath) -> tuple[LoRA, str]:
    """What adapters in a directory are, and the fingerprint of their base; raises ``CheckpointError``."""
    path = FilePath(directory) / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return LoRA(config["rank"], config["alpha"], tuple(config["patterns"])), config["base_fingerprint"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the description of adapters that save_adapters writes: {error}") from error


def load_adapters(directory: str | FilePath, model: Model, base: Params | None = None) -> Adapters:
    """Adapters that ``save_adapters`` wrote, laid out for ``model``.

    Raises ``CheckpointError`` if ``model.adapters`` are others than those saved, if tensors are missing, unknown or of
    another shape, and, with ``base``, if they were trained beside other weights.
    """
    directory, lora = FilePath(directory), lora_of(model)
    saved, trained_beside = read_adapter_config(directory)
    if saved != lora:
        raise CheckpointError(f"{directory}: expected adapters {lora}, found {saved}")
    if base is not None and fingerprint(model, base) != trained_beside:
        raise CheckpointError(f"{directory}: these adapters were trained beside other weights")
    specs, names = (
        split_adapters(tree)[1] for tree in (model.parameter_specs(), parameter_names(model.parameter_specs()))
    )
    file = SafetensorsFile(directory / _TENSORS)
    wanted: dict[str, tuple[int, ...]] = {}

    def expect(described: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        for path, spec in flatten(described).items():
            leaf = flatten(named)[path]
            wanted.update(dict.fromkeys(leaf, spec.shape[1:] if leaf[0].startswith("layers.") else spec.shape))

    map_members(expect, specs, names)
    problems = [f"{name}: unknown" for name in sorted(set(file.entries) - set(wanted))]
    for name, shape in wanted.items():
        entry = file.entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing")
        elif (entry.dtype, entry.shape) != ("F32", shape):
            problems.append(f"{name}: expected F32{list(shape)}, found {entry.dtype}{list(entry.shape)}")
    if problems:
        raise CheckpointError(f"{directory}: not the adapters of this model", problems)
    placement = model.execution.placement

    def place(spec: ParameterSpec, leaf: Sequence[str]) -> jax.Array:
        whole = np.stack([file.read(name) for name in leaf]).reshape(spec.shape)
        if placement is None:
            return jnp.asarray(whole)
        return jax.make_array_from_callback(spec.shape, placement.parameter_sharding(spec), lambda index: whole[index])

    try:
        return map_members(
            lambda described, named: nest({p: place(s, flatten(named)[p]) for p, s in flatten(described).items()}),
            specs,
            names,
        )
    finally:
        file.close()


def lora_of(model: Model) -> LoRA:
    """The adapters of a model; raises ``ValueError`` if it has none."""
    if model.adapters is None:
        raise ValueError("this model has no adapters (Model.adapters is None)")
    return model.adapters
