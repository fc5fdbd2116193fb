"""Exact bytes and operations of the hyper-connection operations, from their shapes."""

from types import MappingProxyType

from pallas_kernels.registry import Cost


def mix_cost(*, tokens: int, streams: int, width: int, back: bool, into: bool, itemsize: int = 2) -> Cost:
    """Streams in once; mixing ``back`` reads y and coefficients and writes streams, mixing ``into`` writes the rest.

    Mixing in reads the float32 weights once and writes x, post and comb. Its projection of float32 weights counts as
    products of float32; sums over streams and Sinkhorn are vector arithmetic and not counted.
    """
    n, mixes = streams, (2 + streams) * streams
    row, coefficients = tokens * width * itemsize, 4 * tokens * (n + n * n)
    weights = 4 * (mixes * n * width + 3 + mixes)
    return Cost(
        bytes_read=n * row + back * (row + coefficients) + into * weights,
        bytes_written=back * n * row + into * (row + coefficients),
        operations=MappingProxyType({"float32": 2 * tokens * n * width * mixes} if into else {}),
    )
