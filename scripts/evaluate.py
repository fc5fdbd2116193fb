"""Evaluates a checkpoint on documents: perplexity, next-token and MTP accuracy, load per expert.

    python scripts/evaluate.py --checkpoint DIR --input 'texts/*.txt.xz' chats.jsonl --output result.json
    python scripts/evaluate.py --checkpoint runs/mine --input held_out.npy

DIR is a Hugging Face or Orbax directory, or the output directory of scripts/train.py, whose newest checkpoint is taken.
Inputs are what training reads (deepseek_v4/data/sources.py): texts, JSONL of text, chat messages or token ids, arrays.
Of a conversation only the assistant's turns are scored. Documents longer than --sequence-length are cut into pieces
that do not see each other; each is packed into rows exactly as in training, and seen once.

loss and perplexity are per target token; bits_per_byte is the loss in bits over the bytes of the text that targets
stand for (special tokens stand for none); accuracy is the share of targets that are the model's first choice;
mtp_accuracy that of the MTP block, which is one token further from what it has seen, and mtp_acceptance the share of
places where its first choice is the model's own: what speculative decoding would accept.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deepseek_v4.checkpoint.orbax_directory import write_atomically
from deepseek_v4.data import Batch, DataConfig, Dataset, open_data
from deepseek_v4.distributed import Processes, batch_share, is_main, place_rows, start
from deepseek_v4.loading import Parallelism, open_model, simulate_devices
from deepseek_v4.model import Model
from deepseek_v4.tokenizer import Tokenizer
from deepseek_v4.training.checkpoints import Checkpoints
from deepseek_v4.training.evaluation import Evaluation, evaluate, evaluation_sums, layer_names, plot_load
from deepseek_v4.training.run import open_run
from deepseek_v4.training.run_config import TrainConfig, from_json
from deepseek_v4.training.trainer import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a DeepSeek-V4 checkpoint on documents."""

    checkpoint: Path
    """Hugging Face or Orbax directory, or the output directory of a training run."""
    input: tuple[str, ...]
    """Files, directories or patterns of documents."""
    output: Path | None = None
    """JSON file to write the figures and the load per expert to."""
    picture: Path | None = None
    """Image file for the load per expert. Default: beside --output, ending in .png."""
    sequence_length: int = 1024
    """Tokens in a row."""
    batch_size: int = 8
    """Rows that run together; a multiple of the mesh's data axis."""
    format: Literal["auto", "text", "chat", "tokens"] = "auto"
    """What the files hold."""
    separator: str | None = None
    """Splits .txt files into documents. Default: a file is a document."""
    packing: Literal["best_fit", "one_per_row"] = "best_fit"
    """Several documents in a row where they fit, or one."""
    on_bad: Literal["fail", "skip"] = "fail"
    """Whether a document that cannot be used stops everything or is counted and left out."""
    limit_batches: int | None = None
    """Batches to evaluate. Default: all."""
    parallelism: tyro.conf.OmitArgPrefixes[Parallelism] = dataclasses.field(default_factory=Parallelism)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of activations; of a training run, its own."""
    simulate: str = ""
    """Parts of the released quantisation to simulate: any of kv,indexer,activations; of a training run, its own."""
    implementation: Literal["xla"] | None = None
    """xla runs every operation without kernels. Default: the kernels of the chip, where it has them."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)
    simulate_devices: int | None = None
    """Run on this many simulated CPU devices (in each process)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        simulate_devices(args.simulate_devices)
        start(args.processes)
        console.quiet = not is_main()
        _run(args, console)
        return 0
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]; nothing was written")
        return 130
    except (ValueError, OSError) as error:
        _complain(console, str(error))
    except jax.errors.JaxRuntimeError as error:
        _complain(console, f"the device failed: {error}\ntry a smaller --batch-size or --sequence-length")
    return 1


def _complain(console: Console, text: str) -> None:
    console.print(f"error: {text}", style="red", markup=False, highlight=False)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What is evaluated, on what; ``restore`` reads the weights and returns the step that runs a batch."""

    model: Model
    tokenizer: Tokenizer | None
    name: str
    data: Dataset
    restore: Callable[[], Callable[[Batch], dict[str, jax.Array]]]


def _run(args: Arguments, console: Console) -> None:
    if args.limit_batches is not None and args.limit_batches < 1:
        raise ValueError(f"--limit-batches: expected at least 1, found {args.limit_batches}")
    with console.status("reading the documents"):
        opened = _open_run(args) if (args.checkpoint / CHECKPOINTS).is_dir() else _open_checkpoint(args)
    statistics = opened.data.statistics
    console.print(f"{opened.name}\n{statistics}", highlight=False, markup=False)
    for report in statistics.bad_reports:
        console.print(f"left out {report}", style="yellow", markup=False, highlight=False)
    with console.status("restoring the checkpoint"):
        step = opened.restore()
    found = _evaluate(args, opened, step, console)
    size = _target_bytes(args, opened)
    if is_main():
        _report(args, opened, found, size, console)


