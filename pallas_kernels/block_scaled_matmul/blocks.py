"""Block sizes of the GPU kernel of ``block_scaled_matmul``, by chip, where nothing has been tuned."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.targets import Chip
from pallas_kernels.tuned import tuned


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
    """The blocks of calls of at most ``DECODE_ROWS`` rows, and of longer ones."""

    decode: Blocks = Blocks()
    prefill: Blocks = Blocks(outputs=128, rows=128, warps=8, stages=3)


DECODE_ROWS = 256


# Sizes that compile within the chips' shared memory and registers; nothing was measured.
TABLE: Mapping[str, Choice] = MappingProxyType({"h200": Choice(), "b200": Choice()})


def default_choice(chip: Chip | None) -> Choice:
    """What runs on ``chip`` where nothing was tuned."""
    return Choice() if chip is None else TABLE.get(chip.name, Choice())


def blocks_for(chip: Chip | None, rows: int) -> Blocks:
    """The blocks of a call of ``rows`` rows on ``chip``; None and chips that the table lacks take the defaults."""
    choice = default_choice(chip)
    phase = phase_of(rows)
    return tuned("block_scaled_matmul", chip, phase, choice.decode if phase == "decode" else choice.prefill)


def phase_of(rows: int) -> str:
    """The class of shapes that share blocks: "decode" for few rows, "prefill" for more."""
    return "decode" if rows <= DECODE_ROWS else "prefill"


def candidates(chip: Chip | None, rows: int) -> tuple[Blocks, ...]:
    """What a tuner may try, the default first; a row's sums are the same with each."""
    phase = phase_of(rows)
    default = default_choice(chip).decode if phase == "decode" else default_choice(chip).prefill
    tiles = ((32, 16), (64, 16), (64, 64), (128, 32)) if phase == "decode" else ((64, 128), (128, 64), (128, 128))
    tried = [
        Blocks(outputs, rows, warps, stages) for outputs, rows in tiles for warps in (4, 8) for stages in (2, 3, 4, 5)
    ]
    return (default, *(blocks for blocks in tried if blocks != default))
