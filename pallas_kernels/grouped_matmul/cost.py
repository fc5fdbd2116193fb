"""Exact bytes and operations of ``expert_mlp``, from its shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost

FORMATS = ("fp4", "fp8", "bf16")


def expert_bytes(kind: str, hidden: int, width: int, scale_itemsize: int = 1) -> int:
    """Bytes of one expert's W1, W2 and W3 with their scales; ``scale_itemsize`` is 4 for float32 FP8 scales."""
    elements = 3 * hidden * width
    if kind == "fp4":
        return elements // 2 + elements // 32
    if kind == "fp8":
        return elements + 3 * -(-hidden // 128) * -(-width // 128) * scale_itemsize
    return 2 * elements


def expert_mlp_cost(
    *,
    kind: str,
    tokens: int,
    choices: int,
    hidden: int,
    width: int,
    experts: int,
    touched: int | None = None,
    scale_itemsize: int = 1,
) -> Cost:
    """What the call must move and compute when ``touched`` experts have rows and all a token can choose are here.

    By default as many experts as there can be: all, or one per assignment. Each is read once; bfloat16 rows are read
    once, ids and routing weights too, and float32 results are written once.
    """
    served = tokens * min(choices, experts)
    touched = min(experts, served) if touched is None else touched
    weights = touched * expert_bytes(kind, hidden, width, scale_itemsize)
    return Cost(
        bytes_read=weights + 2 * tokens * hidden + 8 * tokens * choices,
        bytes_written=4 * tokens * hidden,
        operations=MappingProxyType({"bfloat16": 6 * served * hidden * width}),
    )


def kernel_bytes(
    *,
    kind: str,
    tokens: int,
    choices: int,
    hidden: int,
    width: int,
    experts: int,
    blocks: int | None = None,
    scale_itemsize: int = 1,
) -> int:
    """What the TPU kernel moves for ``blocks`` blocks of rows (default: one per expert that can be touched).

    A block reads its expert; a row of x is packed once and fetched once per choice; a float32 sum is cleared once, and
    read and written once per choice.
    """
    served = tokens * min(choices, experts)
    blocks = min(experts, served) if blocks is None else blocks
    rows = 2 * hidden * (2 * tokens + served) + 4 * hidden * (tokens + 2 * served)
    return blocks * expert_bytes(kind, hidden, width, scale_itemsize) + rows + 16 * tokens * choices
