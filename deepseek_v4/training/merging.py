"""Adapters merged into the weights they stand beside, with one requantisation, and what that changed.

A model in memory is merged by ``merge``; a checkpoint of any size is merged layer by layer while it is written:

    source = open_merged(open_source(base), directory)
    to_hf(source, output)
    print(*source.report, sep="\\n")
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_v4.checkpoint import CheckpointError, ParamsSource
from deepseek_v4.checkpoint.layout import Item, item_specs
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.checkpoint.safetensors import Index
from deepseek_v4.checkpoint.source import Leaf, Source, whole
from deepseek_v4.formats import dequantize, quantize
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import Path, flatten, map_members, nest
from deepseek_v4.training.lora import (
    Adapters,
    Fingerprint,
    adapters_digest,
    base_model,
    check_fingerprint,
    checksum,
    item_digest,
    load_adapters,
    lora_of,
    model_digest,
    read_adapter_config,
)
from deepseek_v4.training.partition import parameter_names


@dataclasses.dataclass(frozen=True)
class Merged:
    """What merging did to one linear of one layer (all of its experts together).

    ``changed`` is the fraction of weights whose stored value is another now; ``error`` ||W' - (W + D)|| / ||D||, for
    weights W, adapter product D and merged weights W'; ``lost`` 1 - <W' - W, D> / ||D||^2, the share of D that rounding
    swallowed. Of adapters that were never trained (D = 0) all are 0, and the weight keeps its bytes.
    """

    name: str
    changed: float
    error: float
    lost: float

    def __str__(self) -> str:
        return f"{self.name}: {self.changed:.1%} of weights changed, error {self.error:.3f}, lost {self.lost:.1%}"


def merge(model: Model, params: Params) -> tuple[Model, Params, list[Merged]]:
    """The model without adapters whose weights contain them, in the same storage, and what that changed.

    Every weight is decoded, added to its adapter's product in float32 and quantised once. One matrix at a time is
    decoded (of experts split over a mesh, as many as a device holds); ``params`` stays as it is.
    """
    lora, merged_model = lora_of(model), base_model(model)
    names = parameter_names(merged_model.parameter_specs())
    placement = model.execution.placement
    report: list[Merged] = []

    def member(described: Mapping[str, Any], named: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        specs, flat, leaf_names = flatten(described), flatten(values), flatten(named)
        found: dict[Path, jax.Array] = {path: flat[path] for path in specs}
        for beside in _adapted(flat):
            weight, scale = specs[*beside, "weight"], specs.get((*beside, "scale"))
            split: tuple[bool, ...] = (False,) * (len(weight.shape) - 2)
            shardings = None
            if placement is not None:
                split = tuple(entry is not None for entry in placement.parameter_sharding(weight).spec[:-2])
                stored = tuple(None if s is None else placement.parameter_sharding(s) for s in (weight, scale))
                shardings = (stored, placement.replicated())
            function = _merger(model.storage, weight.role, lora.scale, split, shardings)
            (found[*beside, "weight"], new_scale), sums = function(*_arrays(flat, beside))
            if scale is not None:
                found[*beside, "scale"] = new_scale
            report.extend(_report([name.removesuffix(".weight") for name in leaf_names[*beside, "weight"]], sums))
        return nest(found)

    merged = map_members(member, merged_model.parameter_specs(), names, params)
    return merged_model, merged, report


class MergedSource:
    """A checkpoint with adapters merged into it: a ``checkpoint.Source`` that merges a layer when it is asked for it.

    ``model`` is that of the adapters, on one device; its config and storage must be the checkpoint's. ``base`` is the
    fingerprint of what the adapters were trained beside: with it, every item is compared before it is used.
    ``identity`` says which adapters these are, so that an interrupted conversion can go on. ``report`` grows as layers
    are read. At most one layer is in memory. Raises ``CheckpointError``.
    """

    def __init__(
        self,
        source: Source,
        model: Model,
        adapters: Adapters,
        base: Fingerprint | None = None,
        identity: str | None = None,
    ):
        if base is not None:
            check_fingerprint("adapters", base, {"model": model_digest(source.config, source.storage)})
        if (source.config, source.storage) != (model.config, model.storage):
            raise CheckpointError("the checkpoint is of another model or storage than the adapters")
        self.config, self.storage, self.draft_copies = source.config, source.storage, source.draft_copies
        self.report: list[Merged] = []
        self._source, self._lora = source, lora_of(model)
        self._adapters = ParamsSource(base_model(model), adapters)
        self._base, self._identity = base, identity
        self._checked: set[str] = set()

    def check(self, item: Item) -> None:
        """Raises ``CheckpointError`` if the checkpoint's item is another than the one adapters were trained beside."""
        if self._base is None or item.name in self._checked:
            return
        leaves = self._source.leaves(item)
        sums = {path: int(checksum(leaf.read(whole(leaf)))) for path, leaf in leaves.items()}
        check_fingerprint("adapters", self._base, {item.name: item_digest(sums)})
        self._checked.add(item.name)

    def leaves(self, item: Item) -> Mapping[Path, Leaf]:
        """The leaves of one item by path, merged."""
        self.check(item)
        added = dict(self._adapters.leaves(item))
        both = dict(self._source.leaves(item)) | added
        specs = item_specs(item, self.config, self.storage)
        leaves = {path: both[path] for path in specs}
        known = {row.name for row in self.report}
        for beside in _adapted(both):
            spec = specs[*beside, "weight"]
            split = (False,) * (len(spec.shape) - 2)
            function = _merger(self.storage, spec.role, self._lora.scale, split, None)
            read = {path: leaf.read(whole(leaf)) for path, leaf in both.items() if path[:-1] == beside}
            (weight, scale), sums = function(*_arrays(read, beside))
            leaves[*beside, "weight"] = _HostLeaf(weight)
            if scale is not None:
                leaves[*beside, "scale"] = _HostLeaf(scale)
            rows = _report([item.prefix + ".".join(beside)], sums)
            self.report.extend(row for row in rows if row.name not in known)
        return leaves

    def fingerprint(self, item: Item) -> Any:
        """That of the checkpoint's item, with the identity of the adapters; None without one."""
        base = self._source.fingerprint(item)
        return None if base is None or self._identity is None else {"base": base, "adapters": self._identity}

    def config_json(self) -> dict[str, Any]:
        """``config.json`` of the checkpoint."""
        return self._source.config_json()

    def travelling_files(self) -> Mapping[str, bytes]:
        """The tokenizer and other small files of the checkpoint."""
        return self._source.travelling_files()


