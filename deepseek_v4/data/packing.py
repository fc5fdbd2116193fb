"""Packing documents into rows of one length: what goes where, as an index; no token is touched.

A document longer than a row is cut into pieces of a row's length and a remainder. Every piece is a sample of its own:
its positions restart at 0, it gets no BOS token, and it does not see the piece before it.
"""

import bisect

import numpy as np


def cut(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most ``size`` tokens that documents of ``lengths`` [D] are cut into, in order.

    Returns (document, start in the document, length), each int64 [pieces].
    """
    counts = -(-lengths // size)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return document, start, np.minimum(size, lengths[document] - start)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of every piece [P]: longest first, each into the row with the least space that suffices (best-fit
    decreasing), which keeps documents whole and leaves little of the rows empty.

    Rows are numbered by the first piece in them. A row's free space is at most ``size``, so rows are found by their
    space and the work is O(P log size).
    """
    row = np.empty(len(lengths), np.int64)
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, sorted
    count = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row[piece], space = count, size
            count += 1
        else:
            space = spaces[at]
            row[piece] = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        if space > length:
            if space - length not in rows_by_space:
                bisect.insort(spaces, space - length)
            rows_by_space.setdefault(space - length, []).append(int(row[piece]))
    _, first = np.unique(row, return_index=True)
    return np.argsort(np.argsort(first))[row]
