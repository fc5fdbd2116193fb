"""GPU kernel (Pallas on Triton): dense linears whose E4M3 weights are read once and decoded in registers.

A program computes a tile of outputs by rows, transposed: the decoded weight is then the operand that tensor cores take
from registers, and few rows waste little of them. Each step takes 128 inputs, which share one scale per tile: the
product of bare codes is multiplied by it in float32. A row's sums involve no other row, in an order that is always the
same. Written on the Triton backend of Pallas, which jax 0.10.2 has and 0.11 calls deprecated; never timed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.formats import FP8_BLOCK, decode_scale
from pallas_kernels import gpu_decode
from pallas_kernels.block_scaled_matmul.blocks import Blocks, blocks_for
from pallas_kernels.targets import current_chip

_FEWEST_ROWS = 16
"""Rows of the smallest product that Triton gives to tensor cores."""


def block_scaled_matmul(x, weight, scale, *, groups, layer, blocks: Blocks | None = None, interpret=False):
    """See ``pallas_kernels.block_scaled_matmul.block_scaled_matmul``; ``blocks`` default to the chip's."""
    if layer is None:
        weight, scale = weight[None], scale[None]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    outputs, inputs = weight.shape[1:]
    leading = x.shape[: -1 if groups == 1 else -2]
    rows = math.prod(leading)
    blocks = blocks or blocks_for(None if interpret else current_chip(), rows)
    row_tile = min(blocks.rows, max(_FEWEST_ROWS, pl.next_power_of_2(rows)))
    scale = decode_scale(lax.dynamic_index_in_dim(scale, layer, keepdims=False))
    weight = gpu_decode.as_words(weight)
    # Tiles of rows that share a tile of the weight are neighbours in time: all but the first find it in the L2 cache.
    grid = (pl.cdiv(rows, row_tile), outputs // blocks.outputs)
    whole = [
        pl.BlockSpec(a.shape, lambda i, j, n=a.ndim: (0,) * n)
        for a in (layer.reshape(1), scale, jax.ShapeDtypeStruct((rows, groups, inputs), x.dtype), weight)
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, tile=row_tile, outputs=blocks.outputs, exact=interpret),
        grid=grid,
        in_specs=whole,
        out_specs=pl.BlockSpec((rows, outputs), lambda i, j: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="block_scaled_matmul",
    )(layer.reshape(1), scale, x.reshape(rows, groups, inputs), weight)
    return out.reshape(*leading, outputs) if groups == 1 else out.reshape(*leading, groups, outputs // groups)


def _kernel(layer_ref, scale_ref, x_ref, weight_ref, out_ref, *, rows, tile, outputs, exact):
    total, (groups, inputs) = weight_ref.shape[1], x_ref.shape[1:]
    row = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    first = pl.program_id(1) * outputs
    output = first + jnp.arange(outputs, dtype=jnp.int32)
    group = first // (total // groups)
    present = row < rows
    source = jnp.where(present, row, 0)
    layer = layer_ref[0]
    place = jnp.arange(FP8_BLOCK, dtype=jnp.int32)
    word = jnp.arange(FP8_BLOCK // gpu_decode.WORD, dtype=jnp.int32)
    # What the CPU under the interpreter lacks some products of; in float32 the same products are exact.
    dtype = jnp.float32 if exact else x_ref.dtype

    def step(k, acc):
        column = (k * FP8_BLOCK + place)[None, :]
        words = weight_ref[layer, output[:, None], (k * word.size + word)[None, :]]
        codes = gpu_decode.e4m3_tile(words, dtype)
        mask = jnp.broadcast_to(present[:, None], (tile, FP8_BLOCK))
        x = plgpu.load(x_ref.at[source[:, None], group, column], mask=mask, other=jnp.zeros((), x_ref.dtype))
        product = lax.dot_general(codes, x.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return acc + product * scale_ref[first // FP8_BLOCK, k]

    acc = lax.fori_loop(0, inputs // FP8_BLOCK, step, jnp.zeros((outputs, tile), jnp.float32))
    mask = jnp.broadcast_to(present[:, None], (tile, outputs))
    plgpu.store(out_ref.at[row[:, None], output[None, :]], acc.T.astype(out_ref.dtype), mask=mask)
