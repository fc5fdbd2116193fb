"""Batches of packed documents as a pure function of the step, so that a run resumes exactly wherever it stopped.

    config = DataConfig(paths=("chats.jsonl",), sequence_length=1024, batch_size=16)
    dataset = open_data(config, tokenizer, vocab_size, bos_token_id, eos_token_id)
    with dataset.prefetch(start=dataset.restore(checkpoint_state)) as batches:
        for step, batch in batches: ...          # save dataset.state(step + 1)

A batch is a dict of arrays [B, S]: ``tokens`` int32; ``positions`` int32, of each token in its document, from 0 at its
start, where the empty tail of a row counts as one more document; ``targets`` bool, what the model is to predict (a
document's first token may be among them, though nothing precedes it); ``real`` bool, what is not empty tail.

Documents are packed into rows once. Each epoch runs through all rows in an order that the seed and the epoch decide;
the last batch of an epoch goes on with rows of the next. Every process has the whole index and makes its own share of
the global batch, which is the same for any number of processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepseek_v4.data.documents import DocumentEncoder
from deepseek_v4.data.packing import best_fit, cut
from deepseek_v4.data.sources import BadDocuments, DataError, Documents, Format, find_files, read_file
from deepseek_v4.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they become batches."""

    paths: tuple[str, ...]
    """Files, directories or patterns; see deepseek_v4.data.sources for what they may hold."""
    sequence_length: int
    """Tokens in a row."""
    batch_size: int
    """Rows in a global batch."""
    format: Format = "auto"
    """What the files hold; auto tells by their names and by the keys of each JSONL line."""
    separator: str | None = None
    """Splits .txt files into documents. Default: a file is a document."""
    bos: bool | None = None
    """Whether texts begin with a BOS token. Default: if the tokenizer's config says add_bos_token."""
    eos: bool = True
    """Whether texts end with an EOS token."""
    thinking_mode: Literal["chat", "thinking"] = "chat"
    """Of messages whose line does not say. In chat mode no reasoning is shown, so none is learnt."""
    packing: Literal["best_fit", "one_per_row"] = "best_fit"
    """Several documents in a row where they fit, or one (or one piece of a longer one)."""
    shuffle: bool = True
    """Whether rows are in another order in each epoch, or always in that of the first document in each."""
    seed: int = 0
    """Decides the order of rows."""
    on_bad: Literal["fail", "skip"] = "fail"
    """Whether a document that cannot be used stops everything or is counted and left out."""
    holdout: float = 0.0
    """Share of the documents kept for evaluation, chosen by their content: the same whatever the seed and the order."""
    evaluation_paths: tuple[str, ...] = ()
    """Documents for evaluation instead of a held-out share. Files that are also in paths are not trained on."""

    def __post_init__(self) -> None:
        if not self.paths or isinstance(self.paths, str):
            raise DataError(f"paths: expected a tuple of files of training documents, found {self.paths!r}")
        for name, least in (("sequence_length", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        if self.separator == "":
            raise DataError("separator: empty; expected the text between two documents, or none")
        if not 0 <= self.holdout < 1:
            raise DataError(f"holdout: expected a share from 0 to below 1, found {self.holdout}")
        if self.holdout and self.evaluation_paths:
            raise DataError("holdout and evaluation_paths: give one of them")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was read and packed."""

    files: int
    documents: int
    tokens: int
    targets: int
    """Tokens that are to be predicted."""
    cut_documents: int
    """Documents longer than a row."""
    rows: int
    padding_share: float
    """Empty positions of all."""
    bad_documents: int
    """Left out, also in the count of the other part if a share was held out."""
    bad_reports: tuple[str, ...]
    """The first of them: file, line, what is wrong."""

    def __str__(self) -> str:
        bad = f", {self.bad_documents} bad documents left out" if self.bad_documents else ""
        return (
            f"{self.documents} documents ({self.cut_documents} cut) from {self.files} files{bad}, {self.tokens} tokens "
            f"({self.targets} targets) in {self.rows} rows with {self.padding_share:.1%} padding"
        )


class Dataset:
    """Packed documents: ``len`` is the number of steps in an epoch, ``batch(step)`` any batch of any epoch.

    ``one_pass`` is for evaluation: rows in order, each exactly once, and what is missing in the last batch is rows
    without tokens. ``evaluation`` is the dataset of what was held out, one pass, or None. ``fingerprint`` is that of
    all documents, in order.
    """

    def __init__(
        self,
        parts: list[Documents],
        bad: BadDocuments,
        config: DataConfig,
        files: int,
        one_pass: bool = False,
        evaluation: "Dataset | None" = None,
    ):
        size = config.sequence_length
        lengths = np.concatenate([part.lengths for part in parts])
        if not len(lengths):
            raise DataError(f"{' '.join(config.paths)}: no documents to learn from ({bad.count} bad ones left out)")
        document, start, length = cut(lengths, size)
        row = best_fit(length, size) if config.packing == "best_fit" else np.arange(len(length))
        order = np.argsort(row, kind="stable")
        part_of = np.repeat(np.arange(len(parts)), [len(part.lengths) for part in parts])
        # Pieces in the order of their rows: row r has pieces _rows[r] to _rows[r + 1].
        self._part = part_of[document][order]
        self._start = (np.concatenate([part.starts for part in parts])[document] + start)[order]
        self._length = length[order]
        self._rows = np.concatenate([[0], np.cumsum(np.bincount(row))])
        self._parts = parts
        self._one_pass = one_pass
        self.config = config
        self.evaluation = evaluation
        self.rows = len(self._rows) - 1
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(b"".join(part.digests()))
        self.fingerprint = digest.hexdigest()
        tokens = int(lengths.sum())
        self.statistics = Statistics(
            files=files,
            documents=len(lengths),
            tokens=tokens,
            targets=sum(map(_targets, parts)),
            cut_documents=int((lengths > size).sum()),
            rows=self.rows,
            padding_share=1 - tokens / (self.rows * size),
            bad_documents=bad.count,
            bad_reports=tuple(bad.reports),
        )
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return -(-self.rows // self.config.batch_size)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The share of ``process_index`` in the batch of ``step`` (counted from 0 over all epochs), described above.

        Raises ``DataError`` if the processes cannot share the rows evenly, and IndexError for a step that is negative
        or behind the one pass.
        """
        config = self.config
        if config.batch_size % process_count:
            raise DataError(
                f"batch_size: {config.batch_size} rows cannot be shared evenly by {process_count} processes"
            )
        if step < 0 or (self._one_pass and step >= len(self)):
            raise IndexError(f"step {step} of {len(self)}")
        share = config.batch_size // process_count
        first = step * config.batch_size + process_index * share
        shape = (share, config.sequence_length)
        tail = np.arange(config.sequence_length, dtype=np.int32)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "positions": np.tile(tail, (share, 1)),
            "targets": np.zeros(shape, bool),
            "real": np.zeros(shape, bool),
        }
        for index in range(share):
            epoch, place = divmod(first + index, self.rows)
            if self._one_pass and epoch:
                break
            row = self._order(epoch)[place]
            end = 0
            for piece in range(self._rows[row], self._rows[row + 1]):
                begin, end = end, end + int(self._length[piece])
                part = self._parts[self._part[piece]]
                source = slice(self._start[piece], self._start[piece] + self._length[piece])
                batch["tokens"][index, begin:end] = part.tokens[source]
                batch["positions"][index, begin:end] = tail[: end - begin]
                batch["targets"][index, begin:end] = True if part.targets is None else part.targets[source]
            batch["positions"][index, end:] = tail[: len(tail) - end]
            batch["real"][index, :end] = True
        return batch

    def prefetch(
        self, start: int = 0, stop: int | None = None, process_index: int = 0, process_count: int = 1, depth: int = 2
    ) -> "Prefetcher":
        """Iterates over (step, batch) from ``start`` up to ``stop`` (None: for ever, or the end of one pass), made
        ahead in a thread."""
        stop = len(self) if stop is None and self._one_pass else stop
        return Prefetcher(self, start, stop, process_index, process_count, depth)

    def state(self, step: int) -> dict[str, Any]:
        """What to save, as JSON, so that a run whose next step is ``step`` can go on; ``epoch`` is for people."""
        epoch = step * self.config.batch_size // self.rows
        return {"step": step, "epoch": epoch, "fingerprint": self.fingerprint, **self._order_settings()}

    def restore(self, state: Mapping[str, Any]) -> int:
        """The next step of a saved ``state``; raises ``DataError`` if its batches would not be the ones that follow."""
        for name, value in {**self._order_settings(), "fingerprint": self.fingerprint}.items():
            if state.get(name) == value:
                continue
            if name == "fingerprint":
                raise DataError(
                    f"the training data changed: fingerprint {value} now, {state.get(name)} in the saved run; give the "
                    "same files in the same order, or begin at step 0"
                )
            raise DataError(
                f"{name} is {value!r} now, {state.get(name)!r} in the saved run, so its batches cannot be continued; "
                f"set it back, or begin at step 0"
            )
        return int(state["step"])

    def _order_settings(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in _ORDER_SETTINGS}

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._one_pass or not self.config.shuffle:
            return np.arange(self.rows)
        # Raw words of a bit generator: NumPy promises that these never change, unlike those of permutation().
        return np.argsort(np.random.PCG64([self.config.seed, epoch]).random_raw(self.rows), kind="stable")


# The settings, beside the documents, that decide which rows make up the batch of a step.
_ORDER_SETTINGS = ("sequence_length", "batch_size", "packing", "shuffle", "seed")


class Prefetcher:
    """Batches of consecutive steps, made ahead by one thread; an exception there is raised where its batch is taken.

    Use it in a ``with`` block, or call ``close``.
    """

    def __init__(
        self, dataset: Dataset, start: int, stop: int | None, process_index: int, process_count: int, depth: int
    ):
        self._make = functools.partial(dataset.batch, process_index=process_index, process_count=process_count)
        self._next, self._stop = start, stop
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: collections.deque[tuple[int, concurrent.futures.Future[Batch]]] = collections.deque()
        for _ in range(max(depth, 1)):
            self._submit()

    def _submit(self) -> None:
        if self._stop is None or self._next < self._stop:
            self._made.append((self._next, self._thread.submit(self._make, self._next)))
            self._next += 1

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if not self._made:
            raise StopIteration
        step, batch = self._made.popleft()
        self._submit()
        return step, batch.result()

    def close(self) -> None:
        """Ends the thread; there are no batches afterwards."""
        self._made.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
    one_pass: bool = False,
) -> Dataset:
    """Reads, tokenises and packs the documents of ``config``; ``vocab_size`` and the ids are those of the model.

    ``tokenizer`` may be None for token ids. ``one_pass`` as in ``Dataset``. Raises ``DataError``.
    """
    encoder = DocumentEncoder(
        tokenizer, vocab_size, bos_token_id, eos_token_id, config.bos, config.eos, config.thinking_mode
    )

    def read(files: list[Path]) -> tuple[list[Documents], BadDocuments]:
        bad = BadDocuments(config.on_bad)
        parts = [
            read_file(file, encoder, bad, config.format, config.separator, vocab_size, bos_token_id, eos_token_id)
            for file in files
        ]
        return parts, bad

    evaluation_files = find_files(config.evaluation_paths, config.format)
    apart = {file.resolve() for file in evaluation_files}
    files = [file for file in find_files(config.paths, config.format) if file.resolve() not in apart]
    if not files:
        raise DataError(
            f"{' '.join(config.paths)}: every file is in evaluation_paths too, so none is left to learn from"
        )
    parts, bad = read(files)
    evaluation = None
    if evaluation_files:
        evaluation = Dataset(*read(evaluation_files), config, len(evaluation_files), one_pass=True)
    elif config.holdout:
        parts, held_out = _hold_out(parts, config.holdout)
        evaluation = Dataset(held_out, bad, config, len(files), one_pass=True)
    return Dataset(parts, bad, config, len(files), one_pass, evaluation)


def _targets(part: Documents) -> int:
    if part.targets is None:
        return int(part.lengths.sum())
    return sum(
        int(np.count_nonzero(part.targets[start : start + length]))
        for start, length in zip(part.starts, part.lengths, strict=True)
    )


def _hold_out(parts: list[Documents], share: float) -> tuple[list[Documents], list[Documents]]:
    """``parts`` without and with only those documents that have the smallest digests."""
    digests = [digest for part in parts for digest in part.digests()]
    count = max(round(share * len(digests)), 1)
    if count >= len(digests):
        raise DataError(
            f"holdout: {share} of {len(digests)} documents leaves none to learn from; give a separator that makes more "
            "documents, or evaluation_paths"
        )
    chosen = np.zeros(len(digests), bool)
    chosen[sorted(range(len(digests)), key=digests.__getitem__)[:count]] = True
    masks = np.split(chosen, np.cumsum([len(part.lengths) for part in parts])[:-1])
    kept = [part.select(~mask) for part, mask in zip(parts, masks, strict=True)]
    return kept, [part.select(mask) for part, mask in zip(parts, masks, strict=True)]
