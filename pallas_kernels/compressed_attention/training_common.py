"""What the bodies of the two training kernels of attention share: who sees what, rows of a block, products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from deepseek_v4.execution import dot_precision
from pallas_kernels.compressed_attention.tpu_common import iota
from pallas_kernels.compressed_attention.training_plan import TrainingPlan


def split_refs(plan: TrainingPlan, refs: tuple) -> tuple[Any, Any, tuple]:
    """(entries or None, times or None, the rest)."""
    entries, refs = (refs[0], refs[1:]) if plan.rows else (None, refs)
    times, refs = (refs[0], refs[1:]) if plan.rows and plan.selected else (None, refs)
    return entries, times, refs


def entry_blocks(plan: TrainingPlan, bounds: Any) -> tuple[jax.Array, jax.Array]:
    """The first block of entries that this block of queries sees, and the one after the last."""
    flat = pl.program_id(1) * plan.blocks + pl.program_id(2)
    return bounds[2 * flat], bounds[2 * flat + 1]


def bring_window(plan: TrainingPlan, window: Any, previous: Any, own: Any) -> None:
    """The two blocks of window rows that the queries of a block see, one behind the other, once for all heads."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        window[: plan.query_block, :] = previous[0]
        window[plan.query_block :, :] = own[0]


def window_rows(plan: TrainingPlan, at: jax.Array) -> Any:
    """Which of these rows the queries from ``at`` on look at."""
    return pl.ds(at, plan.view) if plan.view < 2 * plan.query_block else slice(None)


def entry_rows(plan: TrainingPlan, block: jax.Array) -> Any:
    """The entries of a block."""
    return pl.ds(pl.multiple_of(block * plan.block, plan.block), plan.block)


def in_window(plan: TrainingPlan, limits: Any, at: jax.Array) -> jax.Array:
    """1.0 where a query-head sees a window row, else 0.0: [product_rows, view]."""
    p = plan
    first = at if p.view < 2 * p.query_block else 0

    def of(query):
        back = (at + query + p.query_block) - (first + iota(p.view, 1))
        return (back >= 0) & (back < limits[0, 0, at + query])

    return _by_query(p, [jnp.where(of(query), 1.0, 0.0) for query in range(p.queries)])


def selected(plan: TrainingPlan, limits: Any, times: Any, at: jax.Array, block: jax.Array) -> jax.Array:
    """How often a query-head sees an entry of a block: [product_rows, block] float32."""
    p = plan
    if times is not None:
        found = times[0, pl.ds(at, p.queries), entry_rows(p, block)].astype(jnp.int32).astype(jnp.float32)
        return _by_query(p, [found[query : query + 1] for query in range(p.queries)])
    entry = block * p.block + iota(p.block, 1)

    def of(query):
        return (entry >= limits[0, 1, at + query]) & (entry < limits[0, 2, at + query])

    return _by_query(p, [jnp.where(of(query), 1.0, 0.0) for query in range(p.queries)])


def _by_query(plan: TrainingPlan, rows: list[jax.Array]) -> jax.Array:
    """Rows [1, K] of queries, for every head of theirs."""
    return jnp.concatenate([jnp.broadcast_to(row, (plan.head_block, row.shape[1])) for row in rows], axis=0)


def tiled(plan: TrainingPlan, of_heads: jax.Array) -> jax.Array:
    """[head_block, 1] for every query of a product: [product_rows, 1]."""
    return jnp.concatenate([of_heads] * plan.queries, axis=0) if plan.queries > 1 else of_heads


def _diagonal(plan: TrainingPlan, g: jax.Array) -> jax.Array:
    """Which of the heads on lanes a head of block ``g`` on sublanes is."""
    return iota(plan.heads // plan.cores, 1) == g * plan.head_block + iota(plan.head_block, 0)


def read_columns(plan: TrainingPlan, sums: Any, at: jax.Array, g: jax.Array) -> jax.Array:
    """The logs of sums of a product's query-heads, turned from lanes to sublanes: [product_rows, 1]."""
    found = sums[0, 0, pl.ds(at, plan.queries), :]
    mine = _diagonal(plan, g)
    return jnp.concatenate(
        [
            jnp.sum(jnp.where(mine, found[query : query + 1], 0.0), axis=1, keepdims=True)
            for query in range(plan.queries)
        ],
        axis=0,
    )


def write_columns(plan: TrainingPlan, sums: Any, at: jax.Array, g: jax.Array, column: jax.Array) -> None:
    """The opposite: [product_rows, 1] to the lanes of head block ``g``, the others left as they are."""
    p = plan
    mine = _diagonal(p, g)
    rows = [
        jnp.sum(jnp.where(mine, column[query * p.head_block : (query + 1) * p.head_block], 0.0), axis=0, keepdims=True)
        for query in range(p.queries)
    ]
    lane = iota(p.heads // p.cores, 1)
    here = (lane >= g * p.head_block) & (lane < (g + 1) * p.head_block)
    before = sums[0, 0, pl.ds(at, p.queries), :]
    sums[0, 0, pl.ds(at, p.queries), :] = jnp.where(here, jnp.concatenate(rows, axis=0), before)


def contract(plan: TrainingPlan, a: jax.Array, b: jax.Array, axis: int, other: int) -> jax.Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    if plan.interpreted:
        # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(
        a,
        b,
        (((axis,), (other,)), ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
