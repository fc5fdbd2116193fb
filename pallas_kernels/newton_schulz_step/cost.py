"""Exact bytes and operations of ``newton_schulz_step``, from its shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost


def step_cost(*, matrices: int, rows: int, columns: int) -> Cost:
    """Float32 matrices and three coefficients in, matrices out; three products of float32 operands."""
    size = 4 * matrices * rows * columns
    return Cost(
        bytes_read=size + 12,
        bytes_written=size,
        operations=MappingProxyType({"float32": 2 * matrices * rows * rows * (2 * columns + rows)}),
    )
