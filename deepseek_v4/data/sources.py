"""Files of training documents, read into arrays: every bad document is named with its file and line.

* ``*.jsonl``: one per line, ``{"text": ...}``, ``{"messages": [...]}`` or ``{"token_ids": [...]}``.
* ``*.txt``: the whole file, or the texts between occurrences of ``separator``.
* ``*.npy``: integers [N], memory-mapped. With ``X.offsets.npy`` [D + 1] beside ``X.npy``, document d is tokens
  offsets[d] to offsets[d + 1]. Without, one begins at every BOS token, or after every EOS token in a file that has no
  BOS token. Of integers [D, n] every row is one. ``X.targets.npy``, bool of the shape of the tokens, says what is to be
  learnt.
* ``*.npz``: arrays ``tokens`` and, as above, ``offsets`` and ``targets``, read into memory.

``.jsonl`` and ``.txt`` may be compressed (``.xz``, ``.gz``). A path is a file, a directory (all files in it that have
one of these names) or a pattern such as ``corpus/*.txt.xz``. scripts/tokenize_data.py makes ``.npy`` files of the rest.
"""

import dataclasses
import glob
import gzip
import hashlib
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from deepseek_v4.data.documents import Document, DocumentEncoder, DocumentError

Format = Literal["auto", "text", "chat", "tokens"]

# What a JSONL line may hold, and which other files may be read, by format.
_KINDS = {
    "auto": ("text", "messages", "token_ids"),
    "text": ("text",),
    "chat": ("messages",),
    "tokens": ("token_ids",),
}
_SUFFIXES = {
    "auto": (".jsonl", ".txt", ".npy", ".npz"),
    "text": (".jsonl", ".txt"),
    "chat": (".jsonl",),
    "tokens": (".jsonl", ".npy", ".npz"),
}
_OPENERS: dict[str, Callable[[Path, Any], Any]] = {".xz": lzma.open, ".gz": gzip.open}
_SIDECARS = (".offsets.npy", ".targets.npy")

# Arrays are checked and hashed in pieces of so many tokens, so that a mapped file need not fit into memory.
_CHUNK = 1 << 24


class DataError(ValueError):
    """Training data that cannot be used; the message says where, what was expected and found, and what to do."""


class BadDocuments:
    """Counts what cannot be trained on and keeps the first ``limit`` reports; ``on_bad`` "fail" raises at the first."""

    def __init__(self, on_bad: Literal["fail", "skip"], limit: int = 100):
        self._on_bad = on_bad
        self._limit = limit
        self.count = 0
        self.reports: list[str] = []

    def add(self, where: str, error: DocumentError) -> None:
        """Reports a document; raises ``DataError`` if that is fatal."""
        report = f"{where}: {error}"
        if self._on_bad == "fail":
            raise DataError(f"{report}; correct it, or leave such documents out with on_bad='skip'")
        self.count += 1
        if len(self.reports) < self._limit:
            self.reports.append(report)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in one array: number d is ``tokens[starts[d] : starts[d] + lengths[d]]``.

    ``tokens`` are integers [N], mapped from a file or in memory, ``targets`` bool [N] (None: all), ``starts`` and
    ``lengths`` int64 [D].
    """

    tokens: np.ndarray
    targets: np.ndarray | None
    starts: np.ndarray
    lengths: np.ndarray

    def select(self, chosen: np.ndarray) -> "Documents":
        """The documents whose indices or mask ``chosen`` is."""
        return dataclasses.replace(self, starts=self.starts[chosen], lengths=self.lengths[chosen])

    def digests(self) -> list[bytes]:
        """16 bytes for each document that depend on its tokens and targets alone."""
        return [self._digest(start, length) for start, length in zip(self.starts, self.lengths, strict=True)]

    def _digest(self, start: int, length: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for begin in range(start, start + length, _CHUNK):
            piece = slice(begin, min(begin + _CHUNK, start + length))
            digest.update(self.tokens[piece].astype("<i4").tobytes())
            if self.targets is not None and not self.targets[piece].all():
                digest.update(np.packbits(self.targets[piece]).tobytes())
        return digest.digest()


def find_files(paths: Sequence[str], data_format: Format = "auto") -> list[Path]:
    """The files that ``paths`` name, in the order of ``paths`` and sorted within a directory or a pattern.

    Raises ``DataError`` if a path matches nothing, a file has an unknown name, or one is named twice.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if Path(path).is_dir():
            found = [file for file in sorted(Path(path).iterdir()) if _suffix(file) in _SUFFIXES[data_format]]
        else:
            found = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob.glob(path))]
        found = [file for file in found if not file.name.endswith(_SIDECARS)]
        if not found:
            raise DataError(f"{path}: no such file, and no {' '.join(_SUFFIXES[data_format])} files in it")
        for file in found:
            if _suffix(file) not in _SUFFIXES[data_format]:
                raise DataError(
                    f"{file}: expected a name ending in {' '.join(_SUFFIXES[data_format])} (texts also with .xz or "
                    f".gz) for data of format {data_format!r}"
                )
            if file in files:
                raise DataError(f"{file}: named twice; to weigh a file, copy it under another name")
            files[file] = None
    return list(files)


