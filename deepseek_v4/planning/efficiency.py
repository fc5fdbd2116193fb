"""The published efficiency figures, computed: operations and cache per token from 1K to 1M tokens, and parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_v4.config import Config
from deepseek_v4.layer_spec import draft_specs
from deepseek_v4.model import Model
from deepseek_v4.nn.variables import MASTER, Weight
from deepseek_v4.parameters import flatten, is_spec
from deepseek_v4.planning.cache_bytes import bytes_per_token, cache_bytes, v32_bytes_per_token
from deepseek_v4.planning.flops import V32, WEIGHTS, Term, equivalent_operations, token_terms

CONTEXTS = tuple(1 << power for power in range(10, 21))
"""1K to 1M tokens."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """How products are weighed: ``weights`` as in ``Term.equivalent``, ``activations`` by term name where changed."""

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: WEIGHTS)
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def apply(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """The terms with the activation formats that this precision changes."""
        return tuple(
            dataclasses.replace(t, activation=self.activations[t.name]) if t.name in self.activations else t
            for t in terms
        )

    def operations(self, terms: Sequence[Term]) -> float:
        """Equivalent FP8 operations of the terms."""
        return equivalent_operations(self.apply(terms), self.weights)


_COMPRESSORS = ("CSA compressor", "HCA compressor", "indexer compressor")

VARIANTS: Mapping[str, Precision] = {
    "wider operand decides (default)": Precision(),
    "FP8 x FP4 at 0.75 (hardware that may come)": Precision({**WEIGHTS, "fp8*fp4": 0.75}),
    "FP8 x FP4 at 0.5": Precision({**WEIGHTS, "fp8*fp4": 0.5}),
    "compressors in BF16": Precision(activations=dict.fromkeys(_COMPRESSORS, "bf16")),
    "wo_a in BF16, as the reference code runs it": Precision(activations={"attn.wo_a": "bf16"}),
    "head in FP32": Precision(activations={"head": "fp32"}),
    "FP8 x FP4 at 0.5, wo_a in BF16, head in FP32": Precision(
        {**WEIGHTS, "fp8*fp4": 0.5}, {"attn.wo_a": "bf16", "head": "fp32"}
    ),
}
"""Other readings of "equivalent FP8", to show what the published ratios depend on.

The paper gives ratios and not how it weighs products. The default reading, in which FP8 activations times FP4 weights
run at the FP8 rate (as they do on the hardware there is), gives the four published ratios to their last printed digit.
No other reading here gives both 9.8x and 3.7x.
"""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of a model without its draft layers; ``active`` are those that multiply a token (no embedding)."""

    total: int
    active: int


def count_parameters(config: Config) -> Parameters:
    """Counted from the descriptions that the model is built from, in the storage without scales."""
    specs = Model(config, MASTER).parameter_specs()
    leaves = [spec for spec in jax.tree.leaves(specs, is_leaf=is_spec) if spec.kind is Weight]
    drafts = [spec for block in specs["drafts"] for spec in flatten(block).values() if spec.kind is Weight]
    total = sum(math.prod(s.shape) for s in leaves) - sum(math.prod(s.shape) for s in drafts)
    experts = sum(math.prod(s.shape) for s in leaves if s.role == "expert")
    experts -= sum(math.prod(s.shape) for s in drafts if s.role == "expert")
    idle = experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return Parameters(total, total - idle - config.vocab_size * config.hidden_size)


def curves(
    configs: Mapping[str, Config], contexts: Sequence[int] = CONTEXTS, precision: Precision | None = None
) -> dict[str, dict[str, list[float]]]:
    """Per model ("V3.2" and the names of ``configs``): equivalent FP8 "operations" of a token and "cache" bytes.

    The cache is that of one sequence in the published format, window and unfinished windows included.
    """
    precision = precision or Precision()
    reference = V32()
    found = {
        "V3.2": {
            "operations": [precision.operations(reference.token_terms(t)) for t in contexts],
            "cache": [float(v32_bytes_per_token(reference) * t) for t in contexts],
        }
    }
    for name, config in configs.items():
        found[name] = {
            "operations": [precision.operations(token_terms(config, t)) for t in contexts],
            "cache": [float(sum(cache_bytes(config, t).values())) for t in contexts],
        }
    return found


def ratios(config: Config, context: int = 1 << 20, precision: Precision | None = None) -> dict[str, float]:
    """Operations and cache bytes per token of context relative to V3.2, and the figures they come from."""
    precision = precision or Precision()
    reference = V32()
    ours = precision.operations(token_terms(config, context))
    theirs = precision.operations(reference.token_terms(context))
    cache = bytes_per_token(config)
    return {
        "operations": ours,
        "operations of V3.2": theirs,
        "operations ratio": ours / theirs,
        "cache": cache,
        "cache of V3.2": v32_bytes_per_token(reference),
        "cache ratio": cache / v32_bytes_per_token(reference),
    }


def compare_with_program(config: Config, context: int) -> list[tuple[str, int, int]]:
    """(what, listed, found in our own program) of one decode step with its draft, traced at full size.

    Products are counted in the trace of ``Model.forward`` on one row whose cache holds ``context`` tokens; cache bytes
    are those of ``Model.abstract_cache``.
    """
    import functools

    import jax.numpy as jnp

    from deepseek_v4.execution import Execution
    from deepseek_v4.planning.cache_bytes import model_cache_bytes
    from deepseek_v4.planning.lowered import dot_operations

    model = Model(config, execution=Execution(implementation="xla", entry_layout="plain"))
    cache = model.abstract_cache(1, context)
    draft = bool(draft_specs(config))
    step = functools.partial(model.forward, last_only=True, draft=draft)
    dots = dot_operations(step, model.abstract_params(), jax.ShapeDtypeStruct((1, 1), jnp.int32), cache)
    listed = sum(term.operations for term in token_terms(config, context, draft=draft))
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return [
        ("operations of a token", listed, dots.total()),
        ("bytes of its cache", model_cache_bytes(config, 1, context), kept),
    ]


def picture(found: Mapping[str, Mapping[str, Sequence[float]]], contexts: Sequence[int], path: str) -> None:
    """Draws operations per token and cache size over context, one line per model, to an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, key, scale, label in (
        (panels[0], "operations", 1e12, "TFLOPs per token, equivalent FP8"),
        (panels[1], "cache", 1e9, "KV cache of one sequence (GB)"),
    ):
        for name, lines in found.items():
            less = found["V3.2"][key][-1] / lines[key][-1]
            text = name if name == "V3.2" else f"{name}: {less:.1f}x less"
            axes.plot([t / 1024 for t in contexts], [v / scale for v in lines[key]], "o-", ms=3, label=text)
        axes.legend()
        axes.set_xlabel("context (K tokens)")
        axes.set_title(label)
        axes.set_xlim(0, contexts[-1] / 1024 * 1.02)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def as_json(configs: Mapping[str, Config], contexts: Sequence[int], precision: Precision) -> dict[str, Any]:
    """Everything ``scripts/efficiency.py`` prints, as data."""
    return {
        "contexts": list(contexts),
        "curves": curves(configs, contexts, precision),
        "ratios": {name: ratios(config, contexts[-1], precision) for name, config in configs.items()},
        "parameters": {name: dataclasses.asdict(count_parameters(config)) for name, config in configs.items()},
        "terms": {
            name: [dataclasses.asdict(t) for t in precision.apply(terms)]
            for name, terms in {
                "V3.2": V32().token_terms(contexts[-1]),
                **{name: token_terms(config, contexts[-1]) for name, config in configs.items()},
            }.items()
        },
    }
