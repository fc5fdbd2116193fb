"""Gradients of ``expert_mlp``, one block of one expert at a time, weights decoded again where they are needed.

Packed weights are constants: gradients reach rows and routing weights through them, and plain weights. The rounding of
``simulate_activations`` counts as the identity. Written in XLA: memory beyond the gradients is one block's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import dot_precision
from deepseek_v4.formats import dequantize
from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels.grouped_matmul.blocks import merge_repeats, sort_into_blocks

_ROWS = 128


def with_gradient(forward: Callable) -> Callable:
    """``forward(x, expert_ids, expert_weights, w1, w2, w3, **static)``, made differentiable as the module says."""

    def call(x, expert_ids, expert_weights, w1, w2, w3, *, layer, **static):
        plain = w1[1] is None
        matrices = (w1[0], w2[0], w3[0]) if plain else ()
        stored = () if plain else (w1, w2, w3)

        def unpack(matrices, stored):
            return tuple((m, None) for m in matrices) if plain else stored

        @jax.custom_vjp
        def run(x, routing, matrices, ids, stored, layer):
            return forward(x, ids, routing, *unpack(matrices, stored), layer=layer, **static)

        def run_forward(x, routing, matrices, ids, stored, layer):
            return run(x, routing, matrices, ids, stored, layer), (x, routing, matrices, ids, stored, layer)

        def run_backward(saved, gradient):
            x, routing, matrices, ids, stored, layer = saved
            weights = unpack(matrices, stored)
            dx, drouting, dmatrices = _gradients(gradient, x, ids, routing, weights, layer, static["limit"], plain)
            return dx, drouting, dmatrices, None, None, None

        run.defvjp(run_forward, run_backward)
        return run(x, expert_weights, matrices, expert_ids, stored, layer)

    return call


def _gradients(gradient, x, expert_ids, expert_weights, weights, layer, limit, plain):
    if layer is not None:
        shapes = [w.shape for w, _ in weights]
        weights = [
            tuple(None if a is None else lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in w) for w in weights
        ]
    experts, tokens = weights[0][0].shape[0], x.shape[0]
    choices = expert_ids.shape[1]
    merged, unmerge, ids = jax.vjp(
        lambda routing: merge_repeats(expert_ids, routing, experts)[::-1],
        expert_weights.astype(jnp.float32),
        has_aux=True,
    )
    blocks = sort_into_blocks(ids, merged, experts=experts, rows=_ROWS)
    precision = dot_precision(x.dtype)

    def product(a, b):
        return jnp.einsum("nk,mk->nm", a, b, precision=precision, preferred_element_type=jnp.float32)

    def mlp(rows, routing, m1, m2, m3):
        hidden = clamped_swiglu(product(rows, m1), product(rows, m3), limit) * routing[:, None]
        return product(hidden.astype(x.dtype), m2)

    def block(carry, index):
        def compute(carry):
            dx, drouting, dmatrices = carry
            expert = blocks.expert[index]
            position = jnp.arange(_ROWS)
            used = position < blocks.size[index]
            at = jnp.where(used, blocks.first[index] + position, 0)
            assignment = blocks.assignment[at]
            token = assignment // choices
            matrices = [
                dequantize(
                    *(None if a is None else lax.dynamic_index_in_dim(a, expert, keepdims=False) for a in w), x.dtype
                )
                for w in weights
            ]
            _, pull = jax.vjp(mlp, x[token], blocks.routing[at], *matrices)
            drows, drow_routing, *dm = pull(jnp.where(used[:, None], gradient[token], 0.0))
            dx = dx.at[jnp.where(used, token, tokens)].add(drows.astype(jnp.float32), mode="drop")
            drouting = drouting.at[jnp.where(used, assignment, drouting.size)].set(drow_routing, mode="drop")
            if plain:
                dmatrices = [
                    total.at[expert].add(d.astype(jnp.float32)) for total, d in zip(dmatrices, dm, strict=True)
                ]
            return dx, drouting, dmatrices

        return lax.cond(index < blocks.used, compute, lambda carry: carry, carry), None

    start = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(tokens * choices, jnp.float32),
        [jnp.zeros(w.shape, jnp.float32) for w, _ in weights] if plain else [],
    )
    (dx, drouting, dmatrices), _ = lax.scan(block, start, jnp.arange(blocks.expert.size))
    drouting = unmerge(drouting.reshape(tokens, choices))[0]
    dmatrices = [d.astype(w.dtype) for d, (w, _) in zip(dmatrices, weights, strict=True)] if plain else []
    if plain and layer is not None:
        dmatrices = [
            lax.dynamic_update_index_in_dim(jnp.zeros(shape, d.dtype), d, layer, 0)
            for shape, d in zip(shapes, dmatrices, strict=True)
        ]
    return dx.astype(x.dtype), drouting.astype(expert_weights.dtype), tuple(dmatrices)
