"""The declaration of ``expert_mlp``: its V4 shapes, costs and fallback rule (``pallas_kernels.registry``)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import expert_mlp, gpu, tpu
from pallas_kernels.grouped_matmul.cost import expert_mlp_cost
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape
from pallas_kernels.targets import Chip

_CI = {
    "flash/fp4/decode/64",
    "flash/fp4/prefill/2048",
    "flash/fp8/decode/64/16-experts",
    "pro/fp4/decode/256",
}


def _with_pairs(function: Callable) -> Callable:
    """``function`` with each weight and its scale as two arguments."""

    def call(*, x, expert_ids, expert_weights, w1, w1_scale, w2, w2_scale, w3, w3_scale, **options) -> jax.Array:
        return function(x, expert_ids, expert_weights, (w1, w1_scale), (w2, w2_scale), (w3, w3_scale), **options)

    return call


def _case(model: ModelShape, kind: str, tokens: int, experts: int, layers: int) -> Case:
    d, m = model.hidden, model.expert_width
    arguments: dict[str, Any] = {
        "x": jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        "expert_ids": jax.ShapeDtypeStruct((tokens, model.active_experts), jnp.int32),
        "expert_weights": jax.ShapeDtypeStruct((tokens, model.active_experts), jnp.float32),
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
    decode = tokens <= max(DECODE_ROWS)
    share = "" if experts == model.experts else f"/{experts}-experts"
    name = f"{model.name}/{kind}/{'decode' if decode else 'prefill'}/{tokens}{share}"
    return Case(
        name=name,
        arguments=arguments,
        cost=expert_mlp_cost(
            kind=kind,
            tokens=tokens,
            choices=model.active_experts,
            hidden=d,
            width=m,
            experts=experts,
            scale_itemsize=4 if kind == "fp8" else 1,
        ),
        protected=("w1", "w2", "w3"),
        # Two cores each keep a partial sum of the output; for long calls rows become words, and that is all.
        temporaries_limit=16 * MIB if decode else tokens * d * 10 + 16 * MIB,
        # Hidden activations and results of every assignment; the sort is little beside them.
        gpu_temporaries_limit=tokens * model.active_experts * (2 * m + 4 * d) + MIB,
        representative=name in _CI,
        values=functools.partial(_values, tokens, model.active_experts, experts),
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


def unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel serves these arguments on ``chip``, or None."""
    pairs = ((arguments[name], arguments[f"{name}_scale"]) for name in ("w1", "w2"))
    module = gpu if chip.platform == "cuda" else tpu
    return module.unserved(chip, arguments["x"], *pairs)


_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu.shape_class(arguments["w1"], arguments["w1_scale"]),
        candidates=lambda chip, arguments: tpu.CANDIDATES,
        run=lambda tiles: functools.partial(_with_pairs(tpu.expert_mlp), simulate_activations=False, tiles=tiles),
    )
}

OPERATION = Operation("expert_mlp", _with_pairs(expert_mlp), cases, unserved, _TUNING)
