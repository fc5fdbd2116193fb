"""Bytes that an array occupies in a TPU's memory: whole tiles of the layout that wastes least.

XLA's TPU compiler keeps an array in tiles of rows x 128 lanes of 32-bit words, narrower types packed along the rows,
and chooses which two dims are tiled so that padding is smallest. The rule here was derived from what the compiler
reports for single arrays, and is held against it by tests.
"""

import itertools
import math

LANES = 128


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of one device's array of ``shape`` on a TPU, padding included."""
    packed = 4 // itemsize
    if len(shape) < 2:
        count = math.prod(shape)
        tile = min(8 * LANES, max(packed * LANES, _power_of_two(count)))
        return _round_up(count, tile) * itemsize
    count = math.prod(shape)
    if not count:
        return 0
    sizes = set(itertools.permutations(shape, 2))
    return min(
        count // (rows * lanes) * _round_up(rows, _tile_rows(rows, packed)) * _round_up(lanes, LANES) * itemsize
        for rows, lanes in sizes
    )


def _tile_rows(rows: int, packed: int) -> int:
    return min(8, max(packed, _power_of_two(rows)))


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
