"""One item on disk as an Orbax checkpoint, written and read in parts.

Orbax saves arrays that are in memory. A Pro layer is larger than the memory a conversion may use, so the arrays here
are leaves that are read while they are written. Orbax keeps charge of the checkpoint (its metadata, and that it appears
whole or not at all) and any Orbax restores it; only the bytes of the arrays are written here, because they are copied
from file to file and every detour through buffers costs as much as the copy itself. The format is zarr3 with sharding:
files of at most 64 MiB, cut into uncompressed chunks (quantised weights do not compress) of one expert each, so that a
mesh with any number of expert shards reads no byte it does not keep.
"""

import dataclasses
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from deepseek_v4.checkpoint.errors import CheckpointError
from deepseek_v4.checkpoint.layout import is_expert
from deepseek_v4.checkpoint.safetensors import Index
from deepseek_v4.checkpoint.source import PIECE_BYTES, Leaf
from deepseek_v4.parameters import Path, flatten, nest

_CHUNK_BYTES = 4 << 20
_WRITERS = 2
_ABSENT = 2**64 - 1
# Where Orbax keeps what save(custom_metadata=...) was given.
_METADATA_FILE = "_CHECKPOINT_METADATA"


class _Streamed:
    """A leaf as a value to save."""

    def __init__(self, path: Path, leaf: Leaf):
        self.leaf = leaf
        self.stacks_experts = is_expert(path)
        self.shape = leaf.shape
        self.dtype = leaf.dtype
        self.ndim = len(leaf.shape)
        self.size = int(np.prod(leaf.shape, dtype=np.int64))
        self.nbytes = self.size * leaf.dtype.itemsize


