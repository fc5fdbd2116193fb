"""Low-rank adapters beside a model's weights, whatever the format those are stored in."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from deepseek_v4.names import matches
from deepseek_v4.nn.linear import Linear
from deepseek_v4.nn.moe import ExpertLinear


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which linears get an adapter, and how large: y = W x + (alpha / rank) B A x.

    ``patterns`` name linears as in ``names.matches``, without the number of a layer; what they name is adapted in every
    layer that has it and in the MTP block: "attn.wq_b", "attn.w*" (the five projections of attention), "attn" (with the
    indexer's), "ffn.shared_experts", "ffn.experts" (each routed expert its own), "e_proj". Linears that the releases
    keep in bfloat16 (router, compressors, embedding, head) have no adapters. Raises ``ValueError`` for sizes below 1.
    """

    rank: int = 16
    alpha: float = 16.0
    patterns: tuple[str, ...] = ("attn.w*", "ffn.shared_experts")

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if self.rank < 1 or not self.alpha > 0 or not self.patterns:
            raise ValueError(f"adapters: expected a positive rank and alpha and at least one pattern, found {self}")

    @property
    def scale(self) -> float:
        """The factor of an adapter's product."""
        return self.alpha / self.rank


def adaptable(module: nnx.Module) -> Iterator[tuple[str, Linear | ExpertLinear]]:
    """The linears of a block that can have an adapter, by dotted name."""
    for path, node in nnx.iter_modules(module):
        if isinstance(node, (Linear, ExpertLinear)):
            yield ".".join(str(key) for key in path), node


def adapt(module: nnx.Module, lora: LoRA | None) -> nnx.Module:
    """``module`` with the adapters that ``lora`` names (None: none)."""
    if lora is not None:
        for name, linear in list(adaptable(module)):
            if any(matches(pattern, name) for pattern in lora.patterns):
                linear.add_adapter(lora.rank, lora.scale)
    return module


def check_patterns(lora: LoRA, names: set[str]) -> None:
    """Raises ``ValueError`` for a pattern that names none of a model's adaptable linears."""
    for pattern in lora.patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"adapters: pattern {pattern!r} names no linear; there are: {', '.join(sorted(names))}")
