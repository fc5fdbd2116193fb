"""The record of a run: a line of JSON per logged step, TensorBoard beside it, and a picture at the end."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_v4.checkpoint.orbax_directory import write_atomically

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to ``directory``/metrics.jsonl and, if asked for, to ``directory``/tensorboard.

    ``first_step`` is the step a run goes on from: lines of it and later ones, which a killed run wrote after its last
    checkpoint, are dropped, because they will be written again. Values that JSON has no number for (a loss that is not
    finite) are written as null. Only one process of a run may have one.
    """

    def __init__(self, directory: Path, first_step: int, tensorboard: bool):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE
        kept = [line for line in read_metrics(directory) if line["step"] < first_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step, and the values by name."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics so far; a last line cut short by a kill is left out."""
    path = Path(directory) / FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Divergence(ArithmeticError):
    """Training went wrong at ``step``: a loss or gradient that is not finite, or far above the losses before it."""

    def __init__(self, step: int, message: str):
        self.step = step
        super().__init__(f"step {step}: {message}")


class LossGuard:
    """Stops a run whose loss is not finite or jumps by more than ``max_increase`` nats over its recent median.

    The median is over the last ``window`` losses, once there are ``warmup`` of them; ``history`` are those of a run
    that goes on. ``max_increase`` None stops only for what is not finite.
    """

    def __init__(
        self, max_increase: float | None, history: Sequence[float] = (), *, window: int = 100, warmup: int = 20
    ):
        self.max_increase = max_increase
        self._recent: deque[float] = deque(history, maxlen=window)
        self._warmup = warmup

    def check(self, step: int, loss: float, gradient_norm: float) -> None:
        """Raises ``Divergence`` saying what was found at which step."""
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            raise Divergence(step, f"loss {loss}, gradient norm {gradient_norm}")
        if self.max_increase is not None and len(self._recent) >= self._warmup:
            median = statistics.median(self._recent)
            if loss > median + self.max_increase:
                raise Divergence(
                    step,
                    f"loss {loss:.4f} is more than {self.max_increase} above the median {median:.4f} "
                    f"of the {len(self._recent)} steps before it",
                )
        self._recent.append(loss)


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "") -> None:
    """Draws training and held-out loss over steps, one colour per run, to an image file.

    ``runs`` maps a label to the lines of ``read_metrics``. The bold line is a running mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, lines) in enumerate(runs.items()):
        color = f"C{number}"
        trained, held_out = (
            [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            for name in ("loss", "eval_loss")
        )
        if trained:
            steps, losses = zip(*trained, strict=True)
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(losses), color=color, label=f"{label}, training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=3, label=f"{label}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over the last twentieth of a run, at most 20 values."""
    span = min(20, max(1, len(values) // 20))
    return [statistics.fmean(values[max(0, i + 1 - span) : i + 1]) for i in range(len(values))]
