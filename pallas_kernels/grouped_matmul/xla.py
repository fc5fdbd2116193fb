"""The readable twin of ``expert_mlp``: assignments sorted by expert, in blocks that never mix experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import (
    ACTIVATION_BLOCK,
    dequantize,
    dequantize_fp4_planes,
    from_bytes,
    simulate_fp8,
    sliceable,
)
from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels.grouped_matmul.blocks import Blocks, sort_into_blocks

_FEWEST_ROWS = 8
_MOST_ROWS = 512

Adapter = tuple[jax.Array, jax.Array]


class Matrix(NamedTuple):
    """One expert's decoded matrix [out, in] and its adapter.

    Columns are dealt out over ``planes``, of which FP4 has two: column c is number c // planes of plane c % planes.
    """

    dealt: jax.Array
    planes: int
    adapter: Adapter | None

    def deal(self, rows):
        """rows [R, in] in the order of the columns."""
        if self.planes == 1:
            return rows
        return jnp.swapaxes(rows.reshape(rows.shape[0], -1, self.planes), 1, 2).reshape(rows.shape)

    def collect(self, rows):
        """The inverse of ``deal``."""
        if self.planes == 1:
            return rows
        return jnp.swapaxes(rows.reshape(rows.shape[0], self.planes, -1), 1, 2).reshape(rows.shape)


class ExpertLinear(NamedTuple):
    """One linear of all experts: weight and scale as stored, [L*E, ...], and its adapter (a [E, r, in], b [E, out, r]).

    ``first`` is the row of the first expert of the layer in use; ``types`` are those of weight and scale, which are
    held as ``formats.sliceable`` says.
    """

    weight: jax.Array
    scale: jax.Array | None
    adapter: Adapter | None
    first: jax.Array | int
    types: tuple[Any, Any]

    def of(self, expert, dtype) -> Matrix:
        """The matrix of one expert and its adapter, in ``dtype``."""
        at = self.first + expert
        weight = from_bytes(self.weight[at], self.types[0])
        scale = None if self.scale is None else from_bytes(self.scale[at], self.types[1])
        adapter = self.adapter and (self.adapter[0][expert].astype(dtype), self.adapter[1][expert].astype(dtype))
        if scale is not None and weight.dtype == jnp.uint8:
            return Matrix(dequantize_fp4_planes(weight, scale, dtype), 2, adapter)
        return Matrix(dequantize(weight, scale, dtype), 1, adapter)


def expert_linears(weights, layer, adapters) -> tuple[list[ExpertLinear], int]:
    """w1, w2, w3 of ``expert_mlp`` with their adapters, and the number of experts."""
    experts = weights[0][0].shape[-3]
    # A stack of layers is one long row of experts: slicing out a layer first would copy all of its weights.
    first = 0 if layer is None else layer * experts
    linears = [
        ExpertLinear(_in_a_row(weight), _in_a_row(scale), adapter, first, (weight.dtype, getattr(scale, "dtype", None)))
        for (weight, scale), adapter in zip(weights, adapters or (None, None, None), strict=True)
    ]
    return linears, experts


def _in_a_row(stack):
    return None if stack is None else sliceable(stack.reshape(-1, *stack.shape[-2:]))


def expert_mlp(x, expert_ids, expert_weights, w1, w2, w3, **options):
    """See ``pallas_kernels.grouped_matmul.expert_mlp``."""
    return expert_mlp_saving(x, expert_ids, expert_weights, w1, w2, w3, **options)[0]


def expert_mlp_saving(
    x,
    expert_ids,
    expert_weights,
    w1,
    w2,
    w3,
    *,
    limit,
    simulate_activations,
    layer=None,
    adapters=None,
):
    """(``expert_mlp``, (gate, up) before clamp and activation, [blocks, rows, M] in the dtype of x)."""
    (gate_linear, down_linear, up_linear), experts = expert_linears((w1, w2, w3), layer, adapters)
    blocks, rows = cut(expert_ids, expert_weights, experts)
    tokens, choices = expert_ids.shape
    width, hidden_width = x.shape[-1], w1[0].shape[-2]

    def run_block(_, inputs):
        index, expert, assignment, routing = inputs

        def compute():
            inputs = x[assignment // choices]
            gate = linear(inputs, gate_linear.of(expert, x.dtype))
            up = linear(inputs, up_linear.of(expert, x.dtype))
            hidden = (clamped_swiglu(gate, up, limit) * routing[:, None]).astype(x.dtype)
            if simulate_activations:
                hidden = simulate_fp8(hidden, ACTIVATION_BLOCK)
            out = linear(hidden, down_linear.of(expert, x.dtype))
            return out, gate.astype(x.dtype), up.astype(x.dtype)

        def skip():
            unused = jnp.zeros((rows, hidden_width), x.dtype)
            return jnp.zeros((rows, width), jnp.float32), unused, unused

        return None, lax.cond(index < blocks.used, compute, skip)

    used, assignment = blocks.table(rows)
    routing = jnp.where(used, expert_weights.astype(jnp.float32).reshape(-1)[assignment], 0.0)
    indices = jnp.arange(blocks.expert.size)
    _, (out, gate, up) = lax.scan(run_block, None, (indices, blocks.expert, assignment, routing))
    return sum_of_choices(out, used, assignment, tokens, choices), (gate, up)


def cut(expert_ids, expert_weights, experts: int) -> tuple[Blocks, int]:
    """The blocks that the assignments are cut into, and how many rows a block has.

    About the mean group, a power of two, so that neither padding nor re-decoding dominates: a matrix takes as long to
    decode as to multiply with several rows.
    """
    tokens, mean = expert_ids.shape[0], max(1, expert_ids.size // experts)
    fewest = min(tokens, _FEWEST_ROWS)  # more rows than tokens choose no expert
    rows = min(_MOST_ROWS, 1 << (max(mean, fewest) - 1).bit_length())
    ids = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts)
    return sort_into_blocks(ids, expert_weights, experts=experts, rows=rows), rows


def sum_of_choices(values, used, assignment, tokens: int, choices: int):
    """Rows of blocks [blocks, rows, d], brought back and added in the order of the choices: [tokens, d]."""
    count = used.size
    row = jnp.full(tokens * choices, count, jnp.int32)
    row = row.at[jnp.where(used, assignment, row.size)].set(jnp.arange(count).reshape(used.shape), mode="drop")
    gathered = values.reshape(count, -1)[jnp.minimum(row, count - 1)]
    return jnp.sum(jnp.where((row < count)[:, None], gathered, 0.0).reshape(tokens, choices, -1), axis=1)


def linear(rows, matrix: Matrix):
    """rows [R, in] times one expert's matrix, and its adapter's product added: float32 [R, out]."""
    out = product("nk,mk->nm", matrix.deal(rows), matrix.dealt)
    if matrix.adapter is not None:
        a, b = matrix.adapter
        low = product("nk,rk->nr", rows, a).astype(rows.dtype)
        out += product("nr,mr->nm", low, b)
    return out


def product(equation, a, b):
    """A product of matrices of one dtype, accumulated and returned in float32."""
    return jnp.einsum(equation, a, b, precision=dot_precision(a.dtype), preferred_element_type=jnp.float32)
