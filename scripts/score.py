"""Scores token sequences with a DeepSeek-V4 checkpoint: logits and log-probabilities of every position.

    python scripts/score.py --checkpoint DIR --input tokens.jsonl --output out.npz --mtp --dtype float32

Input lines are those of scripts/generate.py, usually {"token_ids": [...]}. The output is a NumPy archive with, for row
i of S tokens, ``logits_{i}`` float32 [S, vocab] (row t predicts token t + 1), ``logprobs_{i}`` float32 [S - 1] (of
token t + 1 given 0 .. t) and with --mtp ``mtp_logits_{i}`` float32 [S - 1, vocab] (row t, from tokens 0 .. t + 1 by
the MTP block, predicts token t + 2). It appears under its name only when it is complete.
"""

import dataclasses
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek_v4.loading import Parallelism, open_model, simulate_devices
from deepseek_v4.requests import RequestError, check_context, parse_line, read_lines
from deepseek_v4.scoring import score


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Score token sequences with a DeepSeek-V4 checkpoint."""

    checkpoint: Path
    """Hugging Face directory, or Orbax directory made by scripts/convert_checkpoint.py."""
    input: Path
    """JSONL of sequences: token_ids, prompt, or messages."""
    output: Path
    """NumPy archive (.npz) to write."""
    mtp: bool = False
    """Also the logits of the MTP block."""
    parallelism: tyro.conf.OmitArgPrefixes[Parallelism] = dataclasses.field(default_factory=Parallelism)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of activations."""
    simulate: str = ""
    """Parts of the released quantisation to simulate: any of kv,indexer,activations."""
    implementation: Literal["xla"] | None = None
    """xla runs every operation without kernels. Default: the kernels of the chip, where it has them."""
    prefill_chunk: int = 512
    """Tokens per sequence and call."""
    batch_size: int = 1
    """Sequences that run together; rounded up to a multiple of the mesh's data axis."""
    simulate_devices: int | None = None
    """Run on this many simulated CPU devices."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = tyro.cli(Arguments, args=arguments)
    console = Console(stderr=True, soft_wrap=True)
    try:
        for name in ("prefill_chunk", "batch_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
        simulate_devices(args.simulate_devices)
        _run(args, console)
        return 0
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]; nothing was written")
        return 130
    except (ValueError, OSError) as error:
        _complain(console, str(error))
    except jax.errors.JaxRuntimeError as error:
        _complain(console, f"the device failed: {error}\ntry a smaller --batch-size or --prefill-chunk")
    return 1


def _complain(console: Console, text: str) -> None:
    console.print(f"error: {text}", style="red", markup=False, highlight=False)


def _run(args: Arguments, console: Console) -> None:
    lines = read_lines(args.input)
    loaded = open_model(
        args.checkpoint,
        dtype=args.dtype,
        simulate=args.simulate,
        parallelism=args.parallelism,
        implementation=args.implementation,
    )
    config = loaded.model.config
    sequences, errors = [], []
    for line in lines:
        try:
            tokens = parse_line(line.text, config.vocab_size, loaded.tokenizer).token_ids
            check_context(len(tokens), 0, config.max_position_embeddings)
            sequences.append(tokens)
        except RequestError as error:
            errors.append(f"{args.input}:{line.number}: {error}")
    if errors:
        raise RequestError("\n".join(errors))
    if args.mtp and not loaded.model.drafts:
        raise ValueError(f"{args.checkpoint}: has no MTP block that can run; leave out --mtp")
    with console.status("restoring the checkpoint"):
        params = jax.block_until_ready(loaded.restore())
    console.print(loaded.description, highlight=False)

    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}.tmp")
    try:
        with _progress(console) as progress, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            task = progress.add_task("scoring", total=sum(map(len, sequences)), rate="-")
            done, begin = 0, time.perf_counter()
            scores = score(
                loaded.model,
                params,
                sequences,
                batch_size=args.batch_size,
                prefill_chunk=args.prefill_chunk,
                mtp=args.mtp,
            )
            for index, row in enumerate(scores):
                _write_array(archive, f"logits_{index}", row.logits)
                _write_array(archive, f"logprobs_{index}", row.logprobs)
                if row.mtp_logits is not None:
                    _write_array(archive, f"mtp_logits_{index}", row.mtp_logits)
                done += len(sequences[index])
                rate = done / (time.perf_counter() - begin) / loaded.chips
                progress.update(task, completed=done, rate=f"{rate:.1f}")
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    console.print(f"wrote {args.output}: {len(sequences)} sequences", highlight=False)


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array, np.float32), allow_pickle=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens, {task.fields[rate]} per second and chip"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    sys.exit(main())
