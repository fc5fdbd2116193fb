"""Sums over held-out batches as the figures people read: perplexity, accuracy, MTP acceptance, load per expert."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import Config
from deepseek_v4.layer_spec import draft_specs, layer_specs
from deepseek_v4.model import Model, Observed, Params
from deepseek_v4.positions import Training
from deepseek_v4.training.losses import cross_entropy, labels


def evaluation_sums(
    model: Model, params: Params, batch: Mapping[str, jax.Array], packed: bool = True
) -> dict[str, jax.Array]:
    """Sums over the targets of ``batch`` (that of ``deepseek_v4.data``), float32, to be added up over batches.

    ``loss_sum`` (nats), ``targets``, ``correct`` (most probable tokens that came), the same of the MTP block with
    ``mtp_``, ``mtp_accepted`` (its most probable token is the model's), and ``load`` as in ``Evaluation``. ``packed``
    says whether rows hold several documents. Weights may be stored in any format.
    """
    draft = bool(model.drafts)
    positions = batch["positions"] if packed else None
    hidden = model.hidden(
        params, batch["tokens"], training=Training(batch["real"], "off"), positions=positions, draft=draft
    )
    following, wanted = labels(batch["tokens"], batch["positions"], batch["targets"])
    head = model.vocabulary(params)
    main = cross_entropy(hidden.main, head, following, wanted, model.execution)
    sums = {"loss_sum": main.loss, "targets": jnp.sum(wanted), "correct": main.correct}
    if hidden.draft is not None:
        drafted = wanted & (batch["positions"] > 0)
        mtp = cross_entropy(hidden.draft, head, following, drafted, model.execution)
        sums |= {"mtp_loss_sum": mtp.loss, "mtp_targets": jnp.sum(drafted), "mtp_correct": mtp.correct}
        sums["mtp_accepted"] = jnp.sum(drafted & (mtp.greedy == main.greedy))
    sums["load"] = _layer_loads(model, hidden.observed)
    return {name: jnp.asarray(value, jnp.float32) for name, value in sums.items()}


def _layer_loads(model: Model, observed: Observed) -> jax.Array:
    """Tokens per expert [layers, E], main layers in their order, then the MTP block if it ran."""
    rows: dict[int, jax.Array] = {}
    for group, members in zip(model.groups, observed["groups"], strict=True):
        for m, seen in enumerate(members):
            rows |= {group.layer_index(repeat, m): seen["load"][repeat] for repeat in range(group.repeats)}
    return jnp.stack([rows[index] for index in sorted(rows)] + [seen["load"] for seen in observed["drafts"]])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model does on documents it was not trained on.

    ``loss`` is the mean cross-entropy in nats per target token, ``accuracy`` the share of targets that are the model's
    first choice; the ``mtp_`` figures are those of the MTP block, whose targets are one token further on (NaN without
    one), and ``mtp_acceptance`` is how often its first choice is the main model's. ``load`` float64 [layers, E]: tokens
    sent to each expert, main layers in order, then MTP blocks.
    """

    loss: float
    accuracy: float
    mtp_loss: float
    mtp_accuracy: float
    mtp_acceptance: float
    targets: int
    load: np.ndarray

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def imbalance(self) -> np.ndarray:
        """[layers]: load of the busiest expert over the mean load."""
        return self.load.max(axis=1) / np.maximum(self.load.mean(axis=1), 1e-30)

    def figures(self) -> dict[str, float]:
        """The numbers by name, without those that there are none of."""
        found = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "mtp_loss": self.mtp_loss,
            "mtp_accuracy": self.mtp_accuracy,
            "mtp_acceptance": self.mtp_acceptance,
            "imbalance": float(self.imbalance.max()),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


def evaluate(
    batches: Iterable[Any], run: Callable[[Any], Mapping[str, jax.Array]], on_batch: Callable[[], None] = lambda: None
) -> Evaluation:
    """Runs ``run`` (``Program.eval_step`` with its state) on every batch and adds up what it returns.

    One batch is on the device while the sums of the one before are read. Raises ``ValueError`` if nothing was to be
    predicted.
    """
    totals: dict[str, np.ndarray] = {}

    def add(sums: Mapping[str, jax.Array]) -> None:
        for name, value in jax.device_get(dict(sums)).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        on_batch()

    before: Mapping[str, jax.Array] | None = None
    for batch in batches:
        now = run(batch)
        if before is not None:
            add(before)
        before = now
    if before is not None:
        add(before)
    if not totals or not totals["targets"]:
        raise ValueError("evaluation: no targets in these documents; a document has at least two tokens, one a target")

    def share(part: str, whole: str) -> float:
        return float(totals[part] / totals[whole]) if totals.get(whole) else math.nan

    return Evaluation(
        loss=share("loss_sum", "targets"),
        accuracy=share("correct", "targets"),
        mtp_loss=share("mtp_loss_sum", "mtp_targets"),
        mtp_accuracy=share("mtp_correct", "mtp_targets"),
        mtp_acceptance=share("mtp_accepted", "mtp_targets"),
        targets=int(totals["targets"]),
        load=totals["load"],
    )


def layer_names(config: Config) -> list[str]:
    """What the rows of ``Evaluation.load`` are."""
    names = [
        f"layer {i}, {spec.kind}{', hash' if spec.hash_router else ''}" for i, spec in enumerate(layer_specs(config))
    ]
    return names + [f"MTP block {i}" for i, _ in enumerate(draft_specs(config))]


def plot_load(load: np.ndarray, names: list[str], path: str | Path, title: str = "") -> None:
    """Draws the load per expert as a heat map, layers down, experts across: 1 is an expert's fair share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, experts = load.shape
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)
    figure = Figure(figsize=(min(16, 4 + 0.12 * experts), 1.5 + 0.28 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(relative, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(layers), names, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="load / mean load")
    figure.savefig(path, dpi=120)
