"""The Orbax directory: one Orbax checkpoint per item, and the manifest that makes the whole one valid.

DST/config.json, tokenizer files     as in the source
DST/items/shell, items/layers.00000, ..., items/drafts.0
DST/manifest.json                    written last: formats, items, the tensors of each
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.layout import Item, item_specs, items
from deepseek_v4.checkpoint.orbax_items import StoredLeaf, open_item, read_record
from deepseek_v4.config import Config
from deepseek_v4.nn.variables import Storage
from deepseek_v4.parameters import Path

MANIFEST_FILE = "manifest.json"
FORMAT = "deepseek-v4-orbax"
VERSION = 1


def write_atomically(path: FilePath, data: bytes) -> None:
    """Writes a small file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(directory: FilePath) -> dict[str, Any]:
    """The manifest of a finished conversion; raises ``CheckpointError`` for an unfinished or foreign directory."""
    path = directory / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (directory / "items").is_dir():
            raise CheckpointError(
                f"{directory}: an unfinished conversion (no {MANIFEST_FILE}); "
                "run the same to-orbax command to finish it"
            ) from None
        raise CheckpointError(f"{directory}: no {MANIFEST_FILE}; not a converted checkpoint") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a converted checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {manifest.get('version')!r}, this program reads {VERSION}")
    return manifest


def item_tensor_table(item: Item, config: Config, storage: Storage) -> dict[str, list]:
    """What the manifest says about the leaves of an item: dtype and shape by dotted path."""
    return {
        ".".join(path): [np.dtype(spec.dtype).name, list(spec.shape)]
        for path, spec in item_specs(item, config, storage).items()
    }


class OrbaxSource:
    """A finished Orbax directory. Raises ``CheckpointError`` for one that is unfinished, foreign or inconsistent."""

    def __init__(self, directory: str | FilePath):
        self.directory = FilePath(directory)
        self.manifest = read_manifest(self.directory)
        self.config = Config.from_file(self.directory)
        self.storage = Storage(**self.manifest["storage"])
        self.draft_copies: tuple[str, ...] = tuple(self.manifest["draft_copies"])
        self._leaves: dict[str, Mapping[Path, StoredLeaf]] = {}
        self.problems = []
        for item in items(self.config):
            expected = item_tensor_table(item, self.config, self.storage)
            found = self.manifest["items"].get(item.name)
            if found is None:
                self.problems.append(f"{item.name}: not in the manifest, but config.json asks for it")
            elif found != expected:
                different = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
                self.problems += [
                    f"{item.name}: {name}: config.json asks for {expected.get(name)}, "
                    f"the manifest says {found.get(name)}"
                    for name in different
                ]
            elif not (self.directory / "items" / item.name).is_dir():
                self.problems.append(f"{item.name}: directory missing")
        surplus = sorted(set(self.manifest["items"]) - {item.name for item in items(self.config)})
        self.problems += [f"{name}: in the manifest, but config.json has no such layer" for name in surplus]

    def require_complete(self) -> None:
        """Raises ``CheckpointError`` with every problem."""
        if self.problems:
            raise CheckpointError(f"{self.directory}: config.json and items do not fit together", self.problems)

    def leaves(self, item: Item) -> Mapping[Path, StoredLeaf]:
        """The leaves of one item by path; raises ``CheckpointError`` if they are not what the manifest says."""
        if item.name not in self._leaves:
            directory = self.directory / "items" / item.name
            leaves = open_item(directory)
            found = {".".join(path): [leaf.dtype.name, list(leaf.shape)] for path, leaf in sorted(leaves.items())}
            expected = self.manifest["items"][item.name]
            if found != expected:
                different = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
                raise CheckpointError(
                    f"{directory}: not what the manifest describes",
                    [f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in different],
                )
            # One item at a time is in use; a full model has too many handles to keep.
            self._leaves = {item.name: leaves}
        return self._leaves[item.name]

    def fingerprint(self, item: Item) -> Any:
        """The record of the item and the time it was written."""
        directory = self.directory / "items" / item.name
        return [read_record(directory), directory.stat().st_mtime_ns]

    def config_json(self) -> dict[str, Any]:
        """``config.json`` as stored."""
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))

    def travelling_files(self) -> Mapping[str, bytes]:
        """The small files that came with the checkpoint, ``config.json`` included."""
        return {name: (self.directory / name).read_bytes() for name in self.manifest["files"]}


def manifest_for(
    config: Config, storage: Storage, draft_copies: tuple[str, ...], dropped: Mapping[str, str], files: list[str]
) -> dict[str, Any]:
    """The manifest of a whole conversion; the same for every process that takes part."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "storage": dataclasses.asdict(storage),
        "draft_copies": list(draft_copies),
        "dropped": dict(sorted(dropped.items())),
        "files": sorted(files),
        "items": {item.name: item_tensor_table(item, config, storage) for item in items(config)},
    }
