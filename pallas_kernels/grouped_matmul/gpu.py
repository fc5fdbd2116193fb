"""GPU kernels (Pallas on Triton) of the expert MLP: each expert's packed weights are read once, decoded in registers.

Assignments are sorted by expert and cut into blocks of rows that never mix experts. One kernel multiplies a block of
rows with a tile of W1 and of W3, clamps, activates, multiplies and weighs them: the hidden activations of all
assignments are what lies in memory between the two. The other multiplies them with a tile of W2; every assignment has
a row of its own in its float32 result, and those of a token are added in the order of its choices. Products are
transposed, weights first, as in ``block_scaled_matmul.gpu``: an expert with few rows wastes little of a tensor core.

A product takes 128 inputs, in order, and a row's sums involve no other row: a token's result does not depend on its
company. Written on the Triton backend of Pallas, which jax 0.10.2 has and 0.11 calls deprecated;
never timed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.formats import ACTIVATION_BLOCK, FP8_BLOCK, decode_scale, simulate_fp8
from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels import gpu_decode
from pallas_kernels.block_scaled_matmul.blocks import Blocks
from pallas_kernels.grouped_matmul import blocks as row_blocks
from pallas_kernels.grouped_matmul.gpu_blocks import blocks_for
from pallas_kernels.grouped_matmul.unserved import unserved_inputs
from pallas_kernels.targets import Chip, current_chip

_INPUTS = FP8_BLOCK
"""Inputs per product: those that share a scale of FP8, and a word of scales of FP4."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    kind: str
    choices: int
    limit: float
    blocks: Blocks
    interpreted: bool


def unserved(chip: Chip | None, x: jax.Array, w1: tuple, w2: tuple, *, adapted: bool = False) -> str | None:
    """Why the kernels cannot serve a call, or None: bfloat16 rows, dims that are multiples of 128, and no adapters."""
    if (reason := unserved_inputs(x, w1, adapted=adapted)) is not None:
        return reason
    hidden, width = w2[0].shape[-2], w1[0].shape[-2]
    if hidden % _INPUTS or width % _INPUTS:
        return f"hidden size {hidden} and expert width {width} must be multiples of {_INPUTS}"
    return None


def expert_mlp(
    x,
    expert_ids,
    expert_weights,
    w1,
    w2,
    w3,
    *,
    limit,
    simulate_activations,
    layer,
    blocks: Blocks | None = None,
    interpret=False,
):
    """See ``pallas_kernels.grouped_matmul.expert_mlp``; ``blocks`` default to the chip's."""
    if layer is None:
        w1, w2, w3 = (tuple(None if a is None else a[None] for a in w) for w in (w1, w2, w3))
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    weight, scale = w1
    tokens, choices = expert_ids.shape
    experts, width = weight.shape[1:3]
    hidden_size = x.shape[-1]
    blocks = blocks or blocks_for(None if interpret else current_chip(), tokens, choices, experts)
    kind = "bf16" if scale is None else "fp4" if weight.dtype == jnp.uint8 else "fp8"
    plan = Plan(kind, choices, float(limit), blocks, interpret)
    served = (expert_ids >= 0) & (expert_ids < experts)
    ids = jnp.where(served, expert_ids, experts)
    cut = row_blocks.sort_into_blocks(ids, expert_weights, experts=experts, rows=blocks.rows)
    table = (layer.reshape(1), cut.expert, cut.first, cut.size, cut.assignment)
    gate, down, up = (_operands(w, layer) for w in (w1, w2, w3))
    hidden = _call(
        plan, _gate_and_up, (*table, cut.routing, x, *gate, *up), (tokens * choices, width), x.dtype, "gate_and_up"
    )
    if simulate_activations:
        hidden = simulate_fp8(hidden, ACTIVATION_BLOCK)
    out = _call(plan, _down, (*table, hidden, *down), (tokens * choices, hidden_size), jnp.float32, "down")
    # Rows of assignments that are served elsewhere were not written.
    out = jnp.where(served.reshape(-1, 1), out, 0.0).reshape(tokens, choices, hidden_size)
    return functools.reduce(jnp.add, [out[:, choice] for choice in range(choices)])


def _operands(linear, layer) -> tuple[jax.Array, ...]:
    """A stored linear as kernels read it: words in place; of FP8 the layer's scales in float32, which are few."""
    weight, scale = linear
    if scale is None:
        return (weight,)
    if weight.dtype == jnp.uint8:
        return gpu_decode.as_words(weight), gpu_decode.as_words(scale)
    return gpu_decode.as_words(weight), decode_scale(lax.dynamic_index_in_dim(scale, layer, keepdims=False))


