"""A run over a file of requests that loses nothing: results as they finish, a log of what is in flight, resumption.

Process 0 reads the input once and writes the output once; every process runs the same requests.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deepseek_v4.chat import parse_message_from_completion_text
from deepseek_v4.engine.engine import Engine
from deepseek_v4.engine.processes import Interruption, on_main
from deepseek_v4.engine.requests import Request, Update
from deepseek_v4.engine.stopping import cut_at_stop
from deepseek_v4.engine.token_log import Progress, TokenLog
from deepseek_v4.requests import Line, Prompt, RequestError, check_context, parse_line, read_lines
from deepseek_v4.results import ResultFile
from deepseek_v4.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """A line of the input: its prompt and request, or what is wrong with it."""

    index: int
    prompt: Prompt | None = None
    request: Request | None = None
    error: str | None = None


def read_tasks(
    path: str | Path, vocab_size: int, tokenizer: Tokenizer | None, context: int, defaults: Mapping[str, Any]
) -> tuple[list[Line], list[Task]]:
    """The lines of an input file and what each asks for; ``defaults`` are settings of ``Request`` for all of them.

    A request's random stream is its index. Raises ``RequestError`` if the file cannot be read.
    """
    read = on_main(lambda: [[line.index, line.number, line.text] for line in read_lines(path)])
    lines = [Line(*row) for row in read]
    return lines, [_task(path, line, vocab_size, tokenizer, context, defaults) for line in lines]


def _task(path, line: Line, vocab_size: int, tokenizer, context: int, defaults: Mapping[str, Any]) -> Task:
    try:
        prompt = parse_line(line.text, vocab_size, tokenizer, settings=True)
        if prompt.settings.get("stop") and tokenizer is None:
            raise RequestError("stop: strings need the checkpoint's tokenizer.json, which is missing; give stop_ids")
        request = Request(prompt.token_ids, **{**defaults, "stream": line.index, **prompt.settings})
        check_context(len(prompt.token_ids), request.max_new_tokens, context)
    except ValueError as error:
        return Task(line.index, error=f"{path}:{line.number}: {error}")
    return Task(line.index, prompt, request)


class Session:
    """The state of a run on disk: ``OUTPUT`` with its ``.run.json``, and ``OUTPUT.tokens`` while anything is in flight.

    ``settings`` are what the results depend on beside the lines: a run is continued only under the same. Lines with
    errors are answered at once. Raises ``ResultsError`` as ``ResultFile`` does.
    """

    def __init__(
        self,
        output: str | Path,
        lines: Sequence[Line],
        tasks: Sequence[Task],
        settings: Mapping[str, Any],
        tokenizer: Tokenizer | None,
    ):
        self._stack = ExitStack()
        self._tasks = {task.index: task for task in tasks}
        self._tokenizer = tokenizer
        self._results: ResultFile | None = None
        self._log: TokenLog | None = None
        self.answered_before = 0

        def begin() -> list[Any]:
            self._results = self._stack.enter_context(ResultFile(output, lines, settings))
            finished = self._results.finished
            digests = {line.index: line.digest[:16] for line in lines if line.index not in finished}
            log_path = Path(output).with_name(Path(output).name + ".tokens")
            self._log = TokenLog(log_path, settings, digests)
            known = [[i, p.token_ids, p.finish_reason] for i, p in self._log.progress.items()]
            return [sorted(finished), self._results.failed, known]

        finished, self._failed, known = on_main(begin)
        self.answered_before = len(finished)
        self._progress = {i: Progress(list(tokens), finish_reason=reason) for i, tokens, reason in known}
        if self._log is not None:
            self._progress = dict(self._log.progress)
        for task in tasks:
            if task.index not in finished and task.error is not None:
                self._answer(task.index, Progress(finish_reason="error", error=task.error))
        for index, progress in list(self._progress.items()):
            if progress.finish_reason is not None:
                # It had ended; only its result was not written any more.
                self._answer(index, self._progress.pop(index))
        answered = set(finished) | {t.index for t in tasks if t.error} | {i for i, _, reason in known if reason}
        self.pending = [task.index for task in tasks if task.index not in answered]
        """Indexes of the requests that are still to be run."""

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception) -> None:
        if self._log is not None:
            self._log.close(remove=self._results is not None and self._results.complete)
        self._stack.close()

    @property
    def failed(self) -> int:
        """Results whose finish_reason is "error", those of earlier runs included."""
        return self._failed

    @property
    def resumed_tokens(self) -> int:
        """New tokens of unfinished requests that an earlier run had generated."""
        return sum(len(progress.token_ids) for progress in self._progress.values())

    def requests(self) -> list[Request]:
        """The pending requests, each with what was generated of it before."""
        requests = []
        for index in self.pending:
            request = self._tasks[index].request
            assert request is not None
            known = self._progress.get(index)
            requests.append(dataclasses.replace(request, generated=tuple(known.token_ids) if known else ()))
        return requests

    def run(self, engine: Engine, interruption: Interruption | None = None) -> Iterator[tuple[int, Update]]:
        """Runs what is pending; yields (index, update) of every request as they come. Raises ``KeyboardInterrupt``."""
        updates = engine.run(self.requests(), interrupted=None if interruption is None else interruption.requested)
        try:
            for update in updates:
                index = self.pending[update.request_id]
                self.take(index, update)
                yield index, update
        finally:
            if self._log is not None:
                self._log.flush(now=True)
            updates.close()  # type: ignore[attr-defined]

    def take(self, index: int, update: Update) -> None:
        """Records an update of request ``index``."""
        progress = self._progress.setdefault(index, Progress())
        progress.add(update)
        if self._log is not None:
            self._log.add(index, update)
            self._log.flush(now=update.finish_reason is not None)
        if update.finish_reason is not None:
            self._answer(index, self._progress.pop(index))

    def _answer(self, index: int, progress: Progress) -> None:
        self._failed += progress.finish_reason == "error"
        if self._results is not None:
            self._results.add(result_record(self._tasks[index], progress, self._tokenizer))


def result_record(task: Task, progress: Progress, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The result line of a request: ``index``, ``token_ids``, ``text``, ``finish_reason``, and what else there is.

    ``text`` leaves out the stop token or what begins with the stop string; ``logprobs`` are lists of
    {"logprob", "top": [[token, logprob], ...]} where asked for, ``message`` is the parsed answer to chat messages, and
    ``error`` says what went wrong.
    """
    tokens, reason = progress.token_ids, progress.finish_reason
    ended_by_token = reason == "stop" and not isinstance(progress.stopped_by, str)
    text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if ended_by_token else tokens)
    if text is not None and isinstance(progress.stopped_by, str):
        text = cut_at_stop(text, progress.stopped_by)
    record: dict[str, Any] = {"index": task.index, "token_ids": tokens, "text": text, "finish_reason": reason}
    if reason == "error":
        return record | {"error": progress.error}
    if task.request is not None and task.request.logprobs is not None:
        record["logprobs"] = [{"logprob": s.logprob, "top": [list(t) for t in s.top]} for s in progress.logprobs]
    if task.prompt is not None and task.prompt.thinking_mode is not None and tokenizer is not None:
        completion = tokenizer.decode(tokens)
        if isinstance(progress.stopped_by, str):
            completion = cut_at_stop(completion, progress.stopped_by)
        record["message"] = parse_message_from_completion_text(completion, task.prompt.thinking_mode, strict=False)
    return record
