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
    *, kind: str, tokens: int, choices: int, hidden: int, width: int, experts: int, touched: int | None = None
) -> Cost:
    """What the call must move and compute when ``touched`` experts have rows and serve every assignment.

    By default as many experts as there can be: all, or one per assignment. Each is read once; bfloat16 rows are read
    once, ids and routing weights too, and float32 results are written once.
    """
    assignments = tokens * choices
    touched = min(experts, assignments) if touched is None else touched
    return Cost(
        bytes_read=touched * expert_bytes(kind, hidden, width) + 2 * tokens * hidden + 8 * assignments,
        bytes_written=4 * tokens * hidden,
        operations=MappingProxyType({"bfloat16": 6 * assignments * hidden * width}),
    )


def kernel_bytes(
    *, kind: str, tokens: int, choices: int, hidden: int, width: int, experts: int, blocks: int | None = None
) -> int:
    """What the TPU kernel moves for ``blocks`` blocks of rows (default: one per expert that can be touched).

    A block reads its expert; a row of x is packed once and fetched once per choice; a float32 sum is cleared once, and
    read and written once per choice.
    """
    assignments = tokens * choices
    blocks = min(experts, assignments) if blocks is None else blocks
    row_traffic = 2 * hidden * (2 * tokens + assignments) + 4 * hidden * (tokens + 2 * assignments)
    return blocks * expert_bytes(kind, hidden, width) + row_traffic + 16 * assignments
