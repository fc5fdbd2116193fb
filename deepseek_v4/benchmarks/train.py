"""Training beside transformers: the same checkpoint, the same batch, AdamW, float32, on this machine's CPU.

Each side runs in a process of its own, so that its peak memory is its own. Both do one forward and backward pass and
one AdamW step of all parameters per step; ours without what transformers does not have (MTP, balance and index losses).
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "default"


@dataclasses.dataclass(frozen=True)
class TrainBenchmark:
    """Tokens per second and peak memory of training steps, beside transformers where it is installed."""

    checkpoint: Path = _DEFAULT
    """Hugging Face directory of a small model."""
    rows: int = 4
    """Sequences in a batch."""
    length: int = 512
    """Tokens in a sequence."""
    steps: int = 5
    """Steps that are timed, after one that is not; the fastest counts."""
    learning_rate: float = 1e-4
    """Of AdamW on both sides."""
    unroll: int = 1
    """Layers of a kind that ours compiles in a row, as scripts/train.py --unroll."""
    json: Path | None = None
    """Write the figures to this file too."""


def run(args: TrainBenchmark, console: Console) -> int:
    """Measures both sides one after the other and prints them; returns the exit code."""
    for name in ("rows", "length", "steps", "unroll"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, found {getattr(args, name)}")
    found: dict[str, dict[str, Any]] = {}
    for side in ("ours", "transformers"):
        with console.status(f"measuring {side}"):
            command = [sys.executable, "-m", "deepseek_v4.benchmarks.train", side, str(args.checkpoint)]
            command += [str(args.rows), str(args.length), str(args.steps), str(args.learning_rate), str(args.unroll)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            console.print(f"{side} failed: {reason}", style="yellow", markup=False, highlight=False)
            if side == "ours":
                return 1
            continue
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    ours = found["ours"]
    table = Table(title=f"Training step, {args.rows} x {args.length} tokens, float32, AdamW, measured on this CPU")
    for column in ("", "tokens/s", "seconds per step", "peak memory", "share of ceiling", "loss, first and last"):
        table.add_column(column, justify="right" if column else "left")
    for side, figures in found.items():
        rate = args.rows * args.length / figures["seconds"]
        table.add_row(
            side,
            f"{rate:,.0f}",
            f"{figures['seconds']:.2f}",
            f"{figures['peak_bytes'] / 2**30:.2f} GiB",
            f"{ours['operations'] / figures['seconds'] / ours['ceiling']:.0%}",
            f"{figures['losses'][0]:.4f}, {figures['losses'][-1]:.4f}",
        )
    console.print(table)
    console.print(
        f"{ours['operations'] / 1e9:.1f} GFLOP of matrix products per step (forward and backward, nothing recomputed "
        f"counted); ceiling {ours['ceiling'] / 1e9:.0f} GFLOP/s, float32 matmuls measured in the same run",
        highlight=False,
    )
    if "transformers" in found:
        ratio = found["transformers"]["seconds"] / ours["seconds"]
        console.print(f"[bold]{ratio:.1f}x[/] the tokens per second of transformers", highlight=False)
    if args.json is not None:
        args.json.write_text(json.dumps({**dataclasses.asdict(args), "found": found}, indent=1, default=str) + "\n")
    return 0


def _tokens(vocab_size: int, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab_size, (rows, length)).astype(np.int32)


def _ours(directory: str, rows: int, length: int, steps: int, learning_rate: float, unroll: int) -> dict[str, Any]:
    import jax

    from deepseek_v4 import Execution, Model
    from deepseek_v4.checkpoint import open_checkpoint
    from deepseek_v4.nn.variables import MASTER
    from deepseek_v4.training.masters import to_masters
    from deepseek_v4.training.optimizer import OptimizerConfig
    from deepseek_v4.training.step import Objective, Program
    from deepseek_v4.training.throughput import peak, training_operations

    jax.config.update("jax_platforms", "cpu")
    checkpoint = open_checkpoint(directory)
    stored = Model(checkpoint.config, checkpoint.storage, Execution("float32"))
    model = Model(checkpoint.config, MASTER, Execution("float32", unroll=unroll))
    rate = OptimizerConfig(
        name="adamw",
        learning_rate=learning_rate,
        final_learning_rate=learning_rate,
        warmup_steps=0,
        decay_start=steps + 1,
        total_steps=steps + 1,
    )
    objective = Objective(mtp_weight=0, mtp_weight_decay=0, balance_weight=0, bias_rate=0)
    program = Program(model=model, optimizer=rate, objective=objective, packed=False)
    state, frozen = program.init_state(to_masters(checkpoint.load(stored), model), (rows, length))
    everything = np.ones((rows, length), bool)
    batch = program.place_batch(
        {
            "tokens": _tokens(model.config.vocab_size, rows, length),
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "targets": everything,
            "real": everything,
        }
    )
    ceiling = peak("float32")
    assert ceiling is not None
    losses, seconds = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = program.train_step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": min(seconds[1:]),
        "losses": losses,
        "operations": training_operations(model.config, length, draft=False) * rows * length,
        "ceiling": ceiling.operations,
    }


def _transformers(directory: str, rows: int, length: int, steps: int, learning_rate: float, _) -> dict[str, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).float()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.tensor(_tokens(model.config.vocab_size, rows, length)).long()
    losses, seconds = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds[1:]), "losses": losses}


def _side(name: str, directory: str, rows: str, length: str, steps: str, learning_rate: str, unroll: str) -> None:
    side = {"ours": _ours, "transformers": _transformers}[name]
    figures = side(directory, int(rows), int(length), int(steps), float(learning_rate), int(unroll))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**figures, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    _side(*sys.argv[1:])
