"""One item on disk as an Orbax checkpoint, written and read in parts.

Orbax saves arrays that are in memory. A Pro layer is larger than the memory a conversion may use, so the arrays here
are leaves that are read while they are written, one chunk after the other; on disk they are what Orbax writes for numpy
arrays, and any Orbax restores them. Files hold at most 64 MiB, in uncompressed chunks (quantised weights do not
compress) of one expert each, so that a mesh with any number of expert shards reads no byte it does not keep. OCDBT, the
Orbax default, writes one file after the other and took twice as long.
"""

import asyncio
import collections
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_FILES_IN_FLIGHT = 4
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
    """A leaf of an item on disk."""

    def __init__(self, array: tensorstore.TensorStore):
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype.numpy_dtype

    def read(self, index: Index) -> np.ndarray:
        """See ``source.Leaf``."""
        return self.array[index].read().result()


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
        loop = asyncio.get_running_loop()
        committing: collections.deque[tuple[Any, int]] = collections.deque()

        async def finish_oldest() -> None:
            future, count = committing.popleft()
            await future
            self._on_bytes(count)

        for value, info, arg in zip(values, infos, args, strict=True):
            await info.await_path_creation()
            spec = type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=False,
                global_shape=value.shape,
                local_shape=_file_shape(value),
                dtype=value.dtype,
                arg=arg,
            )
            # Orbax makes every chunk a file; here a file is a zarr3 shard of several chunks.
            spec["metadata"]["chunk_grid"]["configuration"]["chunk_shape"] = _file_shape(value)
            array = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
            files = _grid([slice(0, n) for n in value.shape], array.chunk_layout.write_chunk.shape)
            for file in files:
                # A file is written once, when its transaction commits; until then its chunks wait in memory.
                transaction, size = tensorstore.Transaction(), 0
                pending = array.with_transaction(transaction)
                chunks = _grid(file, array.chunk_layout.read_chunk.shape) if value.stacks_experts else (file,)
                for index in chunks:
                    chunk = await loop.run_in_executor(None, value.leaf.read, index)
                    await pending[index].write(chunk).copy
                    size += chunk.nbytes
                committing.append((transaction.commit_async(), size))
                while len(committing) >= _FILES_IN_FLIGHT:
                    await finish_oldest()
        while committing:
            await finish_oldest()
        return [ocp.future.NoopFuture()]

    async def deserialize(self, infos, args=None):
        arrays = []
        for info in infos:
            await info.await_path_creation()
            spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            arrays.append(tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context))
        return [StoredLeaf(await array) for array in arrays]


def _file_shape(value: _Streamed) -> tuple[int, ...]:
    """The part of an array that one file holds: a power of two of its leading rows, at most ``PIECE_BYTES``."""
    if not value.shape or value.nbytes <= PIECE_BYTES:
        return value.shape
    rows = max(1, PIECE_BYTES * value.shape[0] // value.nbytes)
    return (1 << (rows.bit_length() - 1), *value.shape[1:])


def _grid(region: Sequence[slice], chunk: Sequence[int]) -> Iterator[Index]:
    """The parts of a region, cut by a grid of chunks that begins at its corner."""
    if not region:
        yield ()
        return
    for start in range(region[0].start, region[0].stop, chunk[0]):
        first = slice(start, min(start + chunk[0], region[0].stop))
        for rest in _grid(region[1:], chunk[1:]):
            yield (first, *rest)


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
    arguments = nest(
        {
            path: ocp.SaveArgs(shard_axes=(0,)) if is_expert(path) else ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
            for path in leaves
        }
    )
    checkpointer = _checkpointer(_Streamed, _Handler(on_bytes))
    logger = logging.getLogger("absl")
    logger.addFilter(_is_news)
    try:
        checkpointer.save(
            directory.absolute(), ocp.args.PyTreeSave(tree, save_args=arguments), custom_metadata=dict(record)
        )
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
