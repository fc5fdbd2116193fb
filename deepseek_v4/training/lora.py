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
from deepseek_v4.checkpoint.layout import Item
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.checkpoint.restore import model_items
from deepseek_v4.checkpoint.safetensors import SafetensorsFile, write_safetensors
from deepseek_v4.config import Config
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import ParameterSpec, Path, flatten, map_members, nest
from deepseek_v4.sharding import Placement
from deepseek_v4.training.partition import parameter_names

Adapters = dict[str, Any]
"""What of ``Params`` is not in the base checkpoint, in its structure: adapters, and the balance biases of routers.

These biases are no weights, but they move while adapters are trained, and the experts chosen depend on them. Without
them in it, a tree of adapters leaves those of the base as they are.
"""

_LEAVES = ("lora_a", "lora_b")
_BIAS = ("ffn", "gate", "bias")
_TENSORS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def split_adapters(params: Params) -> tuple[Params, Adapters]:
    """(base, adapters): the parameters of the model without adapters, and these. Balance biases are in both."""

    def keep(wanted: Callable[[Path], bool]) -> Params:
        return map_members(lambda member: nest({p: a for p, a in flatten(member).items() if wanted(p)}), params)

    return keep(lambda path: path[-1] not in _LEAVES), keep(lambda path: path[-1] in _LEAVES or path == _BIAS)


def attach(base: Params, adapters: Adapters) -> Params:
    """The inverse of ``split_adapters``: what is in both is taken from ``adapters``."""
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

    A leaf depends on ``seed`` and its name alone, not on the mesh. Balance biases are not among them.
    """

    def adapters_of(tree: Params) -> Params:
        return map_members(lambda m: nest({p: a for p, a in flatten(m).items() if p[-1] in _LEAVES}), tree)

    specs, names = adapters_of(model.parameter_specs()), adapters_of(parameter_names(model.parameter_specs()))
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


Fingerprint = dict[str, str]
"""Digests of the weights that adapters were trained beside: by item (shell, layers, draft blocks), and "model" of
config and storage. The same on every mesh and from every directory format."""


def fingerprint(model: Model, params: Params) -> Fingerprint:
    """The fingerprint of the base of ``params``, which may hold adapters; balance biases do not count."""
    base = base_model(model)
    found = {"model": model_digest(base.config, base.storage)}
    shell, groups, drafts = model_items(base)
    items = {"shell": [shell], "groups": groups, "drafts": [[block] for block in drafts]}
    layers = [item for group in groups for member in group for item in member]

    def add(items: Sequence[Item], described: Mapping[str, Any], member: Mapping[str, Any]) -> None:
        sums = _checksums if items[0] in layers else lambda array: checksum(array)[None]
        values = flatten(member)
        leaves = {path: np.asarray(sums(values[path])) for path in flatten(described) if path != _BIAS}
        for row, item in enumerate(items):
            found[item.name] = item_digest({path: int(rows[row]) for path, rows in leaves.items()})

    map_members(add, items, base.parameter_specs(), params)
    return found


def model_digest(config: Config, storage: Storage) -> str:
    """The entry "model" of a fingerprint."""
    return hashlib.sha256(json.dumps([config.to_dict(), dataclasses.asdict(storage)]).encode()).hexdigest()[:32]


def item_digest(sums: Mapping[Path, int]) -> str:
    """The entry of an item in a fingerprint, from the checksums of its leaves."""
    lines = [f"{'.'.join(path)} {value}\n" for path, value in sorted(sums.items()) if path != _BIAS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def check_fingerprint(where: object, expected: Fingerprint, found: Fingerprint) -> None:
    """Raises ``CheckpointError`` about adapters from ``where`` if entries of ``found`` are not those expected."""
    different = [name for name, value in found.items() if expected.get(name) != value]
    if different:
        raise CheckpointError(
            f"{where}: these adapters were trained beside other weights; merge them into the checkpoint they were "
            "trained on, or load them beside it",
            [f"{name}: not the one of that checkpoint" for name in different],
        )


def _bit_sum(array: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    # Elements weigh differently by place, so that exchanged ones show; integer sums do not depend on their order.
    place = jnp.uint32(1)
    for dim in range(array.ndim):
        place += lax.broadcasted_iota(jnp.uint32, array.shape, dim) * jnp.uint32(0x9E3779B1 + 2 * dim)
    place ^= place >> 15
    return jnp.sum((bits + 1) * (2 * place + 1), dtype=jnp.uint32)


checksum = jax.jit(_bit_sum)
"""A uint32 that depends on every bit of an array and its place, and not on its layout."""

_checksums = jax.jit(jax.vmap(_bit_sum))


def save_adapters(directory: str | FilePath, model: Model, params: Params) -> None:
    """Writes the adapters of ``params`` alone: ``adapter_model.safetensors`` and ``adapter_config.json``.

    A tensor is named like the released weight it stands beside: "layers.3.attn.wq_b.lora_a"; those of a layer's routed
    experts are stacked, "layers.3.ffn.experts.w1.lora_b" [E, out, rank]. Routers' balance biases are there too. The
    config holds rank, alpha, patterns and the ``fingerprint`` of the weights. Every process calls this; the first one
    writes.
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


def read_adapter_config(directory: str | FilePath) -> tuple[LoRA, Fingerprint]:
    """What adapters in a directory are, and the fingerprint of their base; raises ``CheckpointError``."""
    path = FilePath(directory) / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return LoRA(config["rank"], config["alpha"], tuple(config["patterns"])), dict(config["base_fingerprint"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the description of adapters that save_adapters writes: {error}") from error


def load_adapters(directory: str | FilePath, model: Model, base: Params | None = None) -> Adapters:
    """Adapters that ``save_adapters`` wrote, balance biases included, laid out for ``model``.

    Raises ``CheckpointError`` if ``model.adapters`` are others than those saved, if tensors are missing, unknown or of
    another shape, and, with ``base``, if they were trained beside other weights.
    """
    directory, lora = FilePath(directory), lora_of(model)
    saved, trained_beside = read_adapter_config(directory)
    if saved != lora:
        raise CheckpointError(f"{directory}: expected adapters {lora}, found {saved}")
    if base is not None:
        check_fingerprint(directory, trained_beside, fingerprint(model, base))
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


def adapters_digest(directory: str | FilePath) -> str:
    """What tells the adapters in a directory from others."""
    digest = hashlib.sha256()
    for name in (_TENSORS, _CONFIG):
        digest.update((FilePath(directory) / name).read_bytes())
    return digest.hexdigest()


def lora_of(model: Model) -> LoRA:
    """The adapters of a model; raises ``ValueError`` if it has none."""
    if model.adapters is None:
        raise ValueError("this model has no adapters (Model.adapters is None)")
    return model.adapters
