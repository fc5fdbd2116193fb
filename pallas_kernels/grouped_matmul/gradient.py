"""Gradients of ``expert_mlp``, one block of one expert at a time.

What follows is the twin. Kernels for TPUs have one of their own, for weights that are constants and for weights that
are trained (``tpu_backward``); calls with adapters they do not serve in either pass.

Packed weights are constants: gradients reach rows and routing weights through them, adapters, and plain weights. The
rounding of ``simulate_activations`` counts as the identity. Weights are decoded again where they are needed, one expert
at a time; the gradient of an expert's matrix is added in place. The projections before the activation are residuals if
the forward pass saves them, else computed again. Weights that are gathered are so twice, in the forward and in the
backward pass, and not kept between the two. A remat policy that keeps ``expert_gate``, ``expert_up`` and
``expert_out`` runs no product of the forward pass twice; without the last, which the next operation may need, it does.
Rows that travel do so again in the backward pass, with their gradients, and their projections are computed again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_v4.formats import ACTIVATION_BLOCK, simulate_fp8
from deepseek_v4.nn.swiglu import clamped_swiglu
from deepseek_v4.relayout import narrowed
from pallas_kernels.grouped_matmul.xla import Matrix, cut, expert_linears, linear, product, sum_of_choices


class Gather(Protocol):
    """How shards of weights and adapters become whole: w1, w2, w3 as ``expert_mlp`` takes them."""

    def gather(self, weights: Any, adapters: Any, layer: Any) -> tuple[Any, Any]:
        """(weights, adapters) of one layer, whole, in the dtype in which they are multiplied."""
        ...

    def scatter(self, matrices: Any, adapters: Any) -> tuple[Any, Any]:
        """float32 gradients of whole matrices (w1, w2, w3) and adapters to those of the shards, summed."""
        ...


class Exchange(Protocol):
    """How rows come to the devices that have their experts, and back: x [N, D], ids and routing weights [N, K]."""

    def forward(self, run: Callable, x: Any, ids: Any, routing: Any, experts: int) -> Any:
        """float32 [N, D], summed over the choices, of what ``run(x, ids, routing)`` gives for rows of one choice.

        ``ids`` count all experts, ``run`` takes those of this device from 0 to ``experts`` - 1, and others for nothing.
        """
        ...

    def backward(
        self, run: Callable, totals: Any, gradient: Any, x: Any, ids: Any, routing: Any, experts: int
    ) -> tuple[Any, Any, Any]:
        """(dx [N, D], drouting [N, K], totals) from that of the result.

        ``run(totals, gradient, x, ids, routing)`` gives them for rows of one choice, all float32, adding to ``totals``.
        """
        ...


_NO_GRADIENTS = ((None, None),) * 3
"""Of packed weights without adapters."""


class Kernels(NamedTuple):
    """Kernels for gradients, with the signatures of ``expert_mlp_gradient`` and ``expert_mlp_weight_gradient``."""

    of_rows: Callable
    of_weights: Callable

    def __call__(self, totals, gradient, x, ids, routing, *weights, limit, simulate_activations, layer):
        """(dx, drouting, totals) as the twin gives them."""
        options = {"limit": limit, "layer": layer}
        if weights[0][1] is not None:
            return *self.of_rows(gradient, x, ids, routing, *weights, **options), _NO_GRADIENTS
        options |= {
            "simulate_activations": simulate_activations,
            "totals": None if totals is None else tuple(matrix for matrix, _ in totals),
        }
        dx, drouting, matrices = self.of_weights(gradient, x, ids, routing, *weights, **options)
        return dx, drouting, tuple((matrix, None) for matrix in matrices)


def with_gradient(forward: Callable, saving: Callable | None = None, kernels: Kernels | None = None) -> Callable:
    """``forward(x, expert_ids, expert_weights, w1, w2, w3, **static)``, made differentiable as the module says.

    ``saving`` is a ``forward`` that also returns (gate, up), for use where a gradient will be asked for. ``kernels``
    are those of the backward pass, which know no adapters. With them plain weights that are wider than x are rounded
    before either pass, all experts of the layer, to what the twin multiplies.
    """

    def call(x, expert_ids, expert_weights, w1, w2, w3, *, layer, adapters=None, gather=None, exchange=None, **static):
        plain = w1[1] is None
        matrices = (w1[0], w2[0], w3[0]) if plain else ()
        stored = () if plain else (w1, w2, w3)

        def arguments(x, routing, matrices, adapters, ids, stored, layer):
            weights = tuple((m, None) for m in matrices) if plain else stored
            if gather is not None:
                (weights, adapters), layer = gather.gather(weights, adapters, layer), None
            if kernels is not None:
                weights, layer = as_multiplied(weights, layer, x.dtype)
            adapted = {} if adapters is None else {"adapters": adapters}
            return (x, ids, routing, *weights), {"layer": layer, **adapted, **static}

        @jax.custom_vjp
        def run(*inputs):
            (x, ids, routing, *weights), keywords = arguments(*inputs)
            if exchange is None:
                return forward(x, ids, routing, *weights, **keywords)

            def run_rows(x, ids, routing):
                return forward(x, ids, routing, *weights, **keywords)

            return exchange.forward(run_rows, x, ids, routing, weights[0][0].shape[-3])

        def run_forward(*inputs):
            if saving is None or exchange is not None:
                return checkpoint_name(run(*inputs), "expert_out"), (inputs, None)
            positional, keywords = arguments(*inputs)
            out, (gate, up) = saving(*positional, **keywords)
            return checkpoint_name(out, "expert_out"), (
                inputs,
                (checkpoint_name(gate, "expert_gate"), checkpoint_name(up, "expert_up")),
            )

        def run_backward(residuals, gradient):
            inputs, saved = residuals
            (x, ids, routing, *weights), keywords = arguments(*inputs)

            def run_rows(totals, gradient, x, ids, routing):
                if kernels is not None:
                    return kernels(totals, gradient, x, ids, routing, *weights, **keywords)
                return _gradients(totals, gradient, saved, x, ids, routing, *weights, **keywords)

            if exchange is None:
                dx, drouting, totals = run_rows(None, gradient, x, ids, routing)
            else:
                totals = _zero_gradients(weights, keywords.get("adapters"))
                dx, drouting, totals = exchange.backward(
                    run_rows, totals, gradient.astype(x.dtype), x, ids, routing, weights[0][0].shape[-3]
                )
            dmatrices = tuple(d for d, _ in totals) if plain else ()
            dadapters = None if adapters is None else tuple(d for _, d in totals)
            _, _, matrices, given, _, _, layer = inputs
            if gather is not None:
                dmatrices, dadapters = gather.scatter(dmatrices, dadapters)
            elif layer is not None:
                dmatrices = tuple(_in_stack(d, m, layer) for d, m in zip(dmatrices, matrices, strict=True))
            dmatrices, dadapters = (
                jax.tree.map(lambda d, a: d.astype(a.dtype), found, stored)
                for found, stored in ((dmatrices, matrices), (dadapters, given))
            )
            return dx.astype(x.dtype), drouting.astype(routing.dtype), dmatrices, dadapters, None, None, None

        run.defvjp(run_forward, run_backward)
        return run(x, expert_weights, matrices, adapters, expert_ids, stored, layer)

    return call


def as_multiplied(weights, layer, dtype):
    """(w1, w2, w3) with plain matrices that are wider than ``dtype`` in it, those of one layer, and its index or None.

    What rows are multiplied with is rounded before a kernel reads it, and a whole stack is not for the sake of a layer.
    """
    if weights[0][1] is not None or all(matrix.dtype.itemsize <= dtype.itemsize for matrix, _ in weights):
        return weights, layer
    if layer is not None:
        weights = tuple((lax.dynamic_index_in_dim(matrix, layer, keepdims=False), None) for matrix, _ in weights)
    return tuple((narrowed(matrix, dtype), None) for matrix, _ in weights), None


def expert_mlp_gradient(gradient, x, expert_ids, expert_weights, w1, w2, w3, *, limit, layer):
    """See ``pallas_kernels.grouped_matmul.expert_mlp_gradient``."""
    options = {"limit": limit, "simulate_activations": False, "layer": layer}
    return _gradients(_NO_GRADIENTS, gradient, None, x, expert_ids, expert_weights, w1, w2, w3, **options)[:2]


def expert_mlp_weight_gradient(
    gradient, x, expert_ids, expert_weights, w1, w2, w3, *, limit, simulate_activations, layer, totals
):
    """See ``pallas_kernels.grouped_matmul.expert_mlp_weight_gradient``."""
    options = {"limit": limit, "simulate_activations": simulate_activations, "layer": layer}
    given = None if totals is None else tuple((total, None) for total in totals)
    dx, drouting, found = _gradients(given, gradient, None, x, expert_ids, expert_weights, w1, w2, w3, **options)
    return dx, drouting, tuple(total for total, _ in found)


def _zero_gradients(weights, adapters):
    """float32 zeros for the gradients of w1, w2, w3 (None if packed) and of the adapters of each (a, b), or None."""

    def zeros(arrays):
        return tuple(jnp.zeros(a.shape[-3:], jnp.float32) for a in arrays)

    return tuple(
        (zeros(weight[:1])[0] if weight[1] is None else None, adapter and zeros(adapter))
        for weight, adapter in zip(weights, adapters or (None, None, None), strict=True)
    )


def _gradients(
    totals,
    gradient,
    saved,
    x,
    expert_ids,
    expert_weights,
    *weights,
    limit,
    simulate_activations,
    layer,
    adapters=None,
):
    """(dx, drouting, totals), float32: to ``totals`` (None: ``_zero_gradients``) those of weights are added."""
    totals = _zero_gradients(weights, adapters) if totals is None else totals
    linears, experts = expert_linears(weights, layer, adapters)
    blocks, rows = cut(expert_ids, expert_weights, experts)
    used, assignment = blocks.table(rows)
    routing = jnp.where(used, expert_weights.astype(jnp.float32).reshape(-1)[assignment], 0.0)
    tokens, choices = expert_ids.shape
    dtype = x.dtype
    plain = totals[0][0] is not None

    def block(index, carry):
        drows, drouting, totals = carry
        expert = blocks.expert[index]
        token = assignment[index] // choices
        inputs = x[token]
        gate_weights, down_weights, up_weights = (w.of(expert, dtype) for w in linears)
        if saved is None:
            gate, up = (linear(inputs, w) for w in (gate_weights, up_weights))
        else:
            gate, up = saved[0][index], saved[1][index]
        active, pull = jax.vjp(lambda gate, up: clamped_swiglu(gate, up, limit), gate, up)
        hidden = (active * routing[index][:, None]).astype(dtype)
        if simulate_activations:
            hidden = simulate_fp8(hidden, ACTIVATION_BLOCK)
        dout = jnp.where(used[index][:, None], gradient[token], 0.0).astype(dtype)
        dhidden, of_down = _linear_gradients(dout, hidden, down_weights, plain)
        dgate, dup = (d.astype(dtype) for d in pull(dhidden * routing[index][:, None]))
        from_gate, of_gate = _linear_gradients(dgate, inputs, gate_weights, plain)
        from_up, of_up = _linear_gradients(dup, inputs, up_weights, plain)
        drows = lax.dynamic_update_index_in_dim(drows, from_gate + from_up, index, 0)
        drouting = lax.dynamic_update_index_in_dim(drouting, jnp.sum(dhidden * active, axis=-1), index, 0)
        totals = jax.tree.map(
            lambda total, d: lax.dynamic_update_index_in_dim(total, total[expert] + d, expert, 0),
            totals,
            (of_gate, of_down, of_up),
        )
        return drows, drouting, totals

    start = (jnp.zeros((*used.shape, x.shape[-1]), jnp.float32), jnp.zeros(used.shape, jnp.float32), totals)
    drows, drouting, totals = lax.fori_loop(0, blocks.used, block, start)
    dx = sum_of_choices(drows, used, assignment, tokens, choices)
    drouting = jnp.zeros(tokens * choices).at[jnp.where(used, assignment, tokens * choices)].set(drouting, mode="drop")
    return dx, drouting.reshape(tokens, choices), totals


def _linear_gradients(dout, rows, matrix: Matrix, plain):
    """Cotangents of ``xla.linear``: of rows (float32), and of the matrix (None if packed) and of the adapter."""
    drows = matrix.collect(product("nm,mk->nk", dout, matrix.dealt))
    dmatrix = product("nm,nk->mk", dout, rows) if plain else None
    if matrix.adapter is None:
        return drows, (dmatrix, None)
    a, b = matrix.adapter
    low = product("nk,rk->nr", rows, a).astype(rows.dtype)
    dlow = product("nm,mr->nr", dout, b).astype(rows.dtype)
    db = product("nm,nr->mr", dout, low)
    return drows + product("nr,rk->nk", dlow, a), (dmatrix, (product("nr,nk->rk", dlow, rows), db))


def _in_stack(gradient, weight, layer):
    """A layer's gradient in its place in a stack of layers."""
    return lax.dynamic_update_index_in_dim(jnp.zeros(weight.shape, gradient.dtype), gradient, layer, 0)
