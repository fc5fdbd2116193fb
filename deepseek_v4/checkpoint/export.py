"""The way back: any source as a Hugging Face directory with released names and shards."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

import numpy as np

from deepseek_v4.checkpoint.convert import Share
from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.huggingface import INDEX_FILE
from deepseek_v4.checkpoint.layout import Item, Shard, items, shards
from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.checkpoint.safetensors import Entry, Index, build_header, write_safetensors
from deepseek_v4.checkpoint.source import Leaf, Source, pieces, read_ahead, whole

_PROGRESS_FILE = ".to-hf.json"


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """The files of an export with their sizes, and which of them are already there."""

    shards: tuple[Shard, ...]
    sizes: tuple[int, ...]
    finished: tuple[bool, ...]

    def pending_bytes(self, share: Share) -> int:
        """Bytes that one process has to write."""
        triples = enumerate(zip(self.sizes, self.finished, strict=True))
        return sum(size for number, (size, done) in triples if share.has(number) and not done)


def plan_export(source: Source, directory: str | FilePath) -> ExportPlan:
    """What ``to_hf`` will write; reads and writes no tensor."""
    directory = FilePath(directory)
    planned = tuple(shards(source.config, source.storage, source.draft_copies))
    sizes = tuple(build_header({name: (t.dtype, t.shape) for name, t in shard.tensors.items()})[2] for shard in planned)
    resumed = _resumes(source, directory)
    finished = tuple(
        resumed and _size(directory / shard.filename) == size for shard, size in zip(planned, sizes, strict=True)
    )
    return ExportPlan(planned, sizes, finished)


def to_hf(
    source: Source,
    directory: str | FilePath,
    *,
    share: Share | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    on_item: Callable[[str], None] = lambda name: None,
) -> bool:
    """Writes ``source`` to ``directory`` under released names and in released shards, every tensor byte for byte.

    Shards that an earlier run finished are kept; ``model.safetensors.index.json`` and ``config.json`` come last and
    make the directory a checkpoint. Returns whether everything is there (see ``Share``). Raises ``CheckpointError``
    if the target holds something else.
    """
    directory, share = FilePath(directory), share or Share.of_this_process()
    if directory.exists() and (
        not directory.is_dir() or (any(directory.iterdir()) and not _resumes(source, directory))
    ):
        raise CheckpointError(f"{directory}: not empty and not an unfinished export of this source")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / _PROGRESS_FILE, _identity(source) or b"")
    plan = plan_export(source, directory)
    for number, (shard, done) in enumerate(zip(plan.shards, plan.finished, strict=True)):
        if share.has(number) and not done:
            on_item(shard.filename)
            _write_shard(source, shard, directory, on_bytes)
    sizes = [_size(directory / shard.filename) for shard in plan.shards]
    if sizes != list(plan.sizes):
        return False
    files = dict(source.travelling_files())
    config = files.pop("config.json", None) or (json.dumps(source.config_json(), indent=2) + "\n").encode()
    for name, data in files.items():
        write_atomically(directory / name, data)
    write_atomically(directory / INDEX_FILE, _index(plan))
    write_atomically(directory / "config.json", config)
    (directory / _PROGRESS_FILE).unlink(missing_ok=True)
    return True


def _write_shard(source: Source, shard: Shard, directory: FilePath, on_bytes: Callable[[int], None]) -> None:
    surround = None
    if any(name in source.draft_copies for name in shard.tensors):
        surround = source.leaves(Item("shell", "", None))
    layers = source.leaves(shard.item)

    def reads(entries: list[Entry]) -> Iterator[tuple[Leaf, Index]]:
        for entry in entries:
            tensor = shard.tensors[entry.name]
            leaf = (surround if surround and entry.name in source.draft_copies else layers)[tensor.path]
            if tensor.expert is not None:
                yield leaf, (slice(tensor.expert, tensor.expert + 1), *whole(leaf)[1:])
            else:
                yield from ((leaf, index) for index in pieces(tensor.path, leaf))

    def contents(entries: list[Entry]) -> Iterator[np.ndarray]:
        for array in read_ahead(reads(entries)):
            # The one dtype that differs in width between tree and file.
            if array.dtype == np.int32:
                array = array.astype(np.int64)
            yield array
            on_bytes(array.nbytes)

    for leftover in directory.glob(f".{shard.filename}.*.tmp"):
        leftover.unlink()
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in shard.tensors.items()}
    write_safetensors(directory / shard.filename, tensors, contents)


def _index(plan: ExportPlan) -> bytes:
    weight_map = {name: shard.filename for shard in plan.shards for name in shard.tensors}
    headers = (build_header({n: (t.dtype, t.shape) for n, t in shard.tensors.items()})[1] for shard in plan.shards)
    total = sum(entry.size_bytes for entries in headers for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _identity(source: Source) -> bytes | None:
    """What an unfinished export belongs to; None if a later run cannot know whether its source is the same."""
    state = {item.name: source.fingerprint(item) for item in items(source.config)}
    if None in state.values():
        return None
    return (json.dumps(state, indent=1) + "\n").encode()


def _resumes(source: Source, directory: FilePath) -> bool:
    path, identity = directory / _PROGRESS_FILE, _identity(source)
    return identity is not None and path.exists() and path.read_bytes() == identity


def _size(path: FilePath) -> int | None:
    return path.stat().st_size if path.exists() else None