class StoredLeaf:
    """A leaf of an item on disk.

    Whole rows of arrays in the layout that ``write_item`` produces are read straight from their files; everything else,
    and other layouts that Orbax may have written, through TensorStore.
    """

    def __init__(self, array: tensorstore.TensorStore, directory: FilePath):
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype.numpy_dtype
        self._directory = directory
        self._indices: dict[int, np.ndarray] = {}
        file: tuple[int, ...] = tuple(array.chunk_layout.write_chunk.shape)  # type: ignore[arg-type]
        chunk: tuple[int, ...] = tuple(array.chunk_layout.read_chunk.shape)  # type: ignore[arg-type]
        self._file_rows, self._chunk_rows = (file[0], chunk[0]) if self.shape else (0, 0)
        row_chunks = bool(self.shape) and file[1:] == chunk[1:] == self.shape[1:]
        codecs = array.codec.to_json().get("codecs", []) if array.codec is not None else []
        self._direct = row_chunks and self.shape[0] % chunk[0] == 0 and codecs == _sharding_codecs(chunk, self.dtype)

    def read(self, index: Index) -> np.ndarray:
        """See ``source.Leaf``."""
        shape = tuple(s.stop - s.start for s in index)
        if not self._direct or shape[1:] != self.shape[1:] or 0 in shape:
            return self.array[index].read().result()
        out = np.empty(shape, self.dtype)
        rows, row_bytes = out.reshape(shape[0], -1).view(np.uint8), out.nbytes // shape[0]
        row, stop = index[0].start, index[0].stop
        while row < stop:
            number = row // self._file_rows
            file_stop = min(stop, (number + 1) * self._file_rows)
            with self._file(number).open("rb", buffering=0) as file:
                while row < file_stop:
                    chunk, skipped = divmod(row - number * self._file_rows, self._chunk_rows)
                    count = min(self._chunk_rows - skipped, file_stop - row)
                    offset, size = (int(n) for n in self._index(number, file)[chunk])
                    if size != self._chunk_rows * row_bytes:
                        raise CheckpointError(f"{file.name}: chunk {chunk} is damaged; convert the checkpoint again")
                    part = rows[row - index[0].start :][:count]
                    _read_all(file, part, offset + skipped * row_bytes)
                    row += count
        return out

    def _file(self, number: int) -> FilePath:
        return self._directory.joinpath("c", str(number), *("0" for _ in self.shape[1:]))

    def _index(self, number: int, file: io.FileIO) -> np.ndarray:
        """Offset and size of every chunk of a file, [chunks, 2]."""
        if number not in self._indices:
            index = np.empty((self._file_rows // self._chunk_rows, 2), np.dtype("<u8"))
            checksum = np.empty(1, np.dtype("<u4"))
            end = os.fstat(file.fileno()).st_size
            if end < index.nbytes + 4:
                raise CheckpointError(f"{file.name}: truncated; convert the checkpoint again")
            _read_all(file, index, end - index.nbytes - 4)
            _read_all(file, checksum, end - 4)
            if crc32c(index.tobytes()) != checksum[0]:
                raise CheckpointError(f"{file.name}: its index is damaged; convert the checkpoint again")
            self._indices[number] = index
        return self._indices[number]


class _Handler(type_handlers.TypeHandler):
    """Saves streamed leaves and restores handles to them, in the format of Orbax's numpy arrays."""

    def __init__(self, on_bytes: Callable[[int], None] = lambda count: None):
        self._on_bytes = on_bytes

    def typestr(self) -> str:
        return "np.ndarray"

    def memory_size(self, values: Sequence[_Streamed]) -> Sequence[tuple[int, int]]:
        return [(value.nbytes, value.nbytes) for value in values]

    async def metadata(self, infos):
        raise NotImplementedError("items are opened with open_item")

    async def serialize(self, values, infos, args=None):
        with ThreadPoolExecutor(_WRITERS) as pool:
            writes = []
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                layout = _Layout.of(value)
                await _create_array(value, info, layout)
                writes += [
                    pool.submit(self._write_file, value, layout, number, FilePath(info.path))
                    for number in range(layout.files)
                ]
            try:
                # To the disk in order and from one thread: concurrent syncs of many files fight over the journal.
                for write in writes:
                    _sync(write.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [ocp.future.NoopFuture()]

    def _write_file(self, value: "_Streamed", layout: "_Layout", number: int, directory: FilePath) -> FilePath:
        """One zarr3 shard: its chunks in order, then their offsets and sizes with a checksum."""
        path = directory.joinpath("c", str(number), *("0" for _ in value.shape[1:]))
        path.parent.mkdir(parents=True, exist_ok=True)
        start = number * layout.file_rows
        stop = min(start + layout.file_rows, layout.rows)
        index = np.full((layout.file_rows // layout.chunk_rows, 2), _ABSENT, np.dtype("<u8"))
        with path.open("wb", buffering=0) as file:
            step = layout.chunk_rows if value.stacks_experts else layout.file_rows
            for first in range(start, stop, step):
                rows = slice(first, min(first + step, stop))
                _write_all(file, value.leaf.read((rows, *(slice(0, n) for n in value.shape[1:]))))
            chunks = (stop - start) // layout.chunk_rows
            index[:chunks, 0] = np.arange(chunks) * layout.chunk_bytes
            index[:chunks, 1] = layout.chunk_bytes
            _write_all(file, index)
            _write_all(file, np.array([crc32c(index.tobytes())], np.dtype("<u4")))
        self._on_bytes(chunks * layout.chunk_bytes)
        return path

    async def deserialize(self, infos, args=None):
        arrays = []
        for info in infos:
            await info.await_path_creation()
            spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            arrays.append(tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context))
        return [StoredLeaf(await array, FilePath(info.path)) for array, info in zip(arrays, infos, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the rows (first dim) of an array are cut into chunks, and the chunks into files; every chunk is whole."""

    rows: int
    chunk_rows: int
    file_rows: int
    chunk_bytes: int

    @classmethod
    def of(cls, value: _Streamed) -> "_Layout":
        rows = value.shape[0]
        row_bytes = value.nbytes // rows
        limit = 1 if value.stacks_experts else max(1, min(rows, _CHUNK_BYTES // row_bytes))
        chunk_rows = next(n for n in range(limit, 0, -1) if rows % n == 0)
        file_rows = chunk_rows * max(1, PIECE_BYTES // (chunk_rows * row_bytes))
        return cls(rows, chunk_rows, min(rows, file_rows), chunk_rows * row_bytes)

    @property
    def files(self) -> int:
        """How many files there are."""
        return -(-self.rows // self.file_rows)


async def _create_array(value: _Streamed, info: type_handlers.ParamInfo, layout: _Layout) -> None:
    """Writes the metadata that Orbax writes for an array, with a chunk grid of this layout."""
    spec = type_handlers.get_json_tspec_write(
        info, use_ocdbt=False, global_shape=value.shape, local_shape=value.shape, dtype=value.dtype
    )
    metadata = spec["metadata"]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = (layout.file_rows, *value.shape[1:])
    metadata["codecs"] = _sharding_codecs((layout.chunk_rows, *value.shape[1:]))
    await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)


def _sharding_codecs(chunk: Sequence[int], dtype: np.dtype | None = None) -> list[dict[str, Any]]:
    """The zarr3 codecs of an uncompressed array in shards; with a dtype, as TensorStore reports them for it."""
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    elements = {"name": "bytes"} if dtype is not None and dtype.itemsize == 1 else little
    configuration = {
        "chunk_shape": list(chunk),
        "codecs": [elements],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def _read_all(file: io.FileIO, array: np.ndarray, offset: int) -> None:
    view = array.reshape(-1).view(np.uint8).data
    while len(view):
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise CheckpointError(f"{file.name}: truncated; convert the checkpoint again")
        view, offset = view[count:], offset + count


def _write_all(file: io.RawIOBase, array: np.ndarray) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while len(view):
        view = view[file.write(view) :]


def _sync(path: FilePath) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), the checksum of a zarr3 shard index."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_TABLE = tuple(_crc_entry(byte) for byte in range(256))


def _checkpointer(value_type: type, handler: _Handler) -> ocp.Checkpointer:
    # Processes that share a conversion save different items: none may wait for another.
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"item-{process}"
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=True,
            use_compression=False,
            # Orbax warns about registries that cannot hold a jax.Array.
            type_handler_registry=type_handlers.create_type_handler_registry(
                (value_type, handler), (jax.Array, type_handlers.ArrayHandler())
            ),
            multiprocessing_options=alone,
        ),
        multiprocessing_options=alone,
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax looks for OCDBT files to merge even when told to write none, and warns that there are none."""
    return "Skipping merge of OCDBT" not in record.getMessage()


def write_item(
    directory: FilePath,
    leaves: Mapping[Path, Leaf],
    record: Mapping[str, Any],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Saves the leaves as the Orbax checkpoint ``directory`` (which Orbax creates whole or not at all) with ``record``.

    ``on_bytes`` is told the size of every chunk that is written. What an earlier, interrupted attempt left behind
    is for the caller to remove.
    """
    tree = nest({path: _Streamed(path, leaf) for path, leaf in leaves.items()})
    checkpointer = _checkpointer(_Streamed, _Handler(on_bytes))
    logger = logging.getLogger("absl")
    logger.addFilter(_is_news)
    try:
        checkpointer.save(directory.absolute(), ocp.args.PyTreeSave(tree), custom_metadata=dict(record))
    finally:
        logger.removeFilter(_is_news)
        checkpointer.close()


def read_record(directory: FilePath) -> dict[str, Any] | None:
    """The record that ``write_item`` stored with a finished item; None if there is no such item."""
    try:
        return json.loads((directory / _METADATA_FILE).read_text(encoding="utf-8"))["custom_metadata"]
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{directory}: not a readable Orbax checkpoint: {error!r}") from None


def open_item(directory: FilePath) -> dict[Path, StoredLeaf]:
    """Handles to the leaves of a finished item; reads no array."""
    checkpointer = _checkpointer(np.ndarray, _Handler())
    try:
        return flatten(checkpointer.restore(directory.absolute(), ocp.args.PyTreeRestore()))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{directory}: not a readable Orbax checkpoint: {error}") from error
    finally:
        checkpointer.close()
