"""Exact bytes of ``compress``, from its shapes; all of its arithmetic is on vectors and is not counted."""

from pallas_kernels.registry import Cost


def compress_cost(*, completed: int, pool_rows: int, width: int, itemsize: int = 2) -> Cost:
    """What ``completed`` entries of ``width`` channels must move: every float32 row that one pools, once, and itself.

    Each of an entry's ``pool_rows`` rows is read in its lane alone, kv and score; no other entry needs that lane. What
    only becomes part of a window that a later call completes is not read.
    """
    return Cost(bytes_read=completed * pool_rows * width * 8 + 4 * width, bytes_written=completed * width * itemsize)


def kernel_bytes(
    *,
    batch: int,
    length: int,
    channels: int,
    width: int,
    ratio: int,
    ring_rows: int,
    completing: int | None = None,
    itemsize: int = 2,
) -> int:
    """What the TPU kernel moves when ``completing`` sequences complete a window (default: as many as do on average).

    All new rows, the whole ring of a sequence that completes a window, a row of sines and cosines for every possible
    entry, and the entries, those of incomplete windows too.
    """
    if completing is None:
        completing = min(batch, -(-batch * length // ratio))
    entries = batch * -(-length // ratio)
    rows = batch * length + completing * ring_rows
    return rows * channels * 8 + entries * (width * itemsize + 128 * 4) + 4 * width
