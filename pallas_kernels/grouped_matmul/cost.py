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

    A block reads its expert; a row of x is packed once and fetched once per choice; a float32 sum is cleared once,
    written once per choice, and read as often unless there is but one.
    """
    served = tokens * min(choices, experts)
    blocks = min(experts, served) if blocks is None else blocks
    rows = hidden * (2 * (2 * tokens + served) + _sums_bytes(tokens, served, choices))
    return blocks * expert_bytes(kind, hidden, width, scale_itemsize) + rows + 16 * tokens * choices


def expert_mlp_gradient_cost(
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
    """What the gradient to rows and routing weights must move and compute, ``touched`` as in ``expert_mlp_cost``.

    Each expert that is touched is read once; bfloat16 rows, their float32 gradients, ids and routing weights are read
    once, and float32 gradients of rows and routing weights are written once. Five products per row: gate and up again,
    the hidden activations' gradient, and the two that make up the row's.
    """
    served = tokens * min(choices, experts)
    touched = min(experts, served) if touched is None else touched
    weights = touched * expert_bytes(kind, hidden, width, scale_itemsize)
    return Cost(
        bytes_read=weights + (2 + 4) * tokens * hidden + 8 * tokens * choices,
        bytes_written=4 * tokens * hidden + 4 * tokens * choices,
        operations=MappingProxyType({"bfloat16": 10 * served * hidden * width}),
    )


def kernel_gradient_bytes(
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

    A block reads its expert; a row of x and its float32 gradient are packed once and fetched once per choice; a float32
    sum is cleared once, written once per choice, and read as often unless there is but one.
    """
    served = tokens * min(choices, experts)
    blocks = min(experts, served) if blocks is None else blocks
    rows = hidden * ((2 + 4 + 4) * tokens + 4 * served + _sums_bytes(tokens, served, choices))
    return blocks * expert_bytes(kind, hidden, width, scale_itemsize) + rows + 20 * tokens * choices


def expert_mlp_weight_gradient_cost(*, hidden: int, width: int, experts: int, **sizes) -> Cost:
    """What the gradient to rows, routing weights and bfloat16 weights must move and compute; ``sizes`` as above.

    The bytes of ``expert_mlp_gradient_cost``, and the float32 gradients of all weights, written once; three more
    products per row.
    """
    of_rows = expert_mlp_gradient_cost(hidden=hidden, width=width, experts=experts, **sizes)
    (products,) = of_rows.operations.values()
    return Cost(
        bytes_read=of_rows.bytes_read,
        bytes_written=of_rows.bytes_written + 3 * 4 * experts * hidden * width,
        operations=MappingProxyType({"bfloat16": products // 5 * 8}),
    )


def kept_row_bytes(hidden: int, width: int) -> int:
    """Bytes of a row that the backward pass of the TPU kernel keeps for the gradients of weights.

    bfloat16: the row of x, that of the result's gradient, the gradients of gate and up, and the input of W2.
    """
    return 2 * (2 * hidden + 3 * width)


def _sums_bytes(tokens: int, served: int, choices: int) -> int:
    """Per column of the result: cleared, then read and written for every choice; or written, where there is one."""
    return 4 * (tokens + (2 if choices > 1 else 1) * served)
