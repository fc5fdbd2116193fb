"""Which piece of which prompt is read next, and how many slots a budget of bytes holds: plain arithmetic."""

import dataclasses
from collections.abc import Sequence

from deepseek_v4.engine.state import device_cache_bytes
from deepseek_v4.model import Model

LENGTH_STEP = 128
"""Cache lengths are multiples of this: few shapes, whole windows of every layer kind."""

_SMALLEST_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Pool:
    """``slots`` sequences of up to ``max_length`` tokens, prompt and continuation together, that decode in one call.

    A slot has its whole length from the start: nothing grows, so nothing is copied, and the entries of a sequence are
    one piece of memory, as the attention kernels read them.
    """

    slots: int
    max_length: int

    def __post_init__(self) -> None:
        for name, value in (("slots", self.slots), ("max_length", self.max_length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


def parse_pools(text: str) -> tuple[Pool, ...]:
    """``"8x4096,1x131072"`` to pools of slots x tokens; raises ``ValueError``."""
    pools = []
    for part in text.split(","):
        slots, times, length = part.strip().partition("x")
        if not times or not slots.isdigit() or not length.isdigit():
            raise ValueError(f"pools {text!r}: bad part {part!r}, expected SLOTSxTOKENS, for example 8x4096,1x131072")
        pools.append(Pool(int(slots), int(length)))
    return tuple(pools)


def chunk_sizes(largest: int) -> tuple[int, ...]:
    """``largest`` and at most two smaller sizes, quarters of each other, for the ends of prompts."""
    sizes = [largest]
    while len(sizes) < 3 and sizes[-1] >= 4 * _SMALLEST_CHUNK:
        sizes.append(-(-sizes[-1] // 4))
    return tuple(sizes)


def next_chunk(left: int, sizes: Sequence[int]) -> int:
    """The size of the call that reads next of ``left`` prompt tokens: the smallest that holds them, or the largest.

    A function of the prompt alone: whatever else runs, its tokens go through the same calls.
    """
    return min((size for size in sizes if size >= left), default=max(sizes))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def slots_within(model: Model, budget: int, max_length: int, rollback: int) -> int:
    """How many slots of ``max_length`` tokens the caches of a device hold in ``budget`` bytes; 0 if not one.

    One more row per part of the mesh's data axis is counted, in which prompts are read. Exact: from the shapes.
    """
    placement = model.execution.placement
    shards = 1 if placement is None else placement.size("batch")
    row = device_cache_bytes(model, 1, max_length, rollback)
    return max(0, budget // row - 1) * shards
