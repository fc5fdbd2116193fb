"""The sizes of the released models, for named shapes of kernels, tests and benchmarks.

Numbers of the two released configurations, not a configuration: models take theirs from config.json.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of one released model that appear in kernel shapes (architecture section 1)."""

    name: str
    hidden: int
    heads: int
    topk: int
    q_lora: int
    o_groups: int
    experts: int
    expert_width: int
    o_lora: int = 1024
    head_dim: int = 512
    rope_dims: int = 64
    window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    index_heads: int = 64
    index_dim: int = 128
    active_experts: int = 6
    streams: int = 4


FLASH = ModelShape("flash", 4096, 64, 512, 1024, 8, 256, 2048)
PRO = ModelShape("pro", 7168, 128, 1024, 1536, 16, 384, 3072)
MODELS = (FLASH, PRO)

DECODE_ROWS = (1, 64, 256)
"""Rows of a decode step."""

PREFILL_QUERIES = 2048
"""Queries of one chunk of a prompt."""

CONTEXTS = (8 << 10, 128 << 10, 1 << 20)
"""Tokens of context."""


def context_name(context: int) -> str:
    """8192 as 8K, 1048576 as 1M."""
    return f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}K"
