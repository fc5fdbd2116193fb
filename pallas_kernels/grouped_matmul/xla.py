"""The readable twin of ``expert_mlp``: assignments sorted by expert, in blocks that never mix experts."""

import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import ACTIVATION_BLOCK, dequantize, simulate_fp8
from deepseek_v4.nn.swiglu import clamped_swiglu


def expert_mlp(x, expert_ids, expert_weights, w1, w2, w3, *, limit, simulate_activations, layer=None):
    """See ``pallas_kernels.grouped_matmul.expert_mlp``."""
    tokens, choices = expert_ids.shape
    experts = w1[0].shape[-3]
    # A stack of layers is one long row of experts: slicing out a layer first would copy all of its weights.
    w1, w2, w3 = (tuple(None if a is None else a.reshape(-1, *a.shape[-2:]) for a in w) for w in (w1, w2, w3))
    first_expert = 0 if layer is None else layer * experts
    width = x.shape[-1]
    assignments = tokens * choices

    # Sort the assignments by expert; those of other shards go to a last, skipped group.
    local = (expert_ids >= 0) & (expert_ids < experts)
    flat = jnp.where(local, expert_ids, experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=experts + 1)[:experts]

    # Give every expert whole blocks of rows, so that one block reads one expert.
    block = _block_rows(assignments, experts)
    blocks = (assignments + min(experts, assignments) * (block - 1)) // block
    expert_blocks = -(-sizes // block)
    first_block = jnp.cumsum(expert_blocks) - expert_blocks
    first_row = jnp.cumsum(sizes) - sizes
    used_blocks = jnp.sum(expert_blocks)
    block_expert = jnp.repeat(jnp.arange(experts), expert_blocks, total_repeat_length=blocks)
    row_in_group = (jnp.arange(blocks) - first_block[block_expert])[:, None] * block + jnp.arange(block)
    row_used = (row_in_group < sizes[block_expert][:, None]) & (jnp.arange(blocks) < used_blocks)[:, None]
    assignment = order[jnp.where(row_used, first_row[block_expert][:, None] + row_in_group, 0)]
    routing = jnp.where(row_used, expert_weights.reshape(-1)[assignment], 0.0)

    def run_block(_, inputs):
        index, expert, assignment, routing = inputs

        def compute():
            rows = x[assignment // choices]
            gate = _linear(rows, w1, first_expert + expert)
            up = _linear(rows, w3, first_expert + expert)
            hidden = (clamped_swiglu(gate, up, limit) * routing[:, None]).astype(x.dtype)
            if simulate_activations:
                hidden = simulate_fp8(hidden, ACTIVATION_BLOCK)
            return _linear(hidden, w2, first_expert + expert)

        skip = jnp.zeros((block, width), jnp.float32)
        return None, lax.cond(index < used_blocks, compute, lambda: skip)

    _, out = lax.scan(run_block, None, (jnp.arange(blocks), block_expert, assignment, routing))

    # Bring each assignment's row back and add them in the order of the choices, whatever the order of arrival.
    rank = jnp.zeros(assignments, jnp.int32).at[order].set(jnp.arange(assignments, dtype=jnp.int32))
    expert = jnp.minimum(flat, experts - 1)
    row = first_block[expert] * block + rank - first_row[expert]
    gathered = out.reshape(-1, width)[jnp.clip(row, 0, blocks * block - 1)].reshape(tokens, choices, width)
    return jnp.sum(jnp.where(local[..., None], gathered, 0.0), axis=1)


def _block_rows(assignments: int, experts: int) -> int:
    """Rows per block: about the mean group, a power of two, so that neither padding nor re-decoding dominates."""
    mean = max(1, assignments // experts)
    return min(128, 1 << (mean - 1).bit_length())


def _linear(rows, weight, expert):
    codes, scale = (None if a is None else lax.dynamic_index_in_dim(a, expert, keepdims=False) for a in weight)
    matrix = dequantize(codes, scale, rows.dtype)
    return jnp.einsum(
        "nk,mk->nm", rows, matrix, precision=dot_precision(rows.dtype), preferred_element_type=jnp.float32
    )
