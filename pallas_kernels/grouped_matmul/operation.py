"""The declaration of ``expert_mlp`` and its gradient: shapes, costs, fallback rules (``pallas_kernels.registry``)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.dispatch import MOST_ROWS
from pallas_kernels.grouped_matmul import (
    expert_mlp,
    expert_mlp_gradient,
    expert_mlp_weight_gradient,
    gpu,
    tpu,
    tpu_backward,
    tpu_weight_gradient,
)
from pallas_kernels.grouped_matmul.blocks import most_blocks
from pallas_kernels.grouped_matmul.cost import (
    expert_mlp_cost,
    expert_mlp_gradient_cost,
    expert_mlp_weight_gradient_cost,
    kept_row_bytes,
)
from pallas_kernels.grouped_matmul.unserved import unserved_weights
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape
from pallas_kernels.targets import Chip

_CI = {
    "flash/fp4/decode/64",
    "flash/fp4/prefill/2048",
    "flash/fp8/decode/64/16-experts",
    "pro/fp4/decode/256",
    "flash/fp4/train/4096/16-experts",
    "pro/fp4/train/4096/8-experts",
    "pro/bf16/train/16384/24-experts",
}

TRAINING_TOKENS = 4096
"""Tokens of a device in a training step."""


def _with_pairs(function: Callable) -> Callable:
    """``function`` with each weight and its scale as two arguments."""

    def call(*, w1, w1_scale, w2, w2_scale, w3, w3_scale, **options):
        return function(w1=(w1, w1_scale), w2=(w2, w2_scale), w3=(w3, w3_scale), **options)

    return call


def _arguments(model: ModelShape, kind: str, tokens: int, choices: int, experts: int, layers: int) -> dict[str, Any]:
    d, m = model.hidden, model.expert_width
    arguments: dict[str, Any] = {
        "x": jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        "expert_ids": jax.ShapeDtypeStruct((tokens, choices), jnp.int32),
        "expert_weights": jax.ShapeDtypeStruct((tokens, choices), jnp.float32),
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "limit": 10.0,
    }
    for name, out, inputs in (("w1", m, d), ("w2", d, m), ("w3", m, d)):
        leading = (layers, experts)
        weight, scale = {
            "fp4": (((out, inputs // 2), jnp.uint8), ((out, inputs // 32), jnp.float8_e8m0fnu)),
            "fp8": (((out, inputs), jnp.float8_e4m3fn), ((out // 128, inputs // 128), jnp.float32)),
            "bf16": (((out, inputs), jnp.bfloat16), None),
        }[kind]
        arguments[name] = jax.ShapeDtypeStruct((*leading, *weight[0]), weight[1])
        arguments[f"{name}_scale"] = None if scale is None else jax.ShapeDtypeStruct((*leading, *scale[0]), scale[1])
    return arguments


def _sizes(model: ModelShape, kind: str, tokens: int, choices: int, experts: int) -> dict[str, Any]:
    """What the cost functions ask for."""
    return {
        "kind": kind,
        "tokens": tokens,
        "choices": choices,
        "hidden": model.hidden,
        "width": model.expert_width,
        "experts": experts,
        "scale_itemsize": 4 if kind == "fp8" else 1,
    }


def _case(model: ModelShape, kind: str, tokens: int, experts: int, layers: int) -> Case:
    d, m, choices = model.hidden, model.expert_width, model.active_experts
    decode = tokens <= max(DECODE_ROWS)
    share = "" if experts == model.experts else f"/{experts}-experts"
    name = f"{model.name}/{kind}/{'decode' if decode else 'prefill'}/{tokens}{share}"
    return Case(
        name=name,
        arguments=_arguments(model, kind, tokens, choices, experts, layers),
        cost=expert_mlp_cost(**_sizes(model, kind, tokens, choices, experts)),
        protected=("w1", "w2", "w3"),
        # Two cores each keep a partial sum of the output; for long calls rows become words, and that is all.
        temporaries_limit=16 * MIB if decode else tokens * d * 10 + 16 * MIB,
        # Hidden activations and results of every assignment; the sort is little beside them.
        gpu_temporaries_limit=tokens * choices * (2 * m + 4 * d) + MIB,
        representative=name in _CI,
        values=functools.partial(_values, tokens, choices, experts),
    )


def _gradient_case(
    model: ModelShape, kind: str, tokens: int, choices: int, experts: int, trained: bool = False
) -> Case:
    d = model.hidden
    name = f"{model.name}/{kind}/train/{tokens}/{experts}-experts"
    cost = expert_mlp_weight_gradient_cost if trained else expert_mlp_gradient_cost
    # Rows and their gradients as words, and a float32 sum of each of two cores; no expert.
    temporaries = tokens * d * (2 * 2 + 2 * 4) + 16 * MIB
    if trained:
        # Besides, the rows of all blocks there can be; no gradient of a weight but the result.
        rows = tpu_backward.GradientTiles().rows_for(d)
        blocks = most_blocks(tokens * choices, experts, rows)
        temporaries += blocks * rows * kept_row_bytes(d, model.expert_width)
    return Case(
        name=name,
        arguments=_arguments(model, kind, tokens, choices, experts, layers=2)
        | {"gradient": jax.ShapeDtypeStruct((tokens, d), jnp.float32)},
        cost=cost(**_sizes(model, kind, tokens, choices, experts)),
        protected=("w1", "w2", "w3"),
        temporaries_limit=temporaries,
        representative=name in _CI,
        values=functools.partial(_values, tokens, choices, experts),
    )


def _values(tokens: int, choices: int, experts: int, rng: np.random.Generator) -> dict:
    """Every expert as often as every other, none twice by a token unless there are too few: all of them are read."""
    order = rng.permutation(experts)
    ids = order[np.arange(tokens * choices) % experts].reshape(tokens, choices)
    return {"expert_ids": ids.astype(np.int32)}


def cases() -> tuple[Case, ...]:
    """Decode and prefill with all experts of a layer on one device, and with the share of an expert-parallel one."""
    lengths = (*DECODE_ROWS, PREFILL_QUERIES, 4 * PREFILL_QUERIES)
    found = []
    for model in MODELS:
        # Flash keeps two layers stacked, as a model does; one layer of Pro fills most of the smallest device.
        found += [_case(model, "fp4", tokens, model.experts, 2 if model.experts == 256 else 1) for tokens in lengths]
        found += [_case(model, "fp4", tokens, 4, 2) for tokens in (64, 256, PREFILL_QUERIES)]
        found += [_case(model, kind, tokens, 16, 2) for kind in ("fp8", "bf16") for tokens in (64, PREFILL_QUERIES)]
    return tuple(found)


def gradient_cases() -> tuple[Case, ...]:
    """A device's tokens and its share of the experts of a layer; and rows that came to them, one choice each."""
    found = []
    for model in MODELS:
        k = model.active_experts
        found += [_gradient_case(model, "fp4", TRAINING_TOKENS, k, experts) for experts in (8, 16)]
        found += [_gradient_case(model, kind, TRAINING_TOKENS, k, 16) for kind in ("fp8", "bf16")]
        found.append(_gradient_case(model, "fp4", MOST_ROWS, 1, 16))
    return tuple(found)


