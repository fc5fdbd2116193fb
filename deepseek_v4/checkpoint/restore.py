"""Restoring parameters onto devices, straight from either format, and saving them again."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from deepseek_v4.checkpoint.convert import Share, to_orbax
from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.huggingface import open_huggingface
from deepseek_v4.checkpoint.layout import Item, items
from deepseek_v4.checkpoint.orbax_directory import OrbaxSource, read_manifest
from deepseek_v4.checkpoint.safetensors import Index
from deepseek_v4.checkpoint.source import Leaf, Source
from deepseek_v4.config import Config
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import ParameterSpec, Path, flatten, nest

_READERS = 4


def is_orbax_directory(directory: FilePath) -> bool:
    """Whether a directory is (or is becoming) an Orbax one."""
    return (directory / "items").is_dir() or (directory / "manifest.json").exists()


def open_source(directory: str | FilePath) -> Source:
    """A complete checkpoint of either format; raises ``CheckpointError`` or ``ConfigError`` saying what is wrong."""
    directory = FilePath(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not is_orbax_directory(directory):
        return open_huggingface(directory)
    read_manifest(directory)
    source = OrbaxSource(directory)
    source.require_complete()
    return source


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in a Hugging Face or an Orbax directory.

    ``config`` and ``storage`` make the model that its parameters fit; ``tokenizer_path`` is its ``tokenizer.json``, or
    None if it has none.
    """

    directory: FilePath
    source: Source

    @property
    def config(self) -> Config:
        """The config of the model that the tensors make up."""
        return self.source.config

    @property
    def storage(self) -> Storage:
        """The formats the tensors are stored in."""
        return self.source.storage

    @property
    def tokenizer_path(self) -> FilePath | None:
        """``tokenizer.json``, if there is one."""
        path = self.directory / "tokenizer.json"
        return path if path.exists() else None

    def load(self, model: Model, on_bytes: Callable[[int], None] = lambda count: None) -> Params:
        """The model's parameters on its placement (or on the default device), stacked per scan group.

        Reads layer by layer, of each leaf only what this process's devices hold, and writes it in place into the
        stacked arrays: nowhere is there a second copy of more than one layer's share. Any mesh will do, whichever one
        the checkpoint was made with. Raises ``CheckpointError`` if the checkpoint's arrays are not the model's.
        """
        return _load(self.source, model, on_bytes)


def open_checkpoint(directory: str | FilePath) -> Checkpoint:
    """Opens a Hugging Face directory or an Orbax one; reads headers alone. Raises as ``open_source``."""
    return Checkpoint(FilePath(directory), open_source(directory))


def load_params(directory: str | FilePath, model: Model) -> Params:
    """``open_checkpoint(directory).load(model)``."""
    return open_checkpoint(directory).load(model)


def model_items(model: Model) -> tuple[Item, list[list[list[Item]]], list[Item]]:
    """The items of a model in the structure of its params: shell, [group][member][repeat], drafts."""
    by_name = {item.name: item for item in items(model.config)}
    groups = [
        [
            [by_name[f"layers.{group.layer_index(repeat, member):05d}"] for repeat in range(group.repeats)]
            for member in range(len(group.pattern))
        ]
        for group in model.groups
    ]
    drafts = [by_name[f"drafts.{index}"] for index in range(len(model.drafts))]
    return by_name["shell"], groups, drafts


def _load(source: Source, model: Model, on_bytes: Callable[[int], None]) -> Params:
    specs = model.parameter_specs()
    shell, groups, drafts = model_items(model)
    available = {item.name for item in items(source.config)}
    wanted = [shell, *itertools.chain.from_iterable(itertools.chain.from_iterable(groups)), *drafts]
    problems = [
        f"{item.name}: the model has it, the checkpoint does not" for item in wanted if item.name not in available
    ]
    if not problems and len(available) > len(wanted):
        unused = sorted(available - {item.name for item in wanted})
        # A draft block may stay behind; a layer may not.
        problems = [
            f"{name}: the checkpoint has it, the model does not" for name in unused if name.startswith("layers")
        ]
    if problems:
        raise CheckpointError("the checkpoint is of another model", problems)

    with ThreadPoolExecutor(_READERS) as pool:
        reader = _Reader(model, pool, on_bytes)
        return {
            "shell": reader.item(source, shell, specs["shell"]),
            "groups": tuple(
                tuple(reader.stack(source, repeats, specs["groups"][g][m]) for m, repeats in enumerate(members))
                for g, members in enumerate(groups)
            ),
            "drafts": tuple(reader.item(source, item, specs["drafts"][i]) for i, item in enumerate(drafts)),
        }


