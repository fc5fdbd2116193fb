"""Safetensors files: headers, partial reads, and a streaming writer in the tensor order of the release.

The library's numpy and Flax readers know neither F8_E4M3 nor F8_E8M0 (checkpoint reference 3.4), so headers are parsed
here and tensors are ``ml_dtypes`` views of the file's bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from deepseek_v4.checkpoint.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Element types by their name in a header; the order is that of the tensors inside a released shard."""

_DTYPE_ORDER = {name: rank for rank, name in enumerate(DTYPES)}
_LARGEST_HEADER = 100_000_000

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: element type, shape, and where its bytes start in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """The header of one file, and reads of its tensors or parts of them.

    Opening reads the header alone and checks all of it: raises ``CheckpointError`` for a truncated file, a header that
    is not what the format asks for, and tensors that overlap, leave gaps or do not fill the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            self.size_bytes, self.modified_ns = status.st_size, status.st_mtime_ns
            header = _read_header(self.path, file, self.size_bytes)
        self.header_digest = hashlib.sha256(header).hexdigest()
        self.entries = _parse_header(self.path, header, self.size_bytes)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A new array with the tensor, or with the part of it that ``index`` (slices of leading dims) selects.

        Reads only the pages it needs, and leaves none of them mapped when the part is contiguous.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        bounds = [slice(*(index[d] if d < len(index) else slice(None)).indices(n)) for d, n in enumerate(entry.shape)]
        shape = tuple(max(0, b.stop - b.start) for b in bounds)
        partial = [d for d, n in enumerate(entry.shape) if shape[d] != n]
        # Contiguous when only dims of length one precede the last partial dim.
        if not partial or all(shape[d] == 1 for d in range(partial[-1])):
            first = 0
            for d, bound in enumerate(bounds):
                first = first * entry.shape[d] + bound.start
            array = np.empty(shape, dtype)
            self._read_into(array, entry.start + first * dtype.itemsize)
            return array
        whole = np.frombuffer(self._mapped(), np.uint8, entry.size_bytes, entry.start).view(dtype).reshape(entry.shape)
        return np.ascontiguousarray(whole[tuple(bounds)])

    def close(self) -> None:
        """Closes the file; a later read opens it again."""
        if self._map is not None:
            # A view that is still alive keeps the mapping alive with it.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(self._open(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _read_into(self, array: np.ndarray, offset: int) -> None:
        view = array.reshape(-1).view(np.uint8).data
        while len(view):
            count = os.preadv(self._open(), [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: the file ended at byte {offset} while it was read")
            view, offset = view[count:], offset + count


def _read_header(path: Path, file, size: int) -> bytes:
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; it is truncated or not one")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        (length,) = struct.unpack("<Q", mapped[:8])
        if length > _LARGEST_HEADER:
            raise CheckpointError(f"{path}: claims a header of {length} bytes; this is not a safetensors file")
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated: the header is {length} bytes long and the file {size}; download it again"
            )
        return mapped[8 : 8 + length]


def _parse_header(path: Path, header: bytes, size: int) -> dict[str, Entry]:
    def unique(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{path}: bad header", [f"{n}: appears twice" for n in found if names.count(n) > 1])
        return found

    try:
        data = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    data.pop("__metadata__", None)
    base, entries = 8 + len(header), {}
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    for name, value in data.items():
        entry, end = _parse_entry(name, value, base, problems)
        if entry is not None:
            entries[name] = entry
            spans.append((entry.start, end, name))
    position, previous = base, "the header"
    for start, end, name in sorted(spans):
        if start != position:
            kind = "overlaps" if start < position else f"leaves a gap of {start - position} bytes after"
            problems.append(f"{name}: {kind} {previous}")
        position, previous = max(position, end), name
    if not problems and position != size:
        problems.append(
            f"tensors end at byte {position} but the file has {size}; "
            + ("it is truncated, download it again" if position > size else "it has bytes that no tensor owns")
        )
    if problems:
        raise CheckpointError(f"{path}: bad safetensors file", problems)
    return entries


def _parse_entry(name: str, value, base: int, problems: list[str]) -> tuple[Entry | None, int]:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        problems.append(f"{name}: expected dtype, shape and data_offsets, found {value!r}")
        return None, 0
    if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
        problems.append(f"{name}: bad shape {list(shape)} or data_offsets {[begin, end]}")
        return None, 0
    if dtype not in DTYPES:
        problems.append(f"{name}: unknown dtype {dtype!r}, expected one of {list(DTYPES)}")
        return None, 0
    entry = Entry(name, dtype, shape, base + begin)
    if end - begin != entry.size_bytes:
        problems.append(
            f"{name}: {dtype} {list(shape)} takes {entry.size_bytes} bytes, data_offsets span {end - begin}"
        )
        return None, 0
    return entry, base + end


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[Entry], int]:
    """Header bytes (length prefix included), entries in file order, and the size of the whole file.

    ``tensors`` maps names to (dtype name, shape). Tensors are ordered by dtype and then by name, the header is padded
    to 8 bytes with spaces and has no ``__metadata__``: the layout of the released shards.
    """
    ordered = sorted(tensors, key=lambda name: (_DTYPE_ORDER[tensors[name][0]], name))
    header, offset, entries = {}, 0, []
    for name in ordered:
        dtype, shape = tensors[name]
        entry = Entry(name, dtype, tuple(shape), offset)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + entry.size_bytes]}
        offset += entry.size_bytes
        entries.append(entry)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = [dataclasses.replace(entry, start=base + entry.start) for entry in entries]
    return struct.pack("<Q", len(text)) + text, entries, base + offset


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[list[Entry]], Iterable[np.ndarray]],
) -> int:
    """Writes one file and returns its size; ``pieces`` yields the bytes of the given entries in file order.

    The file appears under its name only when it is complete and on disk.
    """
    path = Path(path)
    header, entries, size = build_header(tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for piece in pieces(entries):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            file.flush()
            if file.tell() != size:
                raise CheckpointError(f"{path}: wrote {file.tell()} bytes, the header announces {size}")
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size