def _call(plan: Plan, kernel, operands, shape, dtype, name):
    number = operands[1].size
    blocks = plan.blocks
    return pl.pallas_call(
        functools.partial(kernel, plan),
        # Blocks of rows of one expert are neighbours in time: all but the first find a tile of weights in the L2 cache.
        grid=(number, shape[1] // blocks.outputs),
        in_specs=[pl.BlockSpec(a.shape, lambda i, j, n=a.ndim: (0,) * n) for a in operands],
        out_specs=pl.BlockSpec(shape, lambda i, j: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=plan.interpreted,
        name=f"expert_mlp_{name}_{plan.kind}",
    )(*operands)


def _gate_and_up(plan: Plan, layer, expert, first, size, assignment, routing, x, *refs):
    *weights, out = refs
    gate, up = weights[: len(weights) // 2], weights[len(weights) // 2 :]
    at, present = _rows(plan, first, size)
    token = plgpu.load(assignment.at[at], mask=present, other=0) // plan.choices
    gate, up = _products(plan, layer, expert, size, x, token, present, (gate, up))
    weight = plgpu.load(routing.at[at], mask=present, other=0.0)
    hidden = clamped_swiglu(gate, up, plan.limit) * weight[None, :]
    _store(plan, out, at, present, hidden)


def _down(plan: Plan, layer, expert, first, size, assignment, hidden, *refs):
    *weights, out = refs
    at, present = _rows(plan, first, size)
    (product,) = _products(plan, layer, expert, size, hidden, at, present, (weights,))
    _store(plan, out, plgpu.load(assignment.at[at], mask=present, other=0), present, product)


def _rows(plan: Plan, first, size):
    """Sorted positions of this block's rows, 0 where there is none, and which there are."""
    block = pl.program_id(0)
    row = jnp.arange(plan.blocks.rows, dtype=jnp.int32)
    present = row < size[block]
    return jnp.where(present, first[block] + row, 0), present


def _outputs(plan: Plan):
    return pl.program_id(1) * plan.blocks.outputs + jnp.arange(plan.blocks.outputs, dtype=jnp.int32)


def _store(plan: Plan, out, row, present, values):
    """``values`` [outputs, rows] to their places."""
    # The interpreter writes back what it found where the mask says no: that must be no row's place.
    row = jnp.where(present, row, out.shape[0])
    mask = jnp.broadcast_to(present[:, None], (plan.blocks.rows, plan.blocks.outputs))
    plgpu.store(out.at[row[:, None], _outputs(plan)[None, :]], values.T.astype(out.dtype), mask=mask)


def _products(plan: Plan, layer, expert, size, x, row, present, linears):
    """The tile of outputs of each linear of this block's expert, times the rows of x: float32 [outputs, rows] each."""
    block = pl.program_id(0)
    layer, expert = layer[0], expert[block]
    outputs, scale_row = _outputs(plan), pl.program_id(1) * plan.blocks.outputs // FP8_BLOCK
    mask = jnp.broadcast_to(present[:, None], (plan.blocks.rows, _INPUTS))
    # What the CPU under the interpreter lacks some products of; in float32 the same products are exact.
    dtype = jnp.float32 if plan.interpreted else x.dtype

    def multiply(linear, rows, k):
        weight, *scale = linear
        if plan.kind == "bf16":
            matrix = _columns(weight, layer, expert, outputs, k, _INPUTS)
        else:
            words = _INPUTS // gpu_decode.WORD // (2 if plan.kind == "fp4" else 1)
            matrix = _columns(weight, layer, expert, outputs, k, words)
            if plan.kind == "fp4":
                matrix = gpu_decode.fp4_tile(matrix, scale[0][layer, expert, outputs, k], dtype)
            else:
                matrix = gpu_decode.e4m3_tile(matrix, dtype)
        product = lax.dot_general(
            matrix.astype(dtype), rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        if plan.kind == "fp8":
            product *= scale[0][expert, scale_row, k]
        return product

    def step(k, totals):
        column = k * _INPUTS + jnp.arange(_INPUTS, dtype=jnp.int32)
        rows = plgpu.load(x.at[row[:, None], column[None, :]], mask=mask, other=jnp.zeros((), x.dtype)).astype(dtype)
        return tuple(total + multiply(linear, rows, k) for total, linear in zip(totals, linears, strict=True))

    nothing = jnp.zeros((plan.blocks.outputs, plan.blocks.rows), jnp.float32)
    steps = jnp.minimum(size[block], 1) * (x.shape[1] // _INPUTS)
    return lax.fori_loop(0, steps, step, (nothing,) * len(linears))


def _columns(weight, layer, expert, outputs, k, number):
    """Columns k * number .. of some rows of an expert's matrix."""
    column = k * number + jnp.arange(number, dtype=jnp.int32)
    return weight[layer, expert, outputs[:, None], column[None, :]]