class _Reader:
    """Puts leaves where the model wants them."""

    def __init__(self, model: Model, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]):
        self._placement = model.execution.placement
        self._pool = pool
        self._on_bytes = on_bytes
        (default,) = jnp.zeros(()).devices()
        self._single = SingleDeviceSharding(default)

    def _sharding(self, spec: ParameterSpec) -> Sharding:
        return self._single if self._placement is None else self._placement.parameter_sharding(spec)

    def item(self, source: Source, item: Item, specs: Mapping[str, Any]) -> dict[str, Any]:
        """An item that is not stacked."""
        flat: dict[Path, ParameterSpec] = flatten(specs)
        leaves = _checked_leaves(source, item, flat)
        return nest({path: self._place(leaves[path], self._sharding(spec)) for path, spec in flat.items()})

    def stack(self, source: Source, repeats: Sequence[Item], specs: Mapping[str, Any]) -> dict[str, Any]:
        """The same layer of every repetition of a scan group, stacked on a new first dim."""
        flat: dict[Path, ParameterSpec] = flatten(specs)
        layer_specs = {
            path: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]) for path, spec in flat.items()
        }
        if len(repeats) == 1:
            leaves = _checked_leaves(source, repeats[0], layer_specs)
            return nest({path: self._place(_Lifted(leaves[path]), self._sharding(spec)) for path, spec in flat.items()})
        shardings = {path: self._sharding(spec) for path, spec in flat.items()}
        layout = _Layout(tuple((path, spec.shape, spec.dtype, shardings[path]) for path, spec in flat.items()))
        stacked = _zeros(layout)
        for row, item in enumerate(repeats):
            leaves = _checked_leaves(source, item, layer_specs)
            layer = {path: self._place(leaves[path], self._sharding(spec)) for path, spec in layer_specs.items()}
            stacked = _insert(stacked, layer, row, layout)
            # Reading further ahead would hold more than one layer beside the stack.
            jax.block_until_ready(stacked)
        return nest(stacked)

    def _place(self, leaf: Leaf, sharding: Sharding) -> jax.Array:
        """A leaf as an array of this layout; every distinct part is read once, however many devices hold it."""
        wanted = {
            device: tuple(slice(*s.indices(size)[:2]) for s, size in zip(index or (), leaf.shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        }
        keys = {device: tuple((s.start, s.stop) for s in index) for device, index in wanted.items()}
        distinct = {keys[device]: index for device, index in wanted.items()}
        parts = dict(zip(distinct, self._pool.map(leaf.read, distinct.values()), strict=True))
        self._on_bytes(sum(part.nbytes for part in parts.values()))
        shards = [jax.device_put(parts[key], device) for device, key in keys.items()]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


class _Layout(NamedTuple):
    """Shape, dtype and layout of several arrays by path, as one hashable value."""

    arrays: tuple[tuple[Path, tuple[int, ...], jnp.dtype, Sharding], ...]


@functools.partial(jax.jit, static_argnums=0)
def _zeros(layout: _Layout) -> dict[Path, jax.Array]:
    return {
        path: lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
        for path, shape, dtype, sharding in layout.arrays
    }


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(
    stacked: dict[Path, jax.Array], layer: dict[Path, jax.Array], row: int, layout: _Layout
) -> dict[Path, jax.Array]:
    """``layer`` as row ``row`` of ``stacked``, whose memory becomes the result's."""
    return {
        path: lax.with_sharding_constraint(
            lax.dynamic_update_index_in_dim(stacked[path], layer[path], row, 0), sharding
        )
        for path, _, _, sharding in layout.arrays
    }


class _Lifted:
    """A leaf with a first dim of one."""

    def __init__(self, leaf: Leaf):
        self._leaf = leaf
        self.shape = (1, *leaf.shape)
        self.dtype = leaf.dtype

    def read(self, index: Index) -> np.ndarray:
        return self._leaf.read(index[1:])[None]


def _checked_leaves(source: Source, item: Item, specs: Mapping[Path, ParameterSpec]) -> Mapping[Path, Leaf]:
    leaves = source.leaves(item)
    expected = {path: (np.dtype(spec.dtype).name, spec.shape) for path, spec in specs.items()}
    found = {path: (leaf.dtype.name, tuple(leaf.shape)) for path, leaf in leaves.items()}
    different = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    if different:
        raise CheckpointError(
            f"{item.name}: the checkpoint's arrays are not those of the model",
            [
                f"{'.'.join(path)}: the model has {expected.get(path)}, the checkpoint {found.get(path)}"
                for path in different
            ],
        )
    return leaves


class ParamsSource:
    """Parameters on devices as a source, for ``to_orbax`` and ``to_hf``.

    ``params`` are those of ``model`` and all on this process's devices. ``config_json`` defaults to the model's config;
    ``files`` are small files (tokenizer) that travel along, by name.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config_json: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        self.config = model.config
        self.storage = model.storage
        self.draft_copies: tuple[str, ...] = ()
        self._config_json = dict(model.config.to_dict() if config_json is None else config_json)
        self._files = dict(files or {})
        if Config.from_dict(self._config_json) != model.config:
            raise CheckpointError("config_json does not describe the model's config")
        remote = [path for path, x in flatten_params(params) if not x.is_fully_addressable]
        if remote:
            raise CheckpointError("parameters on other processes' devices cannot be saved from here", remote)
        shell, groups, drafts = model_items(model)
        self._found: dict[str, tuple[Any, int | None]] = {shell.name: (params["shell"], None)}
        for g, members in enumerate(groups):
            for m, repeats in enumerate(members):
                self._found |= {item.name: (params["groups"][g][m], row) for row, item in enumerate(repeats)}
        self._found |= {item.name: (params["drafts"][i], None) for i, item in enumerate(drafts)}

    def leaves(self, item: Item) -> Mapping[Path, Leaf]:
        """The leaves of one item by path."""
        tree, row = self._found[item.name]
        return {path: _ArrayLeaf(array, row) for path, array in flatten(tree).items()}

    def fingerprint(self, item: Item) -> None:
        """Nothing: arrays in memory cannot be told from others later."""

    def config_json(self) -> dict[str, Any]:
        """``config.json`` of the model."""
        return dict(self._config_json)

    def travelling_files(self) -> Mapping[str, bytes]:
        """The given files."""
        return dict(self._files)


def flatten_params(params: Params) -> list[tuple[str, jax.Array]]:
    """(path, array) of every parameter."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


class _ArrayLeaf:
    """One layer's row of a stacked parameter; fetched to the host when it is first read."""

    def __init__(self, array: jax.Array, row: int | None):
        self._array = array
        self._row = row
        self.shape = tuple(array.shape if row is None else array.shape[1:])
        self.dtype = np.dtype(array.dtype)
        self._host: np.ndarray | None = None

    def read(self, index: Index) -> np.ndarray:
        if self._host is None:
            array = self._array if self._row is None else _row_of(self._array, self._row)
            self._host = np.asarray(array)
        part = self._host[index]
        if all(s.stop == size for s, size in zip(index, self.shape, strict=True)):
            # The last part in every order that is used here.
            self._host = None
        return part


@jax.jit
def _row_of(array: jax.Array, row: int) -> jax.Array:
    return lax.dynamic_index_in_dim(array, row, 0, keepdims=False)


def save_params(
    directory: str | FilePath,
    model: Model,
    params: Params,
    *,
    config_json: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model's parameters as an Orbax directory that ``load_params`` reads; see ``ParamsSource``."""
    to_orbax(ParamsSource(model, params, config_json, files), directory, share=Share())


__all__ = [
    "Checkpoint",
    "ParamsSource",
    "load_params",
    "open_checkpoint",
    "open_source",
    "save_params",
]
