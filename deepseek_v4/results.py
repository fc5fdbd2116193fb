"""The output file of a run: a JSON line per finished request, written as it finishes, safe against any interruption."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.requests import Line


class ResultsError(ValueError):
    """An output file that does not belong to this input and these settings."""


class ResultFile:
    """Appends results to ``path``, each as one whole line as it comes; knows what an earlier run finished.

    ``PATH.run.json`` says which input and settings the lines belong to. A file that the same run began is continued: a
    last line that was cut off is removed, ``finished`` holds the indexes that need no work. When the last result has
    come the lines are sorted into input order. Raises ``ResultsError`` if the file belongs to other lines or other
    settings, or if nothing says to which. Use as a context manager.
    """

    def __init__(self, path: str | Path, lines: Sequence[Line], settings: Mapping[str, Any]):
        self.path = Path(path)
        self._run_path = self.path.with_name(self.path.name + ".run.json")
        self._expected = {line.index for line in lines}
        self.failed = 0
        """Results so far, earlier runs included, whose finish_reason is "error"."""
        self.finished: set[int] = set()
        run = {"settings": dict(settings), "lines": [line.digest[:16] for line in lines]}
        if self.path.exists():
            self._check_run(run)
            self._read_finished()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._run_path, _encode(run))
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends the result of request ``record["index"]``: once this returns, a killed process loses it no more."""
        index = record["index"]
        if index in self.finished or index not in self._expected:
            raise ValueError(f"request {index} has a result already, or is not of this run")
        data = _encode(record)
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.failed += record["finish_reason"] == "error"
        self.finished.add(index)

    @property
    def complete(self) -> bool:
        """Whether every request has its result."""
        return self.finished == self._expected

    def close(self) -> None:
        """Makes the file durable; sorts it once it is complete."""
        if self._descriptor < 0:
            return
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        if self.complete:
            rows = [(json.loads(row)["index"], row) for row in self.path.read_bytes().splitlines(keepends=True)]
            ordered = sorted(rows, key=lambda item: item[0])
            if ordered != rows:
                write_atomically(self.path, b"".join(row for _, row in ordered))

    def _check_run(self, run: Mapping[str, Any]) -> None:
        try:
            earlier = json.loads(self._run_path.read_bytes())
            settings, digests = earlier["settings"], earlier["lines"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ResultsError(
                f"{self._run_path}: missing or unreadable, so nothing says which input {self.path} belongs to; "
                "remove both files or choose another output"
            ) from None
        for name in sorted(set(settings) | set(run["settings"])):
            before, now = settings.get(name), run["settings"].get(name)
            if before != now:
                raise ResultsError(
                    f"{self.path}: was begun with {name} {before!r}, now it is {now!r}; use the same, remove "
                    f"{self.path.name} and {self._run_path.name}, or choose another output"
                )
        # The input may have grown since: the lines that were there must be the same.
        for index, (before, now) in enumerate(zip(digests, run["lines"], strict=False)):
            if before != now:
                raise ResultsError(f"{self.path}: belongs to another input: request {index} is a different line now")
        if len(run["lines"]) < len(digests):
            raise ResultsError(
                f"{self.path}: belongs to another input: it had {len(digests)} requests, now {len(run['lines'])}"
            )

    def _read_finished(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, row in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(row)
                index, reason = record["index"], record["finish_reason"]
            except (ValueError, KeyError, TypeError):
                raise ResultsError(f"{self.path}:{number}: not a result line; the file was changed") from None
            if index in self.finished or index not in self._expected:
                raise ResultsError(f"{self.path}:{number}: index {index!r} is repeated or not in the input")
            self.finished.add(index)
            self.failed += reason == "error"
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))


def _encode(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="surrogatepass")