def weight_gradient_cases() -> tuple[Case, ...]:
    """A device's tokens, were all of them for its share, one of 32; and rows that came to a share of 16, a round."""
    found = []
    for model in MODELS:
        for tokens, choices, shares in ((TRAINING_TOKENS, model.active_experts, 32), (MOST_ROWS, 1, 16)):
            found.append(_gradient_case(model, "bf16", tokens, choices, model.experts // shares, trained=True))
    return tuple(found)


def unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel serves these arguments on ``chip``, or None."""
    module = gpu if chip.platform == "cuda" else tpu
    return module.unserved(chip, arguments["x"], *_pairs(arguments))


def gradient_unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    """The same of the gradient."""
    if chip.platform == "cuda":
        return "there is none"
    return tpu_backward.unserved(chip, arguments["x"], *_pairs(arguments))


def weight_gradient_unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    """The same of the gradient that reaches weights too."""
    return unserved_weights((arguments["w1"], arguments["w1_scale"])) or gradient_unserved(chip, arguments)


def _pairs(arguments: Mapping[str, Any]) -> tuple:
    return tuple((arguments[name], arguments[f"{name}_scale"]) for name in ("w1", "w2"))


_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu.shape_class(arguments["w1"], arguments["w1_scale"]),
        candidates=lambda chip, arguments: tpu.CANDIDATES,
        run=lambda tiles: functools.partial(_with_pairs(tpu.expert_mlp), simulate_activations=False, tiles=tiles),
    )
}

_GRADIENT_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu_backward.shape_class(arguments["w1"], arguments["w1_scale"]),
        candidates=lambda chip, arguments: tpu_backward.CANDIDATES,
        run=lambda tiles: functools.partial(_with_pairs(tpu_backward.expert_mlp_gradient), tiles=tiles),
    )
}

_WEIGHT_GRADIENT_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu_backward.shape_class(arguments["w1"], arguments["w1_scale"]),
        candidates=lambda chip, arguments: tpu_weight_gradient.candidates(chip),
        run=lambda tiles: functools.partial(
            _with_pairs(tpu_backward.expert_mlp_weight_gradient),
            simulate_activations=False,
            totals=None,
            weight_tiles=tiles,
        ),
    )
}

OPERATIONS = (
    Operation("expert_mlp", _with_pairs(expert_mlp), cases, unserved, _TUNING),
    Operation(
        "expert_mlp_gradient", _with_pairs(expert_mlp_gradient), gradient_cases, gradient_unserved, _GRADIENT_TUNING
    ),
    Operation(
        "expert_mlp_weight_gradient",
        _with_pairs(expert_mlp_weight_gradient),
        weight_gradient_cases,
        weight_gradient_unserved,
        _WEIGHT_GRADIENT_TUNING,
    ),
)
