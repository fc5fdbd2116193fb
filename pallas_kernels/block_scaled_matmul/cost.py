"""Exact bytes and operations of ``block_scaled_matmul``, from its shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost


def block_scaled_cost(*, rows: int, inputs: int, outputs: int, groups: int = 1, scale_itemsize: int = 1) -> Cost:
    """E4M3 weights [outputs, inputs] and scales read once, bfloat16 rows [rows, groups * inputs] in and out once."""
    scales = -(-outputs // 128) * -(-inputs // 128) * scale_itemsize
    return Cost(
        bytes_read=outputs * inputs + scales + 2 * rows * groups * inputs,
        bytes_written=2 * rows * outputs,
        operations=MappingProxyType({"bfloat16": 2 * rows * inputs * outputs}),
    )
