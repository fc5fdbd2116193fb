"""Kinds of model variables, and the stored dtypes of a checkpoint."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx


class Weight(nnx.Param):
    """A floating-point parameter that gradients may reach."""


class Packed(nnx.Variable):
    """Stored bytes of a quantised weight, or its scales: never differentiated, never cast."""


class Buffer(nnx.Variable):
    """State beside the gradient: the router's balance bias and the hash router's table."""


EXPERT_FORMATS = ("fp4", "fp8", "bfloat16", "float32")
LINEAR_FORMATS = ("fp8", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Storage:
    """In which format each kind of tensor is stored, decided by a checkpoint's tensors and never by its config.

    ``experts`` and ``linears`` name the format of routed experts and of the other quantised linears; ``scales`` is the
    dtype of FP8 scales ("float8_e8m0fnu", or "float32" in the Base releases; FP4 scales are always E8M0); ``matrices``
    (embedding, head, router, compressor and index-weight projections) and ``norms`` are plain dtypes.
    """

    experts: str = "fp4"
    linears: str = "fp8"
    scales: str = "float8_e8m0fnu"
    matrices: str = "bfloat16"
    norms: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("experts", self.experts, EXPERT_FORMATS),
            ("linears", self.linears, LINEAR_FORMATS),
            ("scales", self.scales, ("float8_e8m0fnu", "float32")),
            ("matrices", self.matrices, ("bfloat16", "float32")),
            ("norms", self.norms, ("bfloat16", "float32")),
        ):
            if value not in legal:
                raise ValueError(f"storage.{name}: expected one of {list(legal)}, found {value!r}")

    @property
    def packed(self) -> bool:
        """Whether some weights are stored as codes with scales."""
        return self.linears == "fp8" or self.experts in ("fp4", "fp8")

    def format_of(self, role: str) -> str | None:
        """The format of weights of a role (see ``variable``); None for those that are float32 in every checkpoint."""
        return {
            "linear": self.linears,
            "expert": self.experts,
            "matrix": self.matrices,
            "embedding": self.matrices,
            "norm": self.norms,
        }.get(role)


RELEASED = Storage()
"""Flash and Pro: FP4 experts, FP8 linears, E8M0 scales, BF16 for the rest."""

RELEASED_BASE = Storage(experts="fp8", scales="float32")
"""Flash-Base and Pro-Base: FP8 throughout, F32 scales."""

MASTER = Storage(experts="float32", linears="float32", matrices="float32", norms="float32")
"""float32 masters, as training keeps them."""


VariableType = TypeVar("VariableType", bound=nnx.Variable)


def variable(
    kind: type[VariableType],
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    axes: tuple[str | None, ...],
    role: str,
    matrices: tuple[int, ...] = (),
) -> VariableType:
    """A zero-filled variable that carries its logical axes (one per dim), its role and its ``matrices``.

    Roles say what a tensor is, for initialisation, optimiser and storage: ``linear``, ``expert``, ``scale``,
    ``matrix``, ``embedding``, ``norm``, ``hyper`` (mHC projections), ``island`` (other float32 parameters),
    ``adapter`` (factors of a low-rank addition to a linear), ``router_bias``, ``token_table``. ``matrices`` are the
    output rows of each logically independent matrix, where several are fused into one tensor (() for a single one):
    what an optimiser that works on matrices must keep apart.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axes {axes} for shape {shape}")
    if matrices and sum(matrices) != shape[-2]:
        raise ValueError(f"matrices of {matrices} rows do not make up shape {shape}")
    return kind(jnp.zeros(shape, dtype), axes=axes, role=role, matrices=matrices)
