"""The plan of a call of the GPU kernels of ``index_topk``: block sizes, groups of queries, rounds of the tournament."""

import dataclasses

from jax.experimental import pallas as pl

KEYS = 128
"""Keys of a product. The order of a score's sum may depend on its shape, which is therefore the same for all calls."""

FEW_QUERIES = 8
"""Queries that share a tile of keys; calls of no more per row are decode."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Block sizes of the selection, the numbers that a tuner sweeps; none of them changes a result.

    Scores of a part, a power of two (more where k asks for it), and the warps that share it.
    """

    part: int = 8192
    warps: int = 16


CANDIDATES = (Parts(), Parts(4096, 4), Parts(4096, 8), Parts(8192, 8), Parts(16384, 16))
"""What a tuner may try."""


def shape_class(length: int) -> str:
    """The class of shapes that share a choice of ``Parts``."""
    return "decode" if length <= FEW_QUERIES else "prefill"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: sizes, and ``group`` blocks of ``queries`` of one row that go together."""

    batch: int
    length: int
    entries: int
    k: int
    parts: Parts
    budget: int
    interpreted: bool

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return min(FEW_QUERIES, self.length)

    @property
    def row_blocks(self) -> int:
        """Blocks of a row; the last may lack queries."""
        return pl.cdiv(self.length, self.queries)

    @property
    def blocks(self) -> int:
        """Blocks of all rows."""
        return self.batch * self.row_blocks

    @property
    def key_blocks(self) -> int:
        """Products of a query."""
        return pl.cdiv(self.entries, KEYS)

    @property
    def part(self) -> int:
        """Scores of a part: at least twice what is selected of it, no more than there are."""
        return min(max(self.parts.part, pl.next_power_of_2(2 * self.k)), pl.next_power_of_2(self.entries))

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """Of every round of the tournament: how many come in per query, and in how many parts."""
        found = [(self.entries, pl.cdiv(self.entries, self.part))]
        while found[-1][1] > 1:
            width = found[-1][1] * self.k
            found.append((width, pl.cdiv(width, self.part)))
        return found

    @property
    def group(self) -> int:
        """Blocks whose scores are in memory together."""
        selected = sum(8 * parts * self.k for _, parts in self.rounds)
        block = self.queries * (4 * self.key_blocks * KEYS + selected)
        return max(1, min(self.blocks, self.budget // block))
