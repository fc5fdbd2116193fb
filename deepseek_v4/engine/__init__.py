"""The inference engine: continuous batching, drafts, exact prefix reuse, and runs that survive anything."""

from deepseek_v4.engine.engine import NOT_FINITE_ERROR, Engine, check_drafts
from deepseek_v4.engine.prefix import PrefixError, PrefixStore
from deepseek_v4.engine.requests import Request, TokenLogprob, Update
from deepseek_v4.engine.scheduling import Pool, chunk_sizes, parse_pools, slots_within
from deepseek_v4.engine.state import cache_bytes
from deepseek_v4.engine.statistics import Statistics

__all__ = [
    "NOT_FINITE_ERROR",
    "Engine",
    "Pool",
    "PrefixError",
    "PrefixStore",
    "Request",
    "Statistics",
    "TokenLogprob",
    "Update",
    "cache_bytes",
    "check_drafts",
    "chunk_sizes",
    "parse_pools",
    "slots_within",
]
