"""GPU kernels (Pallas on Triton) of ``index_topk``: scores of a few queries at a time, and a tournament among them.

Scores of a group of queries, as many as fit a fixed part of the L2 cache, are written as unsigned integers in the same
order: a program multiplies a tile of keys, numbers or FP4, which it decodes in registers, with one query after another,
heads along the columns, and adds them there. The selection then cuts every query's scores into parts, and a program per
part finds its k largest: the k-th by bisection of its bits with the part in registers, then the place of each by one
cumulative sum, which leaves them in the order of their indices. What is selected is the next round's input, until one
part is left. Each key is scored once, no sum crosses programs, and the result is exact whatever the parts. XLA puts the
k in descending order.

Written on the Triton backend of Pallas, which jax 0.10.2 has and 0.11 calls deprecated. Nothing here was ever timed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import FP4_BLOCK
from deepseek_v4.stored_rows import STORED, KeyColumns, KeyRows, layer_of
from pallas_kernels.gpu_decode import as_words, fp4_halves, fp4_tile
from pallas_kernels.index_topk.gpu_plan import FEW_QUERIES, KEYS, Parts, Plan, shape_class
from pallas_kernels.index_topk.gpu_select import tournament, whole
from pallas_kernels.targets import current_chip
from pallas_kernels.tuned import tuned

_WARPS = 4

_FEW_BYTES = 11 << 20
_MANY_BYTES = 32 << 20
"""Memory of scores and of what rounds select, in decode and in chunks of prompts."""


def ranked_topk(
    *,
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    k: int,
    first_row: jax.Array | int = 0,
    parts: Parts | None = None,
    budget: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What ``pallas_kernels.index_topk.index_topk`` selects with its scores: (float32 [B, S, K], int32 [B, S, K]).

    ``first_row`` is the row of the keys that belongs to the first of the B rows; ``budget`` the bytes of scores in
    memory (default: by the number of queries).
    """
    q, weights, keys = lax.stop_gradient((q, weights, keys))
    batch, length = q.shape[:2]
    parts = parts or tuned("index_topk", None if interpret else current_chip(), shape_class(length), Parts())
    if not isinstance(keys, STORED) and keys.dtype != q.dtype:
        keys, layer = layer_of(keys, layer)[None].astype(q.dtype), 0
    entries = keys.shape[2]
    budget = budget or (_FEW_BYTES if length <= FEW_QUERIES else _MANY_BYTES)
    p = Plan(batch, length, entries, min(k, entries), parts, budget, interpret)
    padding = p.row_blocks * p.queries - length
    limits = jnp.pad(jnp.clip(counts.astype(jnp.int32), 0, entries), ((0, 0), (0, padding)))
    limits = limits.reshape(p.blocks, p.queries)
    where = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(first_row, jnp.int32)])
    weights = weights.astype(jnp.float32)

    def some(first):
        own = lax.dynamic_slice_in_dim(limits, first, p.group).reshape(-1)
        at = jnp.concatenate([where, jnp.asarray(first, jnp.int32)[None]])
        return tournament(p, _scores(p, at, own, q, weights, keys), own)

    def visit(index, found):
        # The last blocks may be computed twice, with the same result.
        first = jnp.minimum(index * p.group, p.blocks - p.group)
        return jax.tree.map(
            lambda a, new: lax.dynamic_update_slice_in_dim(a, new, first * p.queries, 0), found, some(first)
        )

    if p.group == p.blocks:
        found = some(jnp.int32(0))
    else:
        shape = (p.blocks * p.queries, p.k)
        nothing = (jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.int32))
        found = lax.fori_loop(0, pl.cdiv(p.blocks, p.group), visit, nothing)
    ordered, indices = (a.reshape(batch, -1, p.k)[:, :length] for a in found)
    # Descending scores, ties to the lowest index; what was not selected comes last.
    falling, indices = lax.sort((~ordered, indices), dimension=-1, num_keys=2, is_stable=False)
    scores = lax.bitcast_convert_type(_bits(~falling), jnp.float32)
    return jnp.where(indices >= 0, scores, -jnp.inf), indices


def interpreted(**arguments: Any) -> tuple[jax.Array, jax.Array]:
    """The kernels in Pallas' interpreter."""
    return ranked_topk(**arguments, interpret=True)


