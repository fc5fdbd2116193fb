"""Selection on GPUs for ``index_topk``: the k largest of every part of a query's scores, round after round."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.index_topk.gpu_plan import Plan


def tournament(p: Plan, ordered, limits) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of scores [Q, T], of which ``limits`` [Q] are there: themselves and their indices.

    Both are [Q, k] in the order of indices; 0 and -1 where there are fewer.
    """
    found: Sequence[jax.Array] = (ordered,)
    for _, parts in p.rounds:
        operands = (limits, *found)
        shape = (limits.shape[0], parts * p.k)
        found = pl.pallas_call(
            functools.partial(_select_kernel, p),
            grid=(limits.shape[0], parts),
            in_specs=[whole(a) for a in operands],
            out_specs=[pl.BlockSpec(shape, lambda *_: (0, 0))] * 2,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.uint32), jax.ShapeDtypeStruct(shape, jnp.int32)],
            compiler_params=plgpu.CompilerParams(num_warps=p.parts.warps, num_stages=1),
            interpret=p.interpreted,
            name="index_topk_select",
        )(*operands)
        limits = pl.cdiv(limits, p.part) * p.k
    ordered, indices = found
    return ordered, indices


def whole(a: jax.Array) -> pl.BlockSpec:
    """An array that every program sees whole."""
    return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)


def _select_kernel(p: Plan, limits, values, *refs):
    *indices, values_out, indices_out = refs
    query, part = pl.program_id(0), pl.program_id(1)
    limit = limits[query]

    # A part that nobody needs leaves its places as they are: the next round's limit ends before them.
    @pl.when((part * p.part < limit) | (part == 0))
    def _():
        place = part * p.part + jnp.arange(p.part, dtype=jnp.int32)
        there = place < limit
        value = plgpu.load(values.at[query, place], mask=there, other=jnp.uint32(0))
        threshold = _kth(value, p.k)
        larger, equal = value > threshold, (value == threshold) & (value != 0)
        # Two cumulative sums in one; of those that equal the k-th, the first fill what is left.
        both = larger.astype(jnp.int32) + (equal.astype(jnp.int32) << 16)
        before = lax.cumsum(both)
        left = p.k - jnp.sum(larger.astype(jnp.int32))
        equals = before >> 16
        chosen = larger | (equal & (equals <= left))
        rank = (before & 0xFFFF) + jnp.minimum(equals, left) - 1
        index = place
        if indices:
            index = plgpu.load(indices[0].at[query, place], mask=chosen, other=jnp.int32(-1))
        # What has no place is beyond all of them, for the interpreter's sake.
        to = jnp.where(chosen, part * p.k + rank, values_out.shape[1])
        plgpu.store(values_out.at[query, to], value, mask=chosen)
        plgpu.store(indices_out.at[query, to], index, mask=chosen)
        slot = jnp.arange(pl.next_power_of_2(p.k), dtype=jnp.int32)
        empty = (slot < p.k) & (slot >= jnp.sum(chosen.astype(jnp.int32)))
        to = jnp.where(empty, part * p.k + slot, values_out.shape[1])
        plgpu.store(values_out.at[query, to], jnp.zeros(slot.shape, jnp.uint32), mask=empty)
        plgpu.store(indices_out.at[query, to], jnp.full(slot.shape, -1, jnp.int32), mask=empty)


def _kth(value, k: int):
    """The k-th largest of a vector of uint32, or a number below it that just k of them reach; 0 if there are fewer."""

    def going_on(state):
        bit, _, reached = state
        return (bit >= 0) & (reached != k)

    def halve(state):
        bit, found, reached = state
        higher = found | (jnp.uint32(1) << bit.astype(jnp.uint32))
        count = jnp.sum((value >= higher).astype(jnp.int32))
        enough = count >= k
        return bit - 1, jnp.where(enough, higher, found), jnp.where(enough, count, reached)

    return lax.while_loop(going_on, halve, (jnp.int32(31), jnp.uint32(0), jnp.int32(0)))[1]
