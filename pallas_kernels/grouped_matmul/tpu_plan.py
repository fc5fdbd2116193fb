"""What is static about one call of a TPU kernel of the expert MLP, forward or backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.targets import Chip

LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the call and of its blocks.

    ``rows`` of one expert share one read of its weights and are multiplied ``product`` at a time; a grid step takes
    ``tile`` columns of the width of one of ``cores``, and ``down`` columns of the hidden size are added up at a time.
    """

    kind: str
    tokens: int
    choices: int
    experts: int
    hidden: int
    width: int
    limit: float
    simulate: bool
    rows: int
    product: int
    tile: int
    down: int
    cores: int
    native_fp8: bool

    @property
    def tiles(self) -> int:
        """Tiles of M that one core works through."""
        return self.width // (self.tile * self.cores)

    @property
    def packed(self) -> bool:
        """Whether two inputs share a byte."""
        return self.kind == "fp4"

    @property
    def sizes(self) -> dict[str, Any]:
        """What the functions of ``cost`` ask for."""
        return {name: getattr(self, name) for name in ("kind", "tokens", "choices", "hidden", "width", "experts")}

    @property
    def served(self) -> int:
        """Assignments that can be for experts that are here."""
        return self.tokens * min(self.choices, self.experts)


def plan_of(
    x: jax.Array,
    expert_ids: jax.Array,
    w1: tuple[jax.Array, jax.Array | None],
    *,
    limit: float,
    simulate: bool,
    rows: int,
    products: tuple[int, ...],
    tile: int,
    down: int,
    chip: Chip | None,
    cores: int | None,
) -> Plan:
    """The plan of a call with ``w1`` [L, E, M, D]; of ``products`` the least that holds a mean expert's rows and more.

    ``chip`` None is an interpreter; ``cores`` defaults to the chip's.
    """
    weight, scale = w1
    tokens, choices = expert_ids.shape
    share = 1.1 * tokens * choices / weight.shape[1]
    product = next((p for p in products if p >= share), products[-1])
    hidden = x.shape[1]
    return Plan(
        kind=kind_of(weight, scale),
        tokens=tokens,
        choices=choices,
        experts=weight.shape[1],
        hidden=hidden,
        width=weight.shape[2],
        limit=float(limit),
        simulate=simulate,
        rows=min(rows, round_up(tokens, product)),
        product=product,
        tile=tile,
        down=next(d for d in (down, 512, 256) if hidden % d == 0),
        cores=cores or (1 if chip is None else chip.cores),
        native_fp8=chip is not None and "float8_e4m3fn" in chip.peak,
    )


def in_parts(function: Callable, rows: tuple[jax.Array, ...], most: int):
    """``function`` of arrays that share their rows, ``most`` rows at a time; its results are joined again."""
    count = rows[0].shape[0]
    if count <= most:
        return function(*rows)
    parts = [function(*(a[i : i + most] for a in rows)) for i in range(0, count, most)]
    return jax.tree.map(lambda *found: jnp.concatenate(found), *parts)


def kind_of(weight: jax.Array, scale: jax.Array | None) -> str:
    """The format of a weight: "fp4", "fp8" or "bf16"."""
    return "bf16" if scale is None else "fp4" if weight.dtype == jnp.uint8 else "fp8"


def round_up(value: int, multiple: int) -> int:
    """``value`` or the next multiple."""
    return -(-value // multiple) * multiple
