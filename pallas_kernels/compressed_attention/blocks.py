"""Block sizes of the GPU kernel of ``compressed_attention``, by chip, where nothing has been tuned."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.targets import Chip
from pallas_kernels.tuned import tuned


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Heads that share one pass over the keys, keys per turn of the loop, and how the compiler is to schedule them.

    ``split`` is how many entries, a multiple of ``keys``, one program attends to where a decode step sees them all.
    None may depend on the batch or on a cache's capacity: a row's bits would.
    """

    heads: int = 32
    keys: int = 32
    warps: int = 8
    stages: int = 2
    split: int = 1024


# Sizes that compile within the chips' shared memory and registers, but for a few bytes of a thread: on H200 up to 188
# where rows are in the released bytes. Nothing was measured.
TABLE: Mapping[str, Blocks] = MappingProxyType({"h200": Blocks(), "b200": Blocks()})


def blocks_for(chip: Chip | None, heads: int) -> Blocks:
    """The blocks for ``heads`` heads on ``chip``; None (an interpreter) and chips without a row take the defaults."""
    return tuned("compressed_attention", chip, shape_class(heads), default_blocks(chip))


def default_blocks(chip: Chip | None) -> Blocks:
    """What runs on ``chip`` where nothing was tuned."""
    return Blocks() if chip is None else TABLE.get(chip.name, Blocks())


def shape_class(heads: int) -> str:
    """The class of shapes that share blocks, on TPUs too: what a model has, whatever the batch and the call."""
    return f"{heads} heads"


def candidates(chip: Chip | None) -> tuple[Blocks, ...]:
    """What a tuner may try, the default first."""
    default = default_blocks(chip)
    tried = [
        Blocks(heads, keys, warps, stages)
        for heads in (16, 32, 64)
        for keys in (16, 32, 64)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]
    return (default, *(blocks for blocks in tried if blocks != default))