def _scores(p: Plan, at, limits, q, weights, keys) -> jax.Array:
    """Scores of a group's queries as ordered integers, uint32 [Q, T in whole tiles]; 0 where a key is not visible.

    ``at`` is the layer, the first row of the keys and the group's first block. Tiles beyond all that the queries of a
    block see are not written.
    """
    # Keys in released bytes are two arrays of words, read in place.
    read, stored = _numbers, [keys]
    if isinstance(keys, KeyColumns):
        read, stored = _columns, [*keys]
    elif isinstance(keys, KeyRows):
        read, stored = _rows, [as_words(part) for part in keys]
    operands = (at, limits, q, weights, *stored)
    return pl.pallas_call(
        functools.partial(_score_kernel, p, read),
        # Blocks of queries that look at the same keys are neighbours in time.
        grid=(p.group, p.key_blocks),
        in_specs=[whole(a) for a in operands],
        out_specs=pl.BlockSpec((p.queries, KEYS), lambda block, tile: (block, tile)),
        out_shape=jax.ShapeDtypeStruct((p.group * p.queries, p.key_blocks * KEYS), jnp.uint32),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=2),
        interpret=p.interpreted,
        name="index_topk_scores",
    )(*operands)


def _score_kernel(p: Plan, read, at, limits, q, weights, *refs):
    *keys, out = refs
    own, tile = pl.program_id(0), pl.program_id(1)
    block = at[2] + own
    row, first = block // p.row_blocks, block % p.row_blocks * p.queries
    key = tile * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
    most = lax.fori_loop(0, p.queries, lambda i, most: jnp.maximum(most, limits[own * p.queries + i]), jnp.int32(0))
    width = q.shape[-1]
    # Columns enter two products, of the channels that their low nibbles hold and of the others; rows enter one.
    spans = [slice(0, width // 2), slice(width // 2, width)] if read is _columns else [slice(0, width)]

    def visit(i, rows):
        products = sum(
            lax.dot_general(
                part,
                _operand(p, q[row, first + i, :, span]),
                (((1,), (1,)), ((), ())),
                precision=dot_precision(part.dtype),
                preferred_element_type=jnp.float32,
            )
            for part, span in zip(rows, spans, strict=True)
        )
        total = jnp.sum(jnp.maximum(products, 0.0) * weights[row, first + i][None, :], axis=1)
        visible = key < limits[own * p.queries + i]
        out[i, :] = jnp.where(visible, _ordered(total), jnp.uint32(0))
        return rows

    real = jnp.minimum(p.queries, p.length - first)
    real = jnp.where(tile * KEYS < most, real, 0)

    @pl.when(real > 0)
    def _():
        rows = read(keys, (at[0], at[1] + row), key, p.entries, width)
        lax.fori_loop(0, real, visit, tuple(_operand(p, part) for part in rows))


def _numbers(keys, where, key, entries, width):
    """Keys [128, d] from [n, B, T, d]; 0 beyond the last."""
    (rows,) = keys
    shape = (KEYS, width)
    present = jnp.broadcast_to((key < entries)[:, None], shape)
    place = jnp.broadcast_to(jnp.where(key < entries, key, 0)[:, None], shape)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)
    return (plgpu.load(rows.at[(*where, place, channel)], mask=present, other=jnp.zeros((), rows.dtype)),)


def _rows(keys, where, key, entries, width):
    """Keys [128, d] of FP4 in rows (``deepseek_v4.stored_rows.KeyRows``), whose four scales are one word; as above."""
    codes, scales = keys
    present = key < entries
    place = jnp.where(present, key, 0)
    scale = plgpu.load(scales.at[(*where, place, 0)], mask=present, other=jnp.uint32(0))
    return (fp4_tile(*_numbers([codes], where, key, entries, width // 8), scale, jnp.bfloat16),)


def _columns(keys, where, key, entries, width):
    """Both halves [128, d / 2] of the channels of keys in columns (``deepseek_v4.stored_rows.KeyColumns``)."""
    codes, scales = keys
    shape = (KEYS, width // 8)
    present = jnp.broadcast_to((key < entries)[:, None], shape)
    place = jnp.broadcast_to(jnp.where(key < entries, key, 0)[:, None], shape)
    word = lax.broadcasted_iota(jnp.int32, shape, 1)

    def scale_bytes(half):
        group = (half * (width // 2) + word * 4) // FP4_BLOCK
        words = plgpu.load(scales.at[(*where, group // 4, place)], mask=present, other=jnp.uint32(0))
        return (words >> (group % 4 * 8).astype(jnp.uint32)) & jnp.uint32(255)

    words = plgpu.load(codes.at[(*where, word, place)], mask=present, other=jnp.uint32(0))
    return fp4_halves(words, (scale_bytes(0), scale_bytes(1)))


def _operand(p: Plan, a):
    # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
    return a.astype(jnp.float32) if p.interpreted else a


def _ordered(scores):
    """float32 numbers as unsigned integers in their order, all above 0 but for one NaN."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    # A negative weight times relu 0 is -0, which must tie with 0 and not rank below it.
    bits = jnp.where(bits == jnp.uint32(0x80000000), jnp.uint32(0), bits)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(0x80000000), ~bits)


def _bits(ordered):
    """The bits of ordered numbers."""
    return jnp.where(ordered >> 31 == 0, ~ordered, ordered & jnp.uint32(0x7FFFFFFF))
