"""The token log of a run: every new token of every request in flight, so that a killed run goes on where it was."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.engine.requests import TokenLogprob, Update


@dataclasses.dataclass
class Progress:
    """How far a request has come: its new tokens, their log-probabilities if asked for, and why it ended if it did."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stopped_by: str | int | None = None
    error: str | None = None

    def add(self, update: Update) -> None:
        """Takes an update in."""
        self.token_ids.extend(update.token_ids)
        self.logprobs.extend(update.logprobs or ())
        self.finish_reason, self.stopped_by, self.error = update.finish_reason, update.stopped_by, update.error


class TokenLog:
    """``path`` as a log of updates, a line per flush; ``digests`` name the requests by index.

    Opening an existing log reads it: ``progress`` holds what is known of the requests that are still what they were
    then. What was cut off at the end is dropped, and so is everything if the log was written under other ``settings``.
    Lines are written at most every ``interval`` seconds; tokens that a kill takes are generated again, to the same.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], digests: Mapping[int, str], *, interval: float = 0.2
    ):
        self.path = Path(path)
        self.progress: dict[int, Progress] = {}
        self._digests = digests
        self._interval = interval
        self._waiting: list[Any] = []
        self._written = time.monotonic()
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        self._head = {"settings": hashlib.sha256(text.encode()).hexdigest()}
        self._read()
        # Written anew, so that the log does not grow with every restart.
        rows: list[Any] = [self._head]
        rows += [
            [
                _entry(
                    i,
                    digests[i],
                    Update(i, tuple(p.token_ids), p.finish_reason, tuple(p.logprobs) or None, p.stopped_by, p.error),
                )
            ]
            for i, p in self.progress.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, b"".join(_encode(row) for row in rows))
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, index: int, update: Update) -> None:
        """Notes what request ``index`` has produced."""
        self._waiting.append(_entry(index, self._digests[index], update))

    def flush(self, *, now: bool = False) -> None:
        """Writes what has been noted, if it is time to; ``now`` writes in any case."""
        moment = time.monotonic()
        if self._waiting and (now or moment - self._written >= self._interval):
            data = _encode(self._waiting)
            while data:
                data = data[os.write(self._descriptor, data) :]
            self._waiting = []
            self._written = moment

    def close(self, *, remove: bool = False) -> None:
        """Writes what waits and closes the log, or removes it when nothing is in flight any more."""
        if self._descriptor < 0:
            return
        self.flush(now=True)
        os.close(self._descriptor)
        self._descriptor = -1
        if remove:
            self.path.unlink()

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        rows = data[: data.rfind(b"\n") + 1].splitlines()
        try:
            if not rows or json.loads(rows[0]) != self._head:
                return
            for row in rows[1:]:
                for index, digest, tokens, logprobs, reason, stopped_by, error in json.loads(row):
                    if self._digests.get(index) == digest:
                        self._note(index, tokens, logprobs, reason, stopped_by, error)
        except (ValueError, TypeError):
            pass  # a line that is not ours: what came before it stands

    def _note(self, index: int, tokens: Sequence[int], logprobs, reason, stopped_by, error) -> None:
        scores = None
        if logprobs is not None:
            scores = tuple(TokenLogprob(value, tuple((t, p) for t, p in top)) for value, top in logprobs)
        update = Update(index, tuple(tokens), reason, scores, stopped_by, error)
        self.progress.setdefault(index, Progress()).add(update)


def _entry(index: int, digest: str, update: Update) -> list[Any]:
    scores = None if update.logprobs is None else [[s.logprob, s.top] for s in update.logprobs]
    return [index, digest, update.token_ids, scores, update.finish_reason, update.stopped_by, update.error]


def _encode(row: Any) -> bytes:
    return (json.dumps(row, separators=(",", ":")) + "\n").encode()
