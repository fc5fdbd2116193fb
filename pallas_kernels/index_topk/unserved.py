"""Which calls the kernels of ``index_topk`` serve."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from deepseek_v4.formats import FP4_BLOCK
from deepseek_v4.stored_rows import KeyColumns, KeyRows
from pallas_kernels.gpu_decode import WORD
from pallas_kernels.index_topk.tpu_keys import unaligned
from pallas_kernels.index_topk.tpu_search import CHUNK, LANES, MAX_ENTRIES
from pallas_kernels.targets import Chip

_LEAST_PRODUCT = 16
"""Rows and columns of the smallest product that Triton gives to tensor cores."""

_MOST_SELECTED = 4096
"""Most entries that the GPU kernel selects: a part of twice as many has to fit the registers."""


def unserved(q: Any, keys: Any, k: int, first_entries: Any, *, compiled: bool = True) -> str | None:
    """Why the TPU kernel cannot serve q [B, S, Hi, di] with keys [n, B, T, di], or None.

    ``compiled``: not interpreted.
    """
    if isinstance(keys, KeyRows):
        return "keys in the published layout by rows"
    if reason := _unserved_everywhere(q, keys, first_entries):
        return reason
    if k > CHUNK:
        return f"{k} of them are to be selected, at most {CHUNK}"
    if compiled and q.shape[-1] % LANES:
        return f"keys of {q.shape[-1]} channels are not a multiple of {LANES}"
    return None


def unserved_on_gpu(q: Any, keys: Any, k: int, first_entries: Any, *, compiled: bool = True) -> str | None:
    """The same of the GPU kernel."""
    if isinstance(keys, KeyRows) and q.shape[-1] != WORD * FP4_BLOCK:
        return f"released rows of {q.shape[-1]} channels, expected {WORD * FP4_BLOCK}"
    if reason := _unserved_everywhere(q, keys, first_entries):
        return reason
    if k > _MOST_SELECTED:
        return f"{k} of them are to be selected, at most {_MOST_SELECTED}"
    if compiled and q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}, expected bfloat16"
    halves = 2 if isinstance(keys, KeyColumns) else 1
    for what, size, least in (("heads", q.shape[2], _LEAST_PRODUCT), ("channels", q.shape[3], halves * _LEAST_PRODUCT)):
        if compiled and (size & (size - 1) or size < least):
            return f"{size} {what} are not a power of two of at least {least}"
    return None


def _unserved_everywhere(q: Any, keys: Any, first_entries: Any) -> str | None:
    if first_entries is not None:
        return "rows of several documents"
    if reason := unaligned(keys):
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}, expected bfloat16 or float32"
    if q.size == 0 or keys.shape[2] == 0:
        return "there are no queries or no keys"
    if keys.shape[2] > MAX_ENTRIES:
        return f"{keys.shape[2]} keys, at most {MAX_ENTRIES}"
    return None


def unserved_by(q, keys, k, first_entries) -> dict[str, Callable[[Chip | None], str | None]]:
    """The rules in the form that ``choose`` takes."""
    return {
        "tpu": lambda chip: unserved(q, keys, k, first_entries),
        "tpu_interpret": lambda chip: unserved(q, keys, k, first_entries, compiled=False),
        "gpu": lambda chip: unserved_on_gpu(q, keys, k, first_entries),
        "gpu_interpret": lambda chip: unserved_on_gpu(q, keys, k, first_entries, compiled=False),
    }
