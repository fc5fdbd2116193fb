"""The declaration of ``newton_schulz_step``: V4 shapes, costs, fallback rule (``pallas_kernels.registry``)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.newton_schulz_step import newton_schulz_step, tpu
from pallas_kernels.newton_schulz_step.cost import step_cost
from pallas_kernels.registry import MIB, Case, Operation
from pallas_kernels.shapes import MODELS, ModelShape
from pallas_kernels.targets import Chip

_CI = {"flash/train/expert", "pro/train/queries", "flash/train/mixes"}


def _case(model: ModelShape, matrix: str, rows: int, columns: int, count: int) -> Case:
    name = f"{model.name}/train/{matrix}"
    return Case(
        name=name,
        arguments={
            "x": jax.ShapeDtypeStruct((count, rows, columns), jnp.float32),
            "coefficients": jax.ShapeDtypeStruct((3,), jnp.float32),
        },
        cost=step_cost(matrices=count, rows=rows, columns=columns),
        protected=("x",),
        # The products of a matrix with itself, and the polynomial of them.
        temporaries_limit=2 * 4 * count * rows * max(rows, 128) + MIB,
        representative=name in _CI,
    )


def cases() -> tuple[Case, ...]:
    """Matrices of both models, the smaller side first: those of experts, queries, the indexer, and stream mixing."""
    return tuple(
        case
        for model in MODELS
        for case in (
            _case(model, "expert", model.expert_width, model.hidden, 4),
            _case(model, "queries", model.q_lora, model.heads * model.head_dim // model.o_groups, 8),
            _case(model, "index-weights", model.index_heads, model.hidden, 1),
            _case(model, "mixes", model.streams, model.streams * model.hidden, 1),
        )
    )


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    return tpu.unserved(chip, arguments["x"], jnp.float32)


OPERATION = Operation("newton_schulz_step", newton_schulz_step, cases, _unserved)
