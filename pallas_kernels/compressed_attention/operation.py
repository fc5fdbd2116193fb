"""The declaration of ``compressed_attention``: its V4 shapes, costs and fallback rule (``pallas_kernels.registry``)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.formats import KV_BLOCK
from deepseek_v4.stored_rows import COLUMN_TILE, KVColumns, KVRows, KVWords
from pallas_kernels.compressed_attention import blocks, compressed_attention, gpu, tpu, tpu_common, training_cases
from pallas_kernels.compressed_attention.cost import attention_cost
from pallas_kernels.registry import MIB, Case, Operation, Tuning
from pallas_kernels.shapes import CONTEXTS, DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape, context_name
from pallas_kernels.targets import Chip

_LAYERS = 2
"""Layers stacked in the cache of a case: more than one, so that reading a layer as a slice would show as a copy."""

_CI = {
    "flash/csa/decode/64x128K",
    "flash/csa-fp8/decode/64x1M",
    "pro/csa-fp8/prefill/2048x1M",
    "flash/hca/decode/64x1M",
    "flash/hca-fp8/decode/64x1M",
    "pro/hca-fp8/prefill/2048x1M",
    "flash/swa/decode/64x8K",
    "pro/csa/prefill/2048x1M",
    "pro/hca/prefill/2048x1M",
}


def _case(
    model: ModelShape, kind: str, phase: str, rows: int, queries: int, context: int, *, by_rows: bool = False
) -> Case:
    """``by_rows``: what is kept in the bytes of the release is kept in rows, the ring too, as on GPUs."""
    of, _, fp8 = kind.partition("-")
    ratio = {"csa": model.csa_ratio, "hca": model.hca_ratio, "swa": 0}[of]
    batch = rows if phase == "decode" else 1
    bf16, i32 = jnp.bfloat16, jnp.int32
    # As the cache lays its ring out for kernels: room to roll several queries back, whole tiles.
    # More rows than Pro has heads, too: a layer of the ring would else have the size of a result.
    ring = -(-(model.window + queries) // 16) * 16 if phase == "decode" else model.window
    arguments: dict[str, Any] = {
        "q": jax.ShapeDtypeStruct((batch, queries, model.heads, model.head_dim), bf16),
        "window": jax.ShapeDtypeStruct((batch, queries, model.head_dim), bf16),
        "ring": _rows(model, batch, ring)
        if by_rows
        else jax.ShapeDtypeStruct((_LAYERS, batch, ring, model.head_dim), bf16),
        "sink": jax.ShapeDtypeStruct((model.heads,), jnp.float32),
        "start": jax.ShapeDtypeStruct((batch,), i32),
        "layer": jax.ShapeDtypeStruct((), i32),
        "window_size": model.window,
        "scale": model.head_dim**-0.5,
    }
    split = {"q": 0, "window": 0, "ring": 1, "start": 0}
    selected = 0
    if ratio:
        total = context // ratio
        selected = min(model.topk, total) if of == "csa" else total
        arguments["entries"] = _rows(model, batch, total) if by_rows else _stored(model, kind, batch, total)
        arguments["counts"] = jax.ShapeDtypeStruct((batch, queries), i32)
        split |= {"entries": 1, "counts": 0}
        if of == "csa":
            arguments["indices"] = jax.ShapeDtypeStruct((batch, queries, selected), i32)
            split["indices"] = 0
    width = f"{rows}x{context_name(context)}" if phase == "decode" else f"{queries}x{context_name(context)}"
    extra = f"x{queries}" if phase == "decode" and queries > 1 else ""
    name = f"{model.name}/{kind}/{phase}/{width}{extra}"
    cost = attention_cost(
        batch=batch,
        length=queries,
        heads=model.heads,
        width=model.head_dim,
        window=model.window,
        entries=selected,
        indices=of == "csa",
        causal_ratio=ratio,
        context=context,
        entry_bytes=arguments["entries"].fetched_bytes if fp8 else None,
        ring_bytes=arguments["ring"].fetched_bytes if by_rows else None,
    )
    return Case(
        name=name,
        arguments=arguments,
        cost=cost,
        # Prefill puts the one window before its chunk in order, a read of 128 rows.
        protected=(("entries",) if ratio else ()) + (("ring",) if phase == "decode" else ()),
        temporaries_limit=16 * MIB,
        representative=name in _CI,
        split=split,
        values=functools.partial(_values, batch, queries, context, ratio, selected if of == "csa" else 0),
        on_gpus=_case(model, kind, phase, rows, queries, context, by_rows=True) if fp8 and not by_rows else None,
    )


def _rows(model: ModelShape, batch: int, total: int) -> KVRows:
    """Rows in the bytes of the release, 584 of them at a head_dim of 512."""
    kinds = (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float8_e8m0fnu)
    widths = KVRows.widths(model.head_dim, model.rope_dims)
    return KVRows(
        *(jax.ShapeDtypeStruct((_LAYERS, batch, total, n), kind) for n, kind in zip(widths, kinds, strict=True))
    )


def _stored(model: ModelShape, kind: str, batch: int, total: int) -> Any:
    """Entries as words of bfloat16, or in the bytes of the release: as words, or by columns, of which whole tiles."""
    if kind == "csa-fp8":
        words = (model.head_dim // 4, total * 2 * model.rope_dims // model.head_dim)
        return KVWords(
            *(jax.ShapeDtypeStruct((_LAYERS, batch, count, words[0]), jnp.uint32) for count in (total, words[1]))
        )
    if kind != "hca-fp8":
        return jax.ShapeDtypeStruct((_LAYERS, batch, total, model.head_dim // 2), jnp.uint32)
    content, rope = model.head_dim - model.rope_dims, model.rope_dims
    rows = (content // 4, rope // 2, -(-content // (4 * KV_BLOCK)))
    capacity = -(-total // COLUMN_TILE) * COLUMN_TILE
    return KVColumns(*(jax.ShapeDtypeStruct((_LAYERS, batch, count, capacity), jnp.uint32) for count in rows))


def _values(batch: int, queries: int, context: int, ratio: int, selected: int, rng: np.random.Generator) -> dict:
    """The last ``queries`` of ``context`` tokens in every row; they see what came before and select from all of it."""
    start = context - queries
    found = {"start": np.full(batch, start, np.int32), "layer": np.int32(_LAYERS - 1)}
    if ratio:
        counts = (start + 1 + np.arange(queries, dtype=np.int32)) // ratio
        found["counts"] = np.broadcast_to(counts, (batch, queries))
    if selected:
        # One of each of ``selected`` equal parts of what is visible, in any order.
        edges = np.maximum(counts[:, None] * np.arange(selected + 1) // selected, 0)
        sizes = np.diff(edges)
        chosen = edges[:, :-1] + (rng.random((batch, queries, selected)) * sizes).astype(np.int64)
        found["indices"] = rng.permuted(np.where(sizes > 0, chosen, -1), axis=-1).astype(np.int32)
    return found


def cases() -> tuple[Case, ...]:
    """Decode of 1, 64 and 256 rows and prefill of 2,048 queries at every context, of both models and all kinds."""
    found = []
    for model in MODELS:
        for kind in ("csa", "csa-fp8", "hca", "hca-fp8"):
            for context in CONTEXTS:
                found += [_case(model, kind, "decode", rows, 1, context) for rows in DECODE_ROWS]
                found.append(_case(model, kind, "prefill", 1, PREFILL_QUERIES, context))
            found.append(_case(model, kind, "decode", 64, 4, 128 << 10))
        found.append(_case(model, "swa", "decode", 64, 1, 8 << 10))
        found.append(_case(model, "swa", "prefill", 1, PREFILL_QUERIES, 8 << 10))
    return tuple(found)


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    if chip.platform == "cuda":
        return gpu.unserved(arguments["q"], arguments.get("entries"), arguments.get("ring"))
    return tpu.unserved(arguments["q"], arguments.get("entries"), arguments.get("indices"), arguments["window_size"])


def _run(kernel: Callable, **chosen: Any) -> Callable:
    """The kernel with block sizes of one's own, called as the public function is."""
    absent = dict.fromkeys(("ring", "entries", "counts", "indices"))
    return lambda **arguments: kernel(**{**absent, **arguments}, **chosen)


def _class(arguments: Mapping[str, Any]) -> str:
    return blocks.shape_class(arguments["q"].shape[2])


_TUNING = {
    "tpu": Tuning(
        shape_class=_class,
        candidates=lambda chip, arguments: tpu_common.CANDIDATES,
        run=lambda tiles: _run(tpu.compressed_attention, tiles=tiles),
    ),
    "cuda": Tuning(
        shape_class=_class,
        candidates=lambda chip, arguments: blocks.candidates(chip),
        run=lambda chosen: _run(gpu.compressed_attention, blocks=chosen),
    ),
}

OPERATIONS = (
    Operation("compressed_attention", compressed_attention, cases, _unserved, _TUNING),
    *training_cases.OPERATIONS,
)
