"""Which calls the kernel of ``index_topk`` serves."""

from typing import Any

import jax.numpy as jnp

from deepseek_v4.stored_rows import KeyRows
from pallas_kernels.index_topk.tpu_keys import unaligned
from pallas_kernels.index_topk.tpu_search import CHUNK, LANES, MAX_ENTRIES


def unserved(q: Any, keys: Any, k: int, first_entries: Any, *, compiled: bool = True) -> str | None:
    """Why the kernel cannot serve q [B, S, Hi, di] with keys [n, B, T, di], or None. ``compiled``: not interpreted."""
    if first_entries is not None:
        return "rows of several documents"
    if isinstance(keys, KeyRows):
        return "keys in the published layout by rows"
    if reason := unaligned(keys):
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}, expected bfloat16 or float32"
    if q.size == 0 or keys.shape[2] == 0:
        return "there are no queries or no keys"
    if keys.shape[2] > MAX_ENTRIES:
        return f"{keys.shape[2]} keys, at most {MAX_ENTRIES}"
    if k > CHUNK:
        return f"{k} of them are to be selected, at most {CHUNK}"
    if compiled and q.shape[-1] % LANES:
        return f"keys of {q.shape[-1]} channels are not a multiple of {LANES}"
    return None