def read_documents(
    file: Path, encoder: DocumentEncoder, bad: BadDocuments, data_format: Format = "auto", separator: str | None = None
) -> Iterator[Document]:
    """The good documents of a JSONL or text file in order; the others go to ``bad``."""
    texts = _lines(file) if _suffix(file) == ".jsonl" else _texts(file, separator)
    kinds = _KINDS[data_format] if _suffix(file) == ".jsonl" else ()
    try:
        for number, raw in texts:
            try:
                text = raw.decode("utf-8")
                yield encoder.line(text, kinds) if kinds else encoder.text(text)
            except UnicodeDecodeError as error:
                line = number + raw[: error.start].count(b"\n")
                bad.add(f"{file}:{line}", DocumentError(f"not UTF-8: byte {raw[error.start]:#04x}"))
            except DocumentError as error:
                bad.add(f"{file}:{number}", error)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def read_file(
    file: Path,
    encoder: DocumentEncoder,
    bad: BadDocuments,
    data_format: Format,
    separator: str | None,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
) -> Documents:
    """The good documents of any file; those of an array keep to where they lie in it."""
    if _suffix(file) in (".npy", ".npz"):
        return _arrays(file, bad, vocab_size, bos_token_id, eos_token_id)
    return collect(read_documents(file, encoder, bad, data_format, separator))


def collect(documents: Iterable[Document]) -> Documents:
    """``documents`` one behind the other in memory."""
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for document in documents:
        tokens.append(document.tokens)
        targets.append(document.targets)
    lengths = np.array([len(piece) for piece in tokens], np.int64)
    wanted = np.concatenate([np.zeros(0, bool), *targets])
    return Documents(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        None if wanted.all() else wanted,
        np.cumsum(lengths) - lengths,
        lengths,
    )


def _suffix(file: Path) -> str:
    suffix = file.suffix
    return Path(file.stem).suffix if suffix in _OPENERS else suffix


def _open(file: Path) -> IO[bytes]:
    return _OPENERS.get(file.suffix, open)(file, "rb")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _texts(file: Path, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """The texts of a file with the lines they begin at; blank ones around separators are none."""
    with _open(file) as stream:
        data = stream.read().removeprefix(b"\xef\xbb\xbf")
    if separator is None:
        yield 1, data
        return
    line = 1
    for text in data.split(separator.encode("utf-8")):
        if text.strip():
            yield line, text
        line += text.count(b"\n") + separator.count("\n")


def _arrays(file: Path, bad: BadDocuments, vocab_size: int, bos_token_id: int, eos_token_id: int) -> Documents:
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                tokens, offsets, targets = map(archive.get, ("tokens", "offsets", "targets"))
            if tokens is None:
                raise DataError(f"{file}: expected an array 'tokens', and 'offsets' and 'targets' as needed")
        else:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
            offsets, targets = (
                np.load(beside, mmap_mode="r", allow_pickle=False)
                if (beside := file.with_name(file.stem + ending)).exists()
                else None
                for ending in _SIDECARS
            )
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a readable array: {error}") from None
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2):
        raise DataError(f"{file}: expected integers [N] or [documents, n], found {tokens.dtype} {list(tokens.shape)}")
    if tokens.ndim == 2 and offsets is not None:
        raise DataError(f"{file}: offsets are for tokens [N], found {list(tokens.shape)}, whose rows are documents")
    if targets is not None and (targets.dtype != bool or targets.shape != tokens.shape):
        raise DataError(
            f"{file}: targets: expected bool {list(tokens.shape)}, found {targets.dtype} {list(targets.shape)}"
        )
    if tokens.ndim == 2:
        offsets = np.arange(len(tokens) + 1) * tokens.shape[1]
        tokens, targets = tokens.reshape(-1), None if targets is None else targets.reshape(-1)
    elif offsets is None:
        offsets = _boundaries(tokens, bos_token_id, eos_token_id)
    if not np.issubdtype(offsets.dtype, np.integer) or offsets.ndim != 1 or not len(offsets):
        raise DataError(f"{file}: offsets: expected integers [documents + 1], found {offsets.dtype} {offsets.shape}")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"{file}: offsets: expected them to rise from 0 to the number of tokens, {len(tokens)}; "
            f"found {offsets[0]} .. {offsets[-1]}" + (", not rising" if (np.diff(offsets) < 0).any() else "")
        )
    documents = Documents(tokens, targets, offsets[:-1], np.diff(offsets))
    return documents.select(_good(documents, file, bad, vocab_size))


def _boundaries(tokens: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Offsets of documents that begin at BOS tokens, or that end at EOS tokens if there is no BOS token."""
    starts = _places(tokens, lambda piece: piece == bos)
    if not len(starts):
        starts = _places(tokens, lambda piece: piece == eos) + 1
    return np.unique(np.concatenate([[0], starts, [len(tokens)]]))


def _good(documents: Documents, file: Path, bad: BadDocuments, vocab_size: int) -> np.ndarray:
    """Which documents are neither empty nor hold a token outside the vocabulary [D]."""
    good = np.ones(len(documents.starts), bool)
    ends = documents.starts + documents.lengths
    for at in _places(documents.tokens, lambda piece: (piece < 0) | (piece >= vocab_size)):
        index = int(np.searchsorted(ends, at, side="right"))
        if good[index]:
            good[index] = False
            found = f"{documents.tokens[at]} is outside the vocabulary 0 .. {vocab_size - 1}"
            bad.add(f"{file}: document {index}", DocumentError(f"token {at - documents.starts[index]}: {found}"))
    for index in map(int, np.flatnonzero(documents.lengths == 0)):
        good[index] = False
        bad.add(f"{file}: document {index}", DocumentError("empty"))
    return good


def _places(tokens: np.ndarray, condition: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where ``condition`` holds, int64."""
    found = [
        begin + np.flatnonzero(condition(tokens[begin : begin + _CHUNK])) for begin in range(0, len(tokens), _CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])
