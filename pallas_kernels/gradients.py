"""Gradients of kernels that have no backward kernel: those of the twin, recomputed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def with_twin_gradient(kernel: Callable, twin: Callable) -> Callable:
    """A function ``f(**arguments)`` that runs ``kernel`` and differentiates as ``twin`` does.

    Array arguments of floating types are differentiated; the others (positions, indices, packed words, None, Python
    values) are constants. The backward pass runs the twin's forward again on the saved arguments: memory and time of a
    training step are the twin's, only inference and the forward pass are the kernel's.
    """

    def call(**arguments):
        varied = {name: a for name, a in arguments.items() if _is_floating(a)}
        traced = {name: a for name, a in arguments.items() if _is_arrays(a) and name not in varied}
        static = {name: a for name, a in arguments.items() if name not in varied and name not in traced}

        @jax.custom_vjp
        def run(varied, traced):
            return kernel(**varied, **traced, **static)

        def forward(varied, traced):
            return run(varied, traced), (varied, traced)

        def backward(saved, gradient):
            varied, traced = saved
            _, pull = jax.vjp(lambda varied: twin(**varied, **traced, **static), varied)
            return pull(gradient)[0], None

        run.defvjp(forward, backward)
        return run(varied, traced)

    return call


def _is_arrays(value) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def _is_floating(value) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
