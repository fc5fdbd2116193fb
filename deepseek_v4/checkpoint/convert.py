"""Conversion of any source into an Orbax directory: streamed, resumable, shared between processes."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.huggingface import HuggingFaceSource
from deepseek_v4.checkpoint.layout import Item, item_specs, items
from deepseek_v4.checkpoint.orbax_directory import MANIFEST_FILE, manifest_for, read_manifest, write_atomically
from deepseek_v4.checkpoint.orbax_items import read_record, write_item
from deepseek_v4.checkpoint.source import Source, bad_values
from deepseek_v4.config import Config
from deepseek_v4.nn.variables import Storage

_LOCKS = ".locks"
_DIFFERING_COPY = "not equal to the main model's tensor, which the draft block uses; not restored by to-hf"


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of a job this process does: every ``count``-th unit, from ``index`` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"process index {self.index} is not in 0..{self.count - 1}")

    @classmethod
    def of_this_process(cls) -> "Share":
        """This process's share among those of ``jax.distributed``; everything if that is not initialised."""
        import jax

        if not jax.distributed.is_initialized():
            return cls()
        return cls(jax.process_index(), jax.process_count())

    def has(self, number: int) -> bool:
        """Whether unit ``number`` is this process's."""
        return number % self.count == self.index


@dataclasses.dataclass(frozen=True)
class PlannedItem:
    """One item of a conversion: its size, whether it is already there, whether this process does it."""

    item: Item
    size_bytes: int
    finished: bool
    mine: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do, from headers alone."""

    directory: FilePath
    items: tuple[PlannedItem, ...]
    files: tuple[str, ...]
    free_bytes: int

    @property
    def pending(self) -> tuple[PlannedItem, ...]:
        """What this process has to do."""
        return tuple(planned for planned in self.items if planned.mine and not planned.finished)

    @property
    def pending_bytes(self) -> int:
        """Bytes this process has to write."""
        return sum(planned.size_bytes for planned in self.pending)


def item_bytes(item: Item, config: Config, storage: Storage) -> int:
    """Bytes of an item's arrays."""
    return sum(spec.size_bytes for spec in item_specs(item, config, storage).values())


def _record(source: Source, item: Item) -> dict[str, Any]:
    return {"storage": dataclasses.asdict(source.storage), "fingerprint": source.fingerprint(item)}


def _finished(source: Source, item: Item, directory: FilePath) -> bool:
    record = read_record(directory / "items" / item.name)
    # Nothing says whether parameters in memory, which have no fingerprint, are still the same.
    return record is not None and record["fingerprint"] is not None and record == _record(source, item)


def plan_conversion(source: Source, directory: str | FilePath, share: Share | None = None) -> Plan:
    """What ``to_orbax`` with the same arguments would do; reads headers and writes nothing."""
    directory, share = FilePath(directory), share or Share.of_this_process()
    _check_target(source, directory)
    planned = tuple(
        PlannedItem(
            item,
            item_bytes(item, source.config, source.storage),
            _finished(source, item, directory),
            share.has(number),
        )
        for number, item in enumerate(items(source.config))
    )
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    files = tuple(sorted({*source.travelling_files(), "config.json"}))
    return Plan(directory, planned, files, shutil.disk_usage(existing).free)


def _check_target(source: Source, directory: FilePath) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: exists and is not a directory")
    if isinstance(source, HuggingFaceSource) and directory.exists() and directory.samefile(source.directory):
        raise CheckpointError(f"{directory}: source and target are the same directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "items").is_dir():
        raise CheckpointError(f"{directory}: not empty and not an Orbax target; choose another directory")


def to_orbax(
    source: Source,
    directory: str | FilePath,
    *,
    share: Share | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_item: Callable[[str], None] = lambda name: None,
    checked: Source | None = None,
) -> bool:
    """Writes ``source`` to ``directory`` as an Orbax directory with the source's bytes and dtypes, experts stacked.

    Reads every source byte once (scales and token tables twice: they are checked before anything is written), holds a
    few chunks in memory, and leaves out the items that an earlier run finished from the same files. Several processes
    can work on one target, each with its ``share`` (default: as ``jax.distributed`` says). Returns whether the whole
    target is finished, which the last process sees; until then it has no manifest and cannot be opened. ``checked`` is
    what to check instead of a source whose values are costly. Raises ``CheckpointError`` listing everything that is
    wrong with the source, or if the target holds something else.
    """
    directory, share = FilePath(directory), share or Share.of_this_process()
    plan = plan_conversion(source, directory, share)
    pending = [planned.item for planned in plan.pending]
    config, storage = source.config, source.storage

    problems = [problem for item in pending for problem in bad_values(checked or source, item)]
    if problems:
        raise CheckpointError("the source has values that no checkpoint can have", problems)
    copies, dropped = source.draft_copies, {}
    if isinstance(source, HuggingFaceSource):
        source.require_complete()
        differing = source.differing_copies()
        copies = tuple(name for name in copies if name not in differing)
        dropped = {**source.dropped, **dict.fromkeys(differing, _DIFFERING_COPY)}
    files = {"config.json": _config_bytes(source), **source.travelling_files()}
    manifest = manifest_for(config, storage, copies, dropped, list(files))
    if (directory / MANIFEST_FILE).exists():
        if read_manifest(directory) != manifest or any(not planned.finished for planned in plan.items):
            raise CheckpointError(
                f"{directory}: already holds a finished conversion of another source; "
                "remove it or choose another target"
            )
        return True

    for folder in ("items", _LOCKS):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(directory / name, data)
    for item in pending:
        on_item(item.name)
        with _locked(directory, item):
            target = directory / "items" / item.name
            for leftover in (target, *target.parent.glob(f"{item.name}.orbax-checkpoint-tmp*")):
                shutil.rmtree(leftover, ignore_errors=True)
            write_item(target, source.leaves(item), _record(source, item), on_bytes)
    records = (read_record(directory / "items" / item.name) == _record(source, item) for item in items(config))
    finished = all(records)
    if finished:
        # Every process that gets here writes the same bytes.
        write_atomically(directory / MANIFEST_FILE, _json_bytes(manifest))
        shutil.rmtree(directory / _LOCKS, ignore_errors=True)
    return finished


@contextlib.contextmanager
def _locked(directory: FilePath, item: Item) -> Iterator[None]:
    """Holds the item's lock, which ends with the process however it ends."""
    path = directory / _LOCKS / item.name
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{directory}: another process is writing {item.name}; give every process its own process index"
            ) from None
        yield


def _config_bytes(source: Source) -> bytes:
    return _json_bytes(source.config_json())


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
