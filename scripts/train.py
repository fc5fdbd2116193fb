"""Trains a DeepSeek-V4 model: from random weights or a checkpoint, all parameters or adapters, on any mesh.

    python scripts/train.py --config configs/train_default.py
    python scripts/train.py --config configs/finetune_lora.py --model DIR --data.paths chats.jsonl --output runs/mine

The config file defines ``config = TrainConfig(...)``; every field of it can be given on the command line as well
(--config FILE --help lists them). The same command continues a run that was stopped or killed from its newest
checkpoint. SIGTERM and Ctrl-C save and stop. Several processes: give each --distributed where JAX finds the others by
itself (TPU pods, Slurm), else --coordinator HOST:PORT --num-processes N --process-id I.

Exit codes: 0 complete, 1 an error or a diverged loss, 2 a bad command line, 130 Ctrl-C, 143 SIGTERM (run it again).
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from deepseek_v4.distributed import Processes, is_main, start
from deepseek_v4.loading import simulate_devices
from deepseek_v4.planning.pods import with_pod
from deepseek_v4.sharding import describe_mesh
from deepseek_v4.training.export import check_target, export
from deepseek_v4.training.run import Run, open_run
from deepseek_v4.training.run_config import ConfigurationError, TrainConfig, load_config
from deepseek_v4.training.trainer import CHECKPOINTS, train


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a DeepSeek-V4 model."""

    config: Path
    """Python file that defines config = TrainConfig(...)."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)
    accept_changes: bool = False
    """Continue although the config is not the one the run began with."""
    simulate_devices: int | None = None
    """Run on this many simulated CPU devices (in each process)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    console = Console(stderr=True, soft_wrap=True)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = _parse(with_pod(arguments, "train"))
        simulate_devices(args.simulate_devices)
        start(args.processes)
        return _run(args, console)
    except KeyboardInterrupt:
        _complain(console, "stopped at once; the newest checkpoint is what there is")
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        _complain(console, str(error))
    except jax.errors.JaxRuntimeError as error:
        _complain(console, _device_error(args.run, error))
    return 1


def _parse(arguments: list[str]) -> Arguments:
    """The config file first: it gives the defaults of all other arguments."""
    path = next(
        (
            word.partition("=")[2] if "=" in word else (arguments[i + 1] if i + 1 < len(arguments) else "")
            for i, word in enumerate(arguments)
            if word.partition("=")[0] == "--config"
        ),
        None,
    )
    if path is None:
        if not {"--help", "-h"} & set(arguments):
            raise ConfigurationError("--config: missing; give a file such as configs/train_default.py")
        print(__doc__)
        raise SystemExit(0)
    return tyro.cli(Arguments, args=arguments, default=Arguments(Path(path), load_config(path)))


def _run(args: Arguments, console: Console) -> int:
    config = args.run
    with console.status("reading the documents"):
        run = open_run(config)
    check_target(run, complete=(config.output / CHECKPOINTS / str(config.total_steps)).is_dir())
    if not is_main():
        console.quiet = True
    for line in _description(run):
        console.print(line, highlight=False, markup=False)
    for bad in run.data.statistics.bad_reports:
        console.print(f"left out {bad}", style="yellow", markup=False, highlight=False)

    outcome = train(run, console, args.accept_changes)
    if outcome.interrupted:
        console.print(
            f"{outcome.interrupted}: stopped after step {outcome.step} of {config.total_steps}, everything is saved; "
            "the same command continues from there",
            style="yellow",
            highlight=False,
        )
        return 130 if outcome.interrupted == "SIGINT" else 143
    console.print(f"{config.output}: step {outcome.step} of {config.total_steps}, complete", highlight=False)
    if config.export is not None:
        with console.status("exporting"):
            said = export(run, run.program(outcome.step).params(outcome.state, outcome.frozen))
        console.print(said, markup=False, highlight=False)
    return 0


def _description(run: Run) -> list[str]:
    config, placement = run.config, run.model.execution.placement
    mesh = "one device" if placement is None else describe_mesh(placement.mesh.shape)
    what = {"full": "all parameters", "qat": f"all parameters, quantised from step {config.quantise_from}"}
    lines = [
        f"{config.model} ({config.weights} weights), {what.get(config.mode, f'adapters {config.lora}')}",
        f"{jax.devices()[0].device_kind}, {mesh}{', FSDP' if config.fsdp else ''}"
        f"{', expert-parallel' if config.expert_parallel else ''}, {config.dtype}"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        f"training data: {run.data.statistics}; {len(run.data)} steps in an epoch",
    ]
    if run.data.evaluation is not None:
        lines.append(f"held out: {run.data.evaluation.statistics}")
    return lines


def _device_error(config: TrainConfig, error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        return f"the device failed: {error}"
    fsdp = "" if config.fsdp else ", or --fsdp to split parameters and optimizer over the data axis"
    return (
        f"out of memory: {str(error).splitlines()[0]}\n"
        f"the step runs data.batch_size {config.data.batch_size} / accumulate {config.accumulate} rows of "
        f"data.sequence_length {config.data.sequence_length} at a time with remat {config.remat!r}; raise --accumulate "
        f"(same result), choose --remat full, shorten --data.sequence-length, lower --data.batch-size{fsdp}"
    )


def _complain(console: Console, text: str) -> None:
    console.quiet = False
    who = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
    console.print(f"error: {who}{text}", style="red", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
