"""Block sizes of the GPU kernel of ``block_scaled_matmul``, by chip: the table that a tuner rewrites."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.targets import Chip


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of one program: outputs (a divisor of 128) and most rows; how the compiler is to schedule it.

    The inputs are always summed 128 at a time, in order: no size here changes which products are added when.
    """

    outputs: int = 64
    rows: int = 64
    warps: int = 4
    stages: int = 4


@dataclasses.dataclass(frozen=True)
class Choice:
    """The blocks of calls of at most ``decode_rows`` rows, and of longer ones."""

    decode: Blocks = Blocks()
    prefill: Blocks = Blocks(outputs=128, rows=128, warps=8, stages=3)
    decode_rows: int = 256


# Sizes that compile within the chips' shared memory and registers; nothing was measured.
TABLE: Mapping[str, Choice] = MappingProxyType({"h200": Choice(), "b200": Choice()})


def blocks_for(chip: Chip | None, rows: int) -> Blocks:
    """The blocks of a call of ``rows`` rows on ``chip``; None and chips that the table lacks take the defaults."""
    choice = Choice() if chip is None else TABLE.get(chip.name, Choice())
    return choice.decode if rows <= choice.decode_rows else choice.prefill
