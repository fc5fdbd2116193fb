"""Runs of scripts/train.py in processes of their own, as a user has them, on a tiny model and made-up documents."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_models import small_config

ROOT = Path(__file__).resolve().parents[1]

# A hash-routed layer with an indexer and an MTP block: little to compile, and frozen, moving and trained parameters.
# Sizes divide over two devices along every axis.
CONFIG = small_config((4,), num_hash_layers=1, hidden_size=128, swiglu_limit=10.0, index_topk=8, hc_sinkhorn_iters=5)

TIMINGS = ("seconds", "tokens_per_second")


def write_model(directory: Path) -> Path:
    """A directory with config.json alone, for random weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return directory


def write_documents(path: Path, count: int = 60, seed: int = 0, shift: int = 3) -> Path:
    """Token ids of documents of 10 to 120 tokens in which each token follows from the one before, mostly."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in rng.integers(10, 120, count):
        tokens = [0, int(rng.integers(2, 256))]
        while len(tokens) < length:
            tokens.append((tokens[-1] * 5 + shift) % 254 + 2 if rng.random() < 0.9 else int(rng.integers(2, 256)))
        documents.append({"token_ids": tokens})
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


CONFIG_FILE = """
from pathlib import Path
from deepseek_v4.data import DataConfig
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.run_config import TrainConfig

HERE = Path(__file__).parent
config = TrainConfig(
    output=HERE / "run", model=HERE / "model", weights="random", dtype="float32", tensorboard=False,
    optimizer=OptimizerConfig(
        learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=2, decay_start=6, total_steps=10
    ),
    data=DataConfig(
        paths=(str(HERE / "documents.jsonl"),), evaluation_paths=(str(HERE / "held_out.jsonl"),),
        sequence_length=128, batch_size=8,
    ),
    eval_every=4, eval_batches=1, checkpoint_every=3,
)
"""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """A directory with a config, and the compiled programs that its runs share."""

    directory: Path
    flags: str = ""
    """Of XLA."""

    @property
    def config(self) -> Path:
        return self.directory / "config.py"

    def command(self, *arguments: str, script: str = "train") -> list[str]:
        words = [] if script != "train" else ["--config", str(self.config)]
        return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": self.flags,
            # Compiled once for all runs.
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }

    def start(self, *arguments: str, script: str = "train") -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments, script=script),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, script: str = "train", code: int = 0) -> str:
        """What a run says, after checking its exit code."""
        process = self.start(*arguments, script=script)
        out, err = process.communicate(timeout=1800)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err


def workplace(directory: Path, flags: str = "") -> Workplace:
    """A new one, with the tiny model and documents."""
    write_model(directory / "model")
    write_documents(directory / "documents.jsonl")
    write_documents(directory / "held_out.jsonl", 12, seed=1)
    (directory / "config.py").write_text(CONFIG_FILE)
    return Workplace(directory, flags)


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def losses(output: Path, name: str = "loss") -> list[float]:
    """A metric by step."""
    return [line[name] for line in metrics(output) if name in line]


def wait_for_steps(process: subprocess.Popen, output: Path, count: int) -> None:
    """Returns when a run has written so many steps."""
    file = output / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.read_text().count('"loss"') >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before step {count}:\n{process.communicate()}")


def files(directory: Path) -> dict[str, bytes]:
    """The contents of all files below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


__all__: Sequence[str] = ("CONFIG", "Workplace", "files", "losses", "metrics", "wait_for_steps", "workplace")