def open_merged(source: Source, directory: str | FilePath) -> MergedSource:
    """A checkpoint with the adapters that ``lora.save_adapters`` wrote to ``directory`` merged into it.

    Compares every item with what the adapters were trained beside. Raises ``CheckpointError``.
    """
    lora, base = read_adapter_config(directory)
    check_fingerprint(directory, base, {"model": model_digest(source.config, source.storage)})
    try:
        model = Model(source.config, source.storage, adapters=lora)
    except ValueError as error:
        raise CheckpointError(f"{directory}: not adapters of this checkpoint's model: {error}") from error
    return MergedSource(source, model, load_adapters(directory, model), base, adapters_digest(directory))


def add_to_report(directory: str | FilePath, report: Sequence[Merged]) -> list[Merged]:
    """Adds to ``merge_report.json`` in a directory, and returns all of it: {name: {changed, error, lost}}."""
    path = FilePath(directory) / "merge_report.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows |= {row.name: {"changed": row.changed, "error": row.error, "lost": row.lost} for row in report}
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
    return [Merged(name, **values) for name, values in rows.items()]


class _HostLeaf:
    def __init__(self, array: jax.Array):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def read(self, index: Index) -> np.ndarray:
        return self._array[index]


def _adapted(leaves: Mapping[Path, Any]) -> list[Path]:
    """Paths of the linears that have an adapter."""
    return sorted(path[:-1] for path in leaves if path[-1] == "lora_a")


def _arrays(leaves: Mapping[Path, Any], beside: Path) -> list[Any]:
    return [leaves.get((*beside, leaf)) for leaf in ("weight", "scale", "lora_a", "lora_b")]


def _report(names: Sequence[str], sums: jax.Array) -> list[Merged]:
    """One entry per layer, from the sums of its matrices."""
    totals = np.asarray(sums, np.float64).reshape(len(names), -1, 5).sum(axis=1)
    return [
        Merged(name, changed / count, (error / delta) ** 0.5, 1 - kept / delta) if delta else Merged(name, 0, 0, 0)
        for name, (count, changed, error, delta, kept) in zip(names, totals.tolist(), strict=True)
    ]


@functools.lru_cache(maxsize=64)
def _merger(storage: Storage, role: str, factor: float, split: tuple[bool, ...], shardings: Any) -> Callable:
    """(weight, scale, a, b) with leading dims to ((weight, scale), sums [..., 5]) as ``_report`` takes them.

    ``split`` says of each leading dim whether it is spread over devices: all at once, else one after the other.
    """

    stored = storage.format_of(role)
    assert stored is not None, role

    def one(weight, scale, a, b):
        base = dequantize(weight, scale)
        delta = factor * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
        new_weight, new_scale = quantize(base + delta, stored, storage.scales)
        value = dequantize(new_weight, new_scale)
        # A float32 scale that is computed again may come back one rounding off.
        changed = (jnp.abs(value - base) > 2.0**-20 * jnp.abs(base)) & jnp.any(delta != 0)
        same = ~jnp.any(changed)
        new_weight = jnp.where(same, weight, new_weight)
        new_scale = None if scale is None else jnp.where(same, scale, new_scale)
        sums = (
            jnp.float32(base.size),
            jnp.sum(changed, dtype=jnp.float32),
            jnp.sum(jnp.square(value - (base + delta))),
            jnp.sum(jnp.square(delta)),
            jnp.sum((value - base) * delta),
        )
        return (new_weight, new_scale), jnp.stack(sums)

    function = one
    for at_once in reversed(split):
        function = jax.vmap(function) if at_once else _one_by_one(function)
    return jax.jit(function, out_shardings=shardings)


def _one_by_one(function: Callable) -> Callable:
    return lambda *arrays: lax.map(lambda row: function(*row), arrays)
