"""Draws the losses of training runs on one plot.

    python scripts/plot_runs.py runs/default runs/default-adamw --output docs/training.png --title "Muon and AdamW"

A run is the output directory of scripts/train.py, or a metrics.jsonl; its label is the directory's name.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from deepseek_v4.training.metrics import FILE, plot_losses, read_metrics


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw the losses of training runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Output directories of scripts/train.py."""
    output: Path
    """Image file to write."""
    title: str = ""
    """What stands above the plot."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    found = {}
    for run in args.runs:
        directory = run.parent if run.name == FILE else run
        lines = read_metrics(directory)
        if not lines:
            Console(stderr=True).print(f"error: {directory / FILE}: missing or empty", style="red", markup=False)
            return 1
        found[directory.name] = lines
    plot_losses(found, args.output, args.title)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
