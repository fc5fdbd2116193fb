"""The declaration of ``index_topk``: its V4 shapes, costs and fallback rule (``pallas_kernels.registry``)."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.formats import FP4_BLOCK
from deepseek_v4.stored_rows import KeyColumns, KeyRows
from pallas_kernels.index_topk import gpu, gpu_plan, index_topk, tpu
from pallas_kernels.index_topk.cost import topk_cost
from pallas_kernels.index_topk.unserved import unserved, unserved_on_gpu
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import CONTEXTS, DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape, context_name
from pallas_kernels.targets import Chip

_LAYERS = 2
"""Layers stacked in the cache of a case: more than one, so that reading a layer as a slice would show as a copy."""

_CI = {
    "flash/decode/64x1M",
    "pro/decode/1x8K",
    "pro/prefill/2048x1M",
    "flash/fp4/decode/64x1M",
    "pro/fp4/prefill/2048x1M",
}


def _case(
    model: ModelShape, keys: str, phase: str, rows: int, context: int, queries: int = 1, *, by_rows: bool = False
) -> Case:
    """``by_rows``: FP4 keys are kept in rows, as on GPUs."""
    decode = phase == "decode"
    batch, length = (rows, queries) if decode else (1, rows)
    heads, width, entries = model.index_heads, model.index_dim, context // model.csa_ratio
    name = f"{model.name}/{keys}{phase}/{rows}x{context_name(context)}" + (f"x{queries}" if queries > 1 else "")
    sizes = {"batch": batch, "length": length, "heads": heads, "width": width, "entries": entries, "k": model.topk}
    # Whole rows of 128 of selected entries and their scores, twice while they are put in order.
    selected = 4 * batch * length * model.topk
    return Case(
        name=name,
        arguments={
            "q": jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16),
            "weights": jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
            "keys": _released_rows(batch, entries, width) if by_rows else _stored(keys, batch, entries, width),
            "counts": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            "layer": jax.ShapeDtypeStruct((), jnp.int32),
            "k": model.topk,
        },
        cost=topk_cost(
            **sizes,
            causal_ratio=model.csa_ratio,
            context=context,
            key_bytes=width // 2 + width // FP4_BLOCK if keys else None,
        ),
        protected=("keys",),
        temporaries_limit=16 * MIB if decode else 4 * selected + MIB,
        # Beside them, scores of as many queries as are worth a pass over the keys.
        gpu_temporaries_limit=16 * MIB if decode else 4 * selected + 33 * MIB,
        representative=name in _CI,
        values=functools.partial(_values, batch, length, context, model.csa_ratio),
        split={"q": 0, "weights": 0, "keys": 1, "counts": 0} if decode else {},
        on_gpus=_case(model, keys, phase, rows, context, queries, by_rows=True) if keys and not by_rows else None,
    )


def _released_rows(batch: int, entries: int, width: int) -> KeyRows:
    """The keys of a cache in FP4, in rows."""
    lead = (_LAYERS, batch, entries)
    return KeyRows(
        jax.ShapeDtypeStruct((*lead, width // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*lead, width // FP4_BLOCK), jnp.float8_e8m0fnu),
    )


def _stored(keys: str, batch: int, entries: int, width: int) -> Any:
    """The keys of a cache: numbers, or FP4 in columns."""
    if not keys:
        return jax.ShapeDtypeStruct((_LAYERS, batch, entries, width), jnp.bfloat16)
    words = (width // 8, -(-width // (4 * FP4_BLOCK)))
    return KeyColumns(*(jax.ShapeDtypeStruct((_LAYERS, batch, count, entries), jnp.uint32) for count in words))


def _values(batch: int, length: int, context: int, ratio: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The last ``length`` of ``context`` tokens in every row, which see every entry completed before them."""
    counts = (context - length + 1 + np.arange(length, dtype=np.int32)) // ratio
    return {"counts": np.broadcast_to(counts, (batch, length))}


def cases() -> tuple[Case, ...]:
    """Decode of 1, 64 and 256 rows and prefill of 2,048 queries at every context, of both models and forms of keys."""
    found = []
    for model, keys in itertools.product(MODELS, ("", "fp4/")):
        for context in CONTEXTS:
            found += [_case(model, keys, "decode", rows, context) for rows in DECODE_ROWS]
            found.append(_case(model, keys, "prefill", PREFILL_QUERIES, context))
        found.append(_case(model, keys, "decode", 64, 128 << 10, queries=4))
    return tuple(found)


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    rule = unserved_on_gpu if chip.platform == "cuda" else unserved
    return rule(arguments["q"], arguments["keys"], arguments["k"], None)


_TUNING = {
    "tpu": Tuning(
        shape_class=lambda arguments: tpu.shape_class(arguments["q"].shape[1]),
        candidates=lambda chip, arguments: tpu.CANDIDATES,
        run=lambda tiles: lambda **arguments: tpu.ranked_topk(**arguments, tiles=tiles)[1],
    ),
    "cuda": Tuning(
        shape_class=lambda arguments: gpu_plan.shape_class(arguments["q"].shape[1]),
        candidates=lambda chip, arguments: gpu_plan.CANDIDATES,
        run=lambda parts: lambda **arguments: gpu.ranked_topk(**arguments, parts=parts)[1],
    ),
}

OPERATION = Operation("index_topk", index_topk, cases, _unserved, _TUNING)
