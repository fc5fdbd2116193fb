"""Block sizes of the GPU kernel of ``compressed_attention``, by chip: the table that a tuner rewrites."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.targets import Chip


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Heads that share one pass over the keys, keys per turn of the loop, and how the compiler is to schedule them.

    None may depend on the batch or on a cache's capacity: a row's bits would.
    """

    heads: int = 64
    keys: int = 32
    warps: int = 8
    stages: int = 2


# Sizes that compile within the chips' shared memory and registers; nothing was measured.
TABLE: Mapping[str, Blocks] = MappingProxyType({"h200": Blocks(), "b200": Blocks(heads=32)})


def blocks_for(chip: Chip | None) -> Blocks:
    """The blocks for ``chip``; None (an interpreter) and chips without a row take the defaults."""
    return Blocks() if chip is None else TABLE.get(chip.name, Blocks())