def _documents(args: Arguments) -> DataConfig:
    return DataConfig(
        paths=args.input,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        format=args.format,
        separator=args.separator,
        packing=args.packing,
        on_bad=args.on_bad,
        shuffle=False,
    )


def _open_checkpoint(args: Arguments) -> _Opened:
    loaded = open_model(
        args.checkpoint,
        dtype=args.dtype,
        simulate=args.simulate,
        parallelism=args.parallelism,
        implementation=args.implementation,
    )
    model, placement = loaded.model, loaded.model.execution.placement
    if placement is not None and args.batch_size % placement.size("batch"):
        raise ValueError(
            f"--batch-size: expected a multiple of {'*'.join(placement.rules.batch)}={placement.size('batch')}, "
            f"found {args.batch_size}"
        )
    config = model.config
    data = open_data(
        _documents(args), loaded.tokenizer, config.vocab_size, config.bos_token_id, config.eos_token_id, one_pass=True
    )

    def restore() -> Callable[[Batch], dict[str, jax.Array]]:
        params = loaded.restore()
        run = jax.jit(evaluation_sums, static_argnums=(0, 3))
        return lambda batch: run(model, params, place_rows(placement, batch), args.packing != "one_per_row")

    return _Opened(model, loaded.tokenizer, f"{args.checkpoint}: {loaded.description}", data, restore)


def _open_run(args: Arguments) -> _Opened:
    checkpoints = Checkpoints(args.checkpoint / CHECKPOINTS, keep=None)
    newest = checkpoints.latest
    if newest is None:
        raise ValueError(f"{args.checkpoint}: a training run that has no complete checkpoint yet")
    saved: TrainConfig = from_json(checkpoints.meta(newest)["config"])
    config = dataclasses.replace(
        saved,
        data=_documents(args),
        eval_every=0,
        accumulate=1,
        anticipate=0,
        fsdp=False,
        **dataclasses.asdict(args.parallelism),
    )
    run = open_run(config, one_pass=True)
    program = run.program(newest)

    def restore() -> Callable[[Batch], dict[str, jax.Array]]:
        state, frozen, _ = run.restore(checkpoints, newest)
        return lambda batch: program.eval_step(state, frozen, program.place_batch(batch))

    return _Opened(program.model, run.tokenizer, f"{args.checkpoint}: step {newest}, {config.dtype}", run.data, restore)


def _batches(args: Arguments, opened: _Opened) -> int:
    return len(opened.data) if args.limit_batches is None else min(len(opened.data), args.limit_batches)


def _evaluate(args: Arguments, opened: _Opened, step: Callable, console: Console) -> Evaluation:
    count = _batches(args, opened)
    share = batch_share(opened.model.execution.placement)
    columns = (TextColumn("evaluating"), BarColumn(), TextColumn("{task.completed}/{task.total} batches"))
    with (
        Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as progress,
        opened.data.prefetch(0, count, *share) as batches,
    ):
        task = progress.add_task("", total=count)
        return evaluate((batch for _, batch in batches), step, lambda: progress.advance(task))


def _target_bytes(args: Arguments, opened: _Opened) -> int | None:
    """Bytes of the text that the targets stand for; None without a tokenizer."""
    if opened.tokenizer is None:
        return None
    config = opened.model.config
    special = {config.bos_token_id, config.eos_token_id}
    sizes = np.array(
        [0 if token in special else len(opened.tokenizer.token_bytes([token])) for token in range(config.vocab_size)]
    )
    total = 0
    for step in range(_batches(args, opened)):
        batch = opened.data.batch(step)
        total += int(sizes[batch["tokens"][batch["targets"] & (batch["positions"] > 0)]].sum())
    return total


def _report(args: Arguments, opened: _Opened, found: Evaluation, size: int | None, console: Console) -> None:
    figures = {"targets": found.targets, **found.figures()}
    if size:
        figures["bits_per_byte"] = found.loss * found.targets / math.log(2) / size
    table = Table("figure", "value", title=str(args.checkpoint))
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)
    names = layer_names(opened.model.config)
    picture = args.picture or (None if args.output is None else args.output.with_suffix(".png"))
    if args.output is not None:
        load = dict(zip(names, found.load.tolist(), strict=True))
        result = {"checkpoint": str(args.checkpoint), "input": list(args.input), **figures, "load": load}
        write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())
        console.print(f"wrote {args.output}", highlight=False)
    if picture is not None:
        plot_load(found.load, names, picture, f"{args.checkpoint}: load per expert")
        console.print(f"wrote {picture}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
