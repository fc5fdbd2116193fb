"""The training loop: batches in, steps, and beside them metrics, evaluations and checkpoints.

A run is a function of its config: started again after it was stopped or killed at any moment it goes on from its newest
complete checkpoint, and on the same devices every later loss has the same bits as if nothing had happened.
"""

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek_v4.data import Batch
from deepseek_v4.distributed import is_main, meet
from deepseek_v4.model import Params
from deepseek_v4.training.checkpoints import Checkpoints
from deepseek_v4.training.evaluation import Evaluation, evaluate
from deepseek_v4.training.metrics import Divergence, LossGuard, MetricsLog, plot_losses, read_metrics
from deepseek_v4.training.run import Run, digest
from deepseek_v4.training.step import Program, State
from deepseek_v4.training.throughput import Meter, Peak, peak, training_operations

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints in its output directory."""

_PLAIN_SECONDS = 30.0  # between lines where there is no terminal for a progress bar


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far a run came: ``state`` and ``frozen`` before step ``step``; ``interrupted`` names the signal, or is None.

    ``evaluation`` is the last one, if there was any.
    """

    state: State
    frozen: Params
    step: int
    interrupted: str | None
    evaluation: Evaluation | None


class Diverged(ArithmeticError):
    """A run that stopped because of its loss; the message names the last good checkpoint."""


def train(run: Run, console: Console, accept_changes: bool = False) -> Outcome:
    """Trains to the end, or until SIGTERM or Ctrl-C, after which everything is saved.

    Every process of the run calls this. Raises ``Diverged`` when a loss is not finite or jumps (nothing is saved from
    then on), ``ConfigurationError``, ``DataError`` or ``CheckpointError`` if the output directory holds another run.
    """
    config, total = run.config, run.config.total_steps
    shape = run.batch_shape
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(config.output / CHECKPOINTS, config.keep))
        start = checkpoints.latest or 0
        with console.status("restoring the checkpoint" if start else "loading the parameters"):
            if start:
                changes = run.check_continues(checkpoints.meta(start), accept_changes)
                state, frozen, frozen_digest = run.restore(checkpoints, start)
                console.print(f"going on from step {start} of {total} ({checkpoints.path(start)})", highlight=False)
                for line in changes:
                    console.print(f"changed: {line}", style="yellow", markup=False, highlight=False)
            else:
                state, frozen = run.program(0).init_state(run.initial_params(), shape)
                frozen_digest = digest(frozen)
        record = stack.enter_context(Record(run, start, console))
        interruptions = stack.enter_context(Interruptions())

        def save(step: int, state: State) -> None:
            record.read_all()  # raises Divergence before anything is saved that should not be
            if step > (checkpoints.latest or 0):
                checkpoints.save(step, state, run.meta(step, frozen_digest))

        step, interrupted = start, None
        try:
            for step, batch, ahead in _batches(run, start, stack):
                program = run.program(step)
                placed = program.place_batch(batch)
                future = None if ahead is None else program.place_batch(ahead)
                if step == start or program != run.program(step - 1):
                    record.note(_compile(run, program, (state, frozen, placed, future), step))
                if config.eval_every and step % config.eval_every == 0:
                    record.evaluation(step, evaluate_held_out(run, program, state, frozen))
                state, metrics = program.train_step(state, frozen, placed, future)
                record.step(step, metrics)

                step += 1
                interrupted = interruptions.reached(step)
                if interrupted or step % config.checkpoint_every == 0 or step == total:
                    save(step, state)
                if interrupted:
                    break
            if not interrupted and config.eval_every:
                record.evaluation(step, evaluate_held_out(run, run.program(step), state, frozen))
        except Divergence as error:
            raise Diverged(_advice(error, checkpoints)) from error
        finally:
            checkpoints.wait()
        return Outcome(state, frozen, step, interrupted, record.last_evaluation)


def _compile(run: Run, program: Program, arguments: tuple, step: int) -> str:
    """Compiles what ``program`` will run from ``step`` on, in all processes, and says what that took."""
    begin = time.perf_counter()
    memory = Program.train_step.lower(program, *arguments).compile().memory_analysis()
    if run.config.eval_every:
        Program.eval_step.lower(program, *arguments[:3]).compile()
    meet(f"compiled for step {step}")
    said = f"compiled in {time.perf_counter() - begin:.0f} s"
    if memory is None:
        return said
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return f"{said}; a step takes {(kept + memory.temp_size_in_bytes) / 2**30:.2f} GiB per device"


def _batches(run: Run, start: int, stack: ExitStack) -> Iterator[tuple[int, Batch, Batch | None]]:
    """(step, batch, the batch of ``anticipate`` steps later or None) up to the end, made ahead in threads."""
    config, share = run.config, run.share
    total, distance = config.total_steps, config.anticipate
    batches = stack.enter_context(run.data.prefetch(start, total, *share))
    if not distance:
        return ((step, batch, None) for step, batch in batches)
    later = stack.enter_context(run.data.prefetch(start + distance, total + distance, *share))
    return ((step, batch, ahead) for (step, batch), (_, ahead) in zip(batches, later, strict=True))


def evaluate_held_out(run: Run, program: Program, state: State, frozen: Params) -> Evaluation:
    """The held-out documents of the run under ``state``; all of them, or the first ``config.eval_batches``."""
    assert run.data.evaluation is not None
    with run.data.evaluation.prefetch(0, None, *run.share) as batches:
        chosen = itertools.islice(batches, run.config.eval_batches)
        return evaluate((program.place_batch(b) for _, b in chosen), lambda b: program.eval_step(state, frozen, b))


