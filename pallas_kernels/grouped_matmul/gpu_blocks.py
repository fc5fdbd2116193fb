"""Block sizes of the GPU kernels of ``expert_mlp``, by chip: the table that a tuner rewrites."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from pallas_kernels.block_scaled_matmul.blocks import Blocks
from pallas_kernels.targets import Chip

FEWEST_ROWS = 16
"""Rows of the smallest product that Triton gives to tensor cores."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The blocks of calls of at most ``decode_tokens`` tokens, which read weights, and of longer ones, which multiply.

    ``rows`` of the latter are the most: blocks of rows are about as large as an expert's mean share.
    """

    decode: Blocks
    prefill: Blocks
    decode_tokens: int = 256


DEFAULT = Choice(Blocks(outputs=64, rows=FEWEST_ROWS), Blocks(outputs=64, rows=128, warps=8, stages=3))

# Sizes that compile within the chips' shared memory and registers; nothing was measured.
TABLE: Mapping[str, Choice] = MappingProxyType({"h200": DEFAULT, "b200": DEFAULT})


def blocks_for(chip: Chip | None, tokens: int, choices: int, experts: int) -> Blocks:
    """The blocks of a call on ``chip``; None and chips that the table lacks take the defaults."""
    choice = DEFAULT if chip is None else TABLE.get(chip.name, DEFAULT)
    if tokens <= choice.decode_tokens:
        return choice.decode
    share = 2 * FEWEST_ROWS
    while share < min(choice.prefill.rows, tokens * choices // experts):
        share *= 2
    return dataclasses.replace(choice.prefill, rows=share)
