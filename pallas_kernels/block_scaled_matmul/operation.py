"""The declaration of ``block_scaled_matmul``: its V4 shapes, costs and fallback rule (``pallas_kernels.registry``)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, gpu, tpu
from pallas_kernels.block_scaled_matmul.blocks import candidates, phase_of
from pallas_kernels.block_scaled_matmul.cost import block_scaled_cost
from pallas_kernels.block_scaled_matmul.unserved import unserved
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape
from pallas_kernels.targets import Chip

_LAYERS = 2
"""Layers stacked in a case: more than one, so that reading a layer as a slice would show as a copy."""

_CI = {"flash/wq_b/decode/64", "flash/wo_a/decode/64", "pro/wo_b/prefill/2048"}


def _linears(model: ModelShape) -> dict[str, tuple[int, int, int]]:
    """(outputs, inputs, groups) of the FP8 linears of a layer."""
    d, heads = model.hidden, model.heads * model.head_dim
    low = model.o_groups * model.o_lora
    return {
        "wq_a": (model.q_lora, d, 1),
        "wq_b": (heads, model.q_lora, 1),
        "wkv": (model.head_dim, d, 1),
        "wo_a": (low, heads // model.o_groups, model.o_groups),
        "wo_b": (d, low, 1),
        "index_wq_b": (model.index_heads * model.index_dim, model.q_lora, 1),
        "shared_w1": (model.expert_width, d, 1),
        "shared_w2": (d, model.expert_width, 1),
    }


def _case(model: ModelShape, linear: str, rows: int) -> Case:
    outputs, inputs, groups = _linears(model)[linear]
    phase = "decode" if rows <= max(DECODE_ROWS) else "prefill"
    name = f"{model.name}/{linear}/{phase}/{rows}"
    arguments: dict[str, Any] = {
        "x": jax.ShapeDtypeStruct((rows, groups, inputs) if groups > 1 else (rows, inputs), jnp.bfloat16),
        "weight": jax.ShapeDtypeStruct((_LAYERS, outputs, inputs), jnp.float8_e4m3fn),
        "scale": jax.ShapeDtypeStruct((_LAYERS, outputs // 128, inputs // 128), jnp.float8_e8m0fnu),
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "groups": groups,
    }
    # Activations of groups change their layout before and after the product: [rows, g, K] does not lie in memory as
    # [rows, g * K] does. That is traffic beyond the cost's minimum; the weight is read in place all the same.
    grouped = 2 * rows * (groups * inputs + outputs) if groups > 1 else 0
    return Case(
        name=name,
        arguments=arguments,
        cost=block_scaled_cost(rows=rows, inputs=inputs, outputs=outputs, groups=groups),
        protected=("weight",),
        temporaries_limit=grouped + MIB,
        representative=name in _CI,
    )


def cases() -> tuple[Case, ...]:
    """Every FP8 linear of a layer, in decode and prefill, of both models."""
    return tuple(
        _case(model, linear, rows)
        for model in MODELS
        for linear in _linears(model)
        for rows in (*DECODE_ROWS, PREFILL_QUERIES)
    )


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    return unserved(chip, arguments["x"], arguments["weight"], arguments["scale"], arguments["groups"])


_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: "all",
        candidates=lambda chip, arguments: tpu.CANDIDATES,
        run=lambda tiles: functools.partial(tpu.block_scaled_matmul, tiles=tiles),
    ),
    "cuda": Tuning(
        shape_class=lambda arguments: phase_of(arguments["x"].shape[0]),
        candidates=lambda chip, arguments: candidates(chip, arguments["x"].shape[0]),
        run=lambda blocks: functools.partial(gpu.block_scaled_matmul, blocks=blocks),
    ),
}

OPERATION = Operation("block_scaled_matmul", block_scaled_matmul, cases, _unserved, _TUNING)