def _advice(error: Divergence, checkpoints: Checkpoints) -> str:
    good = [step for step in checkpoints.steps if step <= error.step]
    if not good:
        return f"training diverged: {error}; there is no checkpoint before it: begin again with a lower learning rate"
    last = checkpoints.path(good[-1])
    text = f"training diverged: {error}\nthe last good checkpoint is {last}"
    if good[-1] == error.step:
        text += ", whose own next loss this is" + (f"; the one before it is {good[-2]}" if len(good) > 1 else "")
    return (
        f"{text}\nto go on from it, change what made training diverge (a lower optimizer.learning_rate, "
        "optimizer.clip_norm, anticipate) and run the same command with --accept-changes; to go back further, delete "
        "the newest checkpoints first"
    )


class Interruptions:
    """SIGTERM (a machine that will be taken away) and Ctrl-C, as requests to stop after the step that is running.

    Among several processes a SIGTERM to any of them reaches all, which stop after the same step: JAX's coordinator
    agrees on it. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def reached(self, step: int) -> str | None:
        """The signal to stop for after ``step`` steps, or None; every process calls it after every step."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        self._restore()  # so that the next one acts as usual
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX's own handler announces to the other processes

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class Record:
    """What is written and shown of a run: metrics.jsonl, TensorBoard, the progress bar, the picture at the end.

    Metrics of a step are read from the device after the next step was handed to it, so that it never waits.
    """

    def __init__(self, run: Run, start: int, console: Console):
        config = run.config
        self._run, self._console, self._main = run, console, is_main()
        history = [line["loss"] for line in read_metrics(config.output) if line["step"] < start and line.get("loss")]
        self._guard = LossGuard(config.max_loss_increase, history)
        self._log = MetricsLog(config.output, start, config.tensorboard) if self._main else None
        self._pending: deque[tuple[int, Mapping[str, jax.Array]]] = deque()
        self._meter = Meter()
        self._peak: Peak | None = peak(config.dtype)
        model = run.model
        self._operations = training_operations(
            model.config,
            config.data.sequence_length,
            draft=bool(model.drafts) and config.objective.mtp_weight > 0,
            weights=model.adapters is None,
        )
        self.last_evaluation: Evaluation | None = None
        self._shown = -_PLAIN_SECONDS
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal and self._main),
        )
        self._task = self._progress.add_task("", total=config.total_steps, completed=start, text="compiling")

    def __enter__(self) -> "Record":
        if self._peak is not None:
            self._say(f"MFU is the share of {self._peak.source}")
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if self._log is not None:
            self._log.close()
            lines = read_metrics(self._run.config.output)
            if any(line.get("loss") is not None for line in lines):
                output = self._run.config.output
                plot_losses({output.name: lines}, output / "loss.png", str(output))

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that has just been handed to the device, and reads those of the step before."""
        self._pending.append((step, metrics))
        while len(self._pending) > 1:
            self._read()

    def read_all(self) -> None:
        """Reads what is left, waiting for the device; raises ``Divergence``."""
        while self._pending:
            self._read()
        self._meter.pause()

    def note(self, text: str) -> None:
        """Shows a line, after what is known of the steps before it."""
        self.read_all()
        self._say(text)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Writes the evaluation of the parameters before ``step``."""
        self.read_all()
        self.last_evaluation = found
        figures = found.figures()
        if self._log is not None:
            self._log.write(step, {f"eval_{name}": value for name, value in figures.items()})
        shown = ("loss", "perplexity", "accuracy", "mtp_loss", "mtp_acceptance")
        self._say(f"step {step}, held out: " + _join({n: f"{figures[n]:.4f}" for n in shown if n in figures}))

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        seconds = self._meter.tick(values["tokens"])
        config = self._run.config
        if self._log is not None and (step % config.log_every == 0 or step + 1 == config.total_steps):
            timed = {} if seconds is None else {"seconds": seconds, "tokens_per_second": values["tokens"] / seconds}
            self._log.write(step, values | timed)
        self._guard.check(step, values["loss"], values["gradient_norm"])
        self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if not self._main:
            return
        text = {"loss": f"{values['loss']:.4f}"}
        if values.get("mtp_loss"):
            text["MTP"] = f"{values['mtp_loss']:.4f}"
        text["busiest expert"] = f"{values['imbalance']:.2f}x"
        rate = self._meter.rate
        if rate is not None:
            text["tokens/s"] = f"{rate:.0f}"
            if self._run.chips > 1:
                text["per chip"] = f"{rate / self._run.chips:.0f}"
            if self._peak is not None:
                text["MFU"] = f"{rate * self._operations / self._peak.operations:.1%}"
        self._progress.update(self._task, completed=step + 1, text=_join(text))
        last = step + 1 == self._run.config.total_steps
        if self._progress.disable and (last or time.monotonic() - self._shown >= _PLAIN_SECONDS):
            self._shown = time.monotonic()
            if rate is not None:
                text["left"] = _duration((self._run.config.total_steps - step - 1) * values["tokens"] / rate)
            self._say(f"step {step + 1}/{self._run.config.total_steps}: {_join(text)}")

    def _say(self, text: str) -> None:
        if self._main:
            self._console.print(text, highlight=False, markup=False)


def _join(items: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
