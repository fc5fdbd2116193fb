"""How the TPU kernels of the expert MLP are called, forward and backward: blocks of rows, prefetched numbers, operands.

Assignments are sorted by expert and cut into blocks. The grid is (core, block of rows, tile of the width M); rows stay
in HBM as words, from where a kernel fetches them, and so does the result, which begins as zeros and is added to in
place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul import tpu_weights
from pallas_kernels.grouped_matmul.blocks import Blocks, merge_repeats, sort_into_blocks
from pallas_kernels.grouped_matmul.tpu_plan import Plan


def blocks_of(plan: Plan, expert_ids: jax.Array, expert_weights: jax.Array) -> Blocks:
    """The blocks of a call; an expert that a token names several times has one row, with the sum of its weights."""
    ids, merged = merge_repeats(expert_ids, expert_weights.astype(jnp.float32), plan.experts)
    return sort_into_blocks(ids, merged, experts=plan.experts, rows=plan.rows)


def call(
    kernel: Callable,
    plan: Plan,
    blocks: Blocks,
    places: jax.Array,
    words: jax.Array,
    weights: tuple[Any, Any, Any],
    layer: jax.Array,
    *,
    scratch: Sequence[Any],
    results: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = (),
    flops: int,
    moved: int,
    vmem_bytes: int,
    name: str,
    interpret: bool,
) -> list[jax.Array]:
    """Calls ``kernel`` on every tile of every block; returns float32 [cores, T, D], what each added, and ``results``.

    The kernel gets, as refs: layer [1], the blocks' expert, first and size, ``places`` and routing weights of sorted
    assignments, all prefetched; the operands of ``weights`` (w1, w2, w3), stacked; the even-odd permutation; ``words``
    uint32 [T, W] and zeros, both in HBM; the results; ``scratch``, then that of the decoded tiles. ``moved`` are bytes.
    """
    prefetch = (layer.reshape(1), blocks.expert, blocks.first, blocks.size, places, blocks.routing)
    operands, specs = tpu_weights.operands(plan, *weights, layer)
    sums = jnp.zeros((plan.cores, plan.tokens, plan.hidden), jnp.float32)
    inputs = (*prefetch, *operands, tpu_decode.even_odd_permutation(), words, sums)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(plan.cores, jnp.maximum(blocks.used, 1), plan.tiles),
            in_specs=[
                *specs,
                pl.BlockSpec((tpu_decode.CHUNK, tpu_decode.CHUNK), lambda *_: (0, 0)),
                in_hbm,
                in_hbm,
            ],
            out_specs=[in_hbm, *(spec for _, spec in results)],
            scratch_shapes=[*scratch, *tpu_weights.scratch(plan)],
        ),
        out_shape=[jax.ShapeDtypeStruct(sums.shape, sums.dtype), *(shape for shape, _ in results)],
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes + tpu_weights.vmem_bytes(plan),
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=plan.served * plan.width),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=f"{name}_{plan.kind}",
    )(*inputs)
