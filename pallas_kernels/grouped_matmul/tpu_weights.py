"""The experts' weights in TPU kernels: which tile a grid step reads, and how it is decoded.

The grid is (core, block of rows, tile of the width M): a step has the tile of its block's expert, [tile, D] of W1 and
W3, [D, tile] of W2. Of FP4 the inputs of every 256 leave the decoder even ones first (``tpu_decode.decode_fp4``):
columns of D of W1 and W3, columns of M of W2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import decode_scale
from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul.tpu_plan import LANES, Plan, round_up


def operands_per_weight(plan: Plan) -> int:
    """A weight, and its scale if it has one."""
    return 1 if plan.kind == "bf16" else 2


def operands(plan: Plan, w1: Any, w2: Any, w3: Any, layer: jax.Array) -> tuple[list, list]:
    """(arrays, block specs) of W1, W3 and W2 stacked [L, E, ...]; layer and blocks' experts are prefetched first."""
    hidden, tile, tiles = plan.hidden, plan.tile, plan.tiles

    def column(core, j):
        return core * tiles + j

    def input_side(core, block, j, layer, expert, *_):
        return layer[0], expert[block], column(core, j), 0

    def output_side(core, block, j, layer, expert, *_):
        return layer[0], expert[block], 0, column(core, j)

    def whole(core, block, j, layer, expert, *_):
        return layer[0], expert[block], 0, 0

    def scales(core, block, j, layer, expert, *_):
        return expert[block], 0, 0

    packing = 2 if plan.packed else 1
    first_spec = pl.BlockSpec((None, None, tile, hidden // packing), input_side)
    second_spec = pl.BlockSpec((None, None, hidden, tile // packing), output_side)
    arrays, specs = [], []
    for (weight, scale), spec, scale_map in (
        (w1, first_spec, input_side),
        (w3, first_spec, input_side),
        (w2, second_spec, whole),
    ):
        arrays.append(weight)
        specs.append(spec)
        if plan.kind == "fp4":
            stored, exchanged = tpu_decode.scales_as_laid_out(scale)
            arrays.append(stored)
            rows, groups = tile if scale_map is input_side else hidden, scale.shape[-1]
            if exchanged:
                specs.append(pl.BlockSpec((None, None, groups, rows), _exchange(scale_map)))
            else:
                specs.append(pl.BlockSpec((None, None, rows, groups), scale_map))
        elif plan.kind == "fp8":
            of_layer = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
            arrays.append(decode_scale(of_layer))
            specs.append(pl.BlockSpec((None, *of_layer.shape[1:]), scales, memory_space=pltpu.SMEM))
    return arrays, specs


def _exchange(index_map):
    """An index map of blocks [.., N, G] for an array whose last two dims are exchanged."""

    def exchanged(*indices):
        *leading, rows, groups = index_map(*indices)
        return *leading, groups, rows

    return exchanged


def scratch(plan: Plan) -> list:
    """Memory for what is decoded."""
    hidden, tile = plan.hidden, plan.tile
    if plan.kind == "bf16":
        return []
    found = [
        pltpu.VMEM((tile // 2, hidden), jnp.uint32),
        pltpu.VMEM((tile // 2, hidden), jnp.uint32),
        pltpu.VMEM((hidden // 2, tile), jnp.uint32),
    ]
    if plan.packed:
        found += [
            pltpu.VMEM((tile // 2, round_up(hidden // 32, LANES)), jnp.uint32),
            pltpu.VMEM((hidden // 2, round_up(plan.width // 32, LANES)), jnp.uint32),
        ]
    return found


def vmem_bytes(plan: Plan) -> int:
    """Double-buffered tiles and what they are decoded to."""
    weight_bytes = {"fp4": 0.5, "fp8": 1, "bf16": 2}[plan.kind]
    blocks = 2 * 3 * plan.tile * plan.hidden * weight_bytes
    decoded = 0 if plan.kind == "bf16" else 3 * plan.tile * plan.hidden * 2
    scales = 0
    if plan.packed:
        lanes = round_up(plan.hidden // 32, LANES)
        out_lanes = round_up(plan.width // 32, LANES)
        scales = (2 * 2 + 2) * plan.tile * lanes + (2 + 2) * plan.hidden * out_lanes
    return int(blocks + decoded + scales)


def decode(plan: Plan, weights, decoded, column, new_expert):
    """This tile of W1, W3 and W2 as refs of bfloat16 [tile, D], [tile, D], [D, tile], or of pairs of rows as words."""
    if plan.kind == "bf16":
        return tuple(weight for (weight,) in weights)
    tile_blocks = plan.tile // LANES
    if plan.kind == "fp8":
        for i, ((weight, scale), words) in enumerate(zip(weights, decoded, strict=True)):
            start = column * tile_blocks

            def scale_at(row, chunk, scale=scale, start=start, second=i == 2):
                return scale[row, start + chunk] if second else scale[start + row, chunk]

            tpu_decode.decode_fp8(weight, scale_at, words, native=plan.native_fp8)
    else:
        *words, in_scales, out_scales = decoded
        for (weight, scale), out in zip(weights[:2], words[:2], strict=True):
            tpu_decode.fp4_scale_words(scale, in_scales, plan.hidden // 32 % LANES != 0)
            tpu_decode.decode_fp4(weight, in_scales, 0, out)

        @pl.when(new_expert)
        def spread_scales():
            tpu_decode.fp4_scale_words(weights[2][1], out_scales, plan.width // 32 % LANES != 0)

        tpu_decode.decode_fp4(weights[2][0], out_scales, column * (plan.tile // 32), words[2])
    return tuple(decoded[:3])


def read(plan: Plan, matrix, rows: int, columns: int, *, row=0, column=0) -> jax.Array:
    """bfloat16 [rows, columns] of a tile as ``decode`` gives it, from a row and a column (a multiple of 128) on."""
    at = slice(None) if columns == matrix.shape[1] else pl.ds(column, columns)
    if plan.kind == "bf16":
        return matrix[pl.ds(row, rows), at]
    return tpu_decode.paired_rows(matrix, row, rows, at)
