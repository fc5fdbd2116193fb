"""The declaration of ``compress``: its V4 shapes, costs and fallback rule (``pallas_kernels.registry``)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import YarnScaling
from deepseek_v4.layer_spec import RopeSpec
from pallas_kernels.compress import compress, gpu, tpu
from pallas_kernels.compress.cost import compress_cost
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import DECODE_ROWS, FLASH, PREFILL_QUERIES
from pallas_kernels.targets import Chip

_LAYERS = 2
"""Layers stacked in the rings of a case: more than one, so that reading a layer as a slice would show as a copy."""

_CONTEXT = 128 << 10
_CI = {"flash-pro/csa/decode/64", "flash-pro/hca/decode/64", "flash-pro/csa/prefill/2048", "flash-pro/hca/prefill/2048"}


def _case(kind: str, batch: int, length: int) -> Case:
    # Compressors of Flash and Pro are of the same sizes.
    model = FLASH
    overlap = kind != "hca"
    ratio = model.csa_ratio if overlap else model.hca_ratio
    width = model.index_dim if kind == "index" else model.head_dim
    pool_rows, channels = (2 * ratio, 2 * width) if overlap else (ratio, width)
    decode = length < PREFILL_QUERIES
    ring = -(-(pool_rows - 1 + (length if decode else 1)) // 8) * 8
    rows = jax.ShapeDtypeStruct((batch, length, channels), jnp.float32)
    rings = jax.ShapeDtypeStruct((_LAYERS, batch, ring, channels), jnp.float32)
    name = f"flash-pro/{kind}/{'decode' if decode else 'prefill'}/{batch if decode else length}"
    name += f"x{length}" if decode and length > 1 else ""
    start = _starts(batch, length)
    completed = int(np.sum((start + length) // ratio - start // ratio))
    return Case(
        name=name,
        arguments={
            "kv": rows,
            "score": rows,
            "norm_weight": jax.ShapeDtypeStruct((width,), jnp.bfloat16),
            "start": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "kv_ring": rings,
            "score_ring": rings,
            "layer": jax.ShapeDtypeStruct((), jnp.int32),
            "ratio": ratio,
            "overlap": overlap,
            "rope": RopeSpec(160000.0, model.rope_dims, YarnScaling(16.0, 32.0, 1.0, 65536)),
            "norm_eps": 1e-6,
            "dtype": jnp.bfloat16,
        },
        cost=compress_cost(completed=completed, pool_rows=pool_rows, width=width),
        protected=("kv_ring", "score_ring") if decode else ("kv", "score"),
        temporaries_limit=4 * MIB,
        representative=name in _CI,
        split=dict.fromkeys(("kv", "score", "start", "lengths"), 0) | dict.fromkeys(("kv_ring", "score_ring"), 1),
        values=functools.partial(_values, batch, length),
    )


def _starts(batch: int, length: int) -> np.ndarray:
    """Sequences in every phase of a window, the first of them about to complete one."""
    return (_CONTEXT - length - np.arange(batch)).astype(np.int32)


def _values(batch: int, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"start": _starts(batch, length), "lengths": np.full(batch, length, np.int32)}


def cases() -> tuple[Case, ...]:
    """Decode and prefill of CSA, HCA and index keys; sizes are those of Flash and of Pro alike."""
    found = []
    for kind in ("csa", "hca", "index"):
        found += [_case(kind, batch, 1) for batch in DECODE_ROWS]
        found.append(_case(kind, 64, 4))
        found += [_case(kind, 1, length) for length in (PREFILL_QUERIES, 4 * PREFILL_QUERIES)]
    return tuple(found)


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    if chip.platform == "cuda":
        return gpu.unserved(*(arguments[name] for name in ("kv", "kv_ring", "overlap", "rope", "dtype")))
    names = ("kv", "kv_ring", "ratio", "overlap", "rope", "dtype")
    return tpu.unserved(chip, **{name: arguments[name] for name in names})


_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu.shape_class(*arguments["kv"].shape[1:]),
        candidates=lambda chip, arguments: tpu.CANDIDATES,
        run=lambda tiles: functools.partial(tpu.compress, tiles=tiles),
    )
}

OPERATION = Operation("compress", compress, cases, _unserved, _TUNING)
