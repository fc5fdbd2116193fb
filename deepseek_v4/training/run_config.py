"""Everything that decides a training run, as one frozen value: what scripts/train.py reads from a config file.

    config = TrainConfig(output=Path("runs/mine"), model=Path("configs/default"), weights="random", ...)

A config file is a short Python file that defines ``config``; see configs/train_default.py.
"""

import dataclasses
import runpy
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepseek_v4.adapters import LoRA
from deepseek_v4.data import DataConfig
from deepseek_v4.dispatch import Precision
from deepseek_v4.execution import SIMULATIONS
from deepseek_v4.nn.variables import RELEASED, Storage
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.step import Objective


class ConfigurationError(ValueError):
    """A training configuration that cannot be run; the message says which field, what was expected and found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Raises ``ConfigurationError`` for values that no model or machine could make sense of."""

    output: Path
    """Directory of the run: checkpoints, metrics.jsonl, tensorboard, loss.png. If it has checkpoints, they continue."""
    model: Path
    """Directory with config.json and tokenizer.json, and with weights to begin with (Hugging Face or Orbax)."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """Begin with the weights in the model's directory, or with random ones of its config.json."""
    mode: Literal["full", "qat", "lora"] = "full"
    """Train float32 masters; masters that are used as they will be stored; or adapters beside stored weights."""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    """Which linears get adapters, in mode lora."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained: embed, attn, ffn.experts, layers.3, mtp, *.norm*."""
    only: tuple[str, ...] = ()
    """Patterns of the only parameters that are trained. Default: all, or in mode lora the adapters."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of activations; masters, optimizer and losses are float32."""
    simulate: tuple[Literal["kv", "indexer", "activations"], ...] = ()
    """Parts of the released activation quantisation to train with; in mode qat from quantise_from on."""
    quantise: Storage = RELEASED
    """The storage that mode qat trains for."""
    quantise_from: int = 0
    """The step from which on mode qat quantises; before it, training is that of mode full."""
    implementation: Literal["xla"] | None = None
    """xla runs every operation without kernels. Default: the kernels of the chip, where it has them."""

    optimizer: OptimizerConfig
    """Muon or AdamW, and its schedule."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """The losses and their weights."""
    data: DataConfig
    """The documents, and how they become batches."""

    mesh: str | None = None
    """For example data=4,expert=2,tensor=1. Default: all devices along data."""
    fsdp: bool = False
    """Split parameters and optimizer state over the axes of the batch too, and gather them layer by layer."""
    expert_parallel: bool = False
    """Split the batch over the expert axis too: attention is not repeated there, tokens travel to their experts."""
    expert_precision: Precision = "exact"
    """With expert_parallel: fp8 sends tokens in FP8, and gradients of what experts say in the arithmetic's dtype;
    fp8-bfloat16 gets bfloat16 results back instead of float32. Few tokens of a group are sent as they are."""
    accumulate: int = 1
    """Pieces that a batch is run in, one after the other, to save memory."""
    remat: Literal["none", "experts", "full"] = "none"
    """What is computed again in the backward pass to save memory: nothing, all but the expert matmuls, all."""
    unroll: int = 1
    """Layers of a kind that are compiled in a row: faster steps, longer compilation. 1: a loop over single ones."""
    anticipate: int = 0
    """Route with the parameters of so many steps ago, against loss spikes."""

    steps: int | None = None
    """Steps until the run is complete. Default: the optimizer's total_steps."""
    eval_every: int = 0
    """Steps between evaluations of the held-out documents, the first before training; 0: never."""
    eval_batches: int | None = None
    """Batches of an evaluation. Default: all."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints that are kept."""
    max_loss_increase: float | None = 3.0
    """Stop when a loss is so many nats above the median of the last 100; without it only when it is not finite."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too."""
    seed: int = 0
    """Decides random weights and adapters; data.seed decides the order of the documents."""

    export: Path | None = None
    """Directory for the trained model: Hugging Face layout with tokenizer; in mode lora the adapters alone."""
    export_storage: Storage = RELEASED
    """Formats of the exported weights of modes full and qat."""

    def __post_init__(self) -> None:
        for name in ("output", "model", "export"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("freeze", "only", "simulate"):
            if isinstance(getattr(self, name), str):
                raise ConfigurationError(f"{name}: expected a tuple of strings, found {getattr(self, name)!r}")
        for name, hint in typing.get_type_hints(TrainConfig).items():
            choices = [c for part in _parts(hint) if typing.get_origin(part) is Literal for c in typing.get_args(part)]
            if choices and getattr(self, name) not in (*choices, *((None,) if type(None) in _parts(hint) else ())):
                raise ConfigurationError(f"{name}: expected one of {choices}, found {getattr(self, name)!r}")
        unknown = sorted(set(self.simulate) - set(SIMULATIONS))
        if unknown:
            raise ConfigurationError(f"simulate: unknown {unknown}, expected any of {list(SIMULATIONS)}")
        for name, least in (
            ("quantise_from", 0),
            ("accumulate", 1),
            ("anticipate", 0),
            ("eval_every", 0),
            ("checkpoint_every", 1),
            ("keep", 1),
            ("log_every", 1),
            ("seed", 0),
            ("steps", 1),
            ("eval_batches", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name}: expected at least {least}, found {value}")
        if self.total_steps < 1:
            raise ConfigurationError(f"optimizer.total_steps: expected at least 1, found {self.total_steps}")
        if self.max_loss_increase is not None and not self.max_loss_increase > 0:
            raise ConfigurationError(f"max_loss_increase: expected above 0 nats, found {self.max_loss_increase}")
        if self.expert_precision != "exact" and not self.expert_parallel:
            raise ConfigurationError(
                f"expert_precision: {self.expert_precision!r} is for rows that travel; set expert_parallel"
            )
        if self.mode == "qat" and not self.quantise_from < self.total_steps:
            raise ConfigurationError(
                f"quantise_from: expected a step below {self.total_steps}, the end of the run, found "
                f"{self.quantise_from}; for training without quantisation set mode 'full'"
            )
        if self.mode == "qat" and (self.export_storage != self.quantise and self.export is not None):
            raise ConfigurationError(
                f"export_storage: the run is trained for {self.quantise}, found {self.export_storage}; give the same"
            )
        if self.mode != "qat" and self.quantise_from:
            raise ConfigurationError(f"quantise_from: only mode 'qat' quantises, found mode {self.mode!r}")
        if self.mode == "lora" and self.weights == "random":
            raise ConfigurationError("weights: mode 'lora' trains beside the weights of a checkpoint, found 'random'")
        if self.eval_every and not (self.data.holdout or self.data.evaluation_paths):
            raise ConfigurationError(
                "eval_every: there is nothing to evaluate; set data.holdout or data.evaluation_paths, or eval_every 0"
            )
        if self.data.batch_size % self.accumulate:
            raise ConfigurationError(
                f"accumulate: expected a divisor of data.batch_size {self.data.batch_size}, found {self.accumulate}"
            )

    @property
    def total_steps(self) -> int:
        """The step at which the run is complete."""
        return self.optimizer.total_steps if self.steps is None else self.steps


def load_config(path: str | Path) -> TrainConfig:
    """The ``config`` that a Python file defines; raises ``ConfigurationError`` saying what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such file; expected a Python file that defines config = TrainConfig(...)")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # whatever the file does
        raise ConfigurationError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigurationError(f"{path}: expected config = TrainConfig(...), found {type(config).__name__}")
    return config


# --- as JSON, in checkpoints ------------------------------------------------------------------------------------------

# What may differ between the parts of a run. Data are compared by their own state, the model by what it holds.
_FREE = frozenset(
    [
        "output",
        "model",
        "data",
        "steps",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep",
        "max_loss_increase",
        "log_every",
        "tensorboard",
        "export",
        "export_storage",
    ]
)
_ROUNDING = frozenset(["mesh", "fsdp", "expert_parallel", "accumulate", "remat", "unroll", "implementation"])


def to_json(value: Any) -> Any:
    """A config, or a part of one, as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(data: Mapping[str, Any], kind: Any = TrainConfig) -> Any:
    """The inverse of ``to_json``; raises ``ConfigurationError`` for fields that this version does not know."""
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise ConfigurationError(f"{kind.__name__}: unknown fields {unknown}; was it saved by another version?")
    return kind(**{name: _decode(hints[name], value) for name, value in data.items()})


def _decode(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    (*_, kind) = [part for part in _parts(hint) if part is not type(None)]
    if dataclasses.is_dataclass(kind):
        return from_json(value, kind)
    if kind is Path:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def differences(saved: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs between the ``to_json`` of a run so far and ``config``: what would alter the run, and what merely
    rounds differently. One line each."""
    before, now = (_flatten(to_json(one)) for one in (from_json(saved), config))
    lines: tuple[list[str], list[str]] = ([], [])
    for name in sorted(before.keys() | now.keys()):
        field = name.partition(".")[0]
        if before.get(name) == now.get(name) or field in _FREE:
            continue
        lines[field in _ROUNDING].append(f"{name}: {before.get(name)!r} so far, {now.get(name)!r} now")
    return lines


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
