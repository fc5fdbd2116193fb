"""What a training step's memory depends on beside its arithmetic: what is computed again, and what has to wait."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax import lax

REMAT_POLICIES: Mapping[str, Any] = MappingProxyType(
    {
        "full": jax.checkpoint_policies.nothing_saveable,
        "experts": jax.checkpoint_policies.save_only_these_names("expert_gate", "expert_up", "expert_out"),
    }
)
"""What a backward pass finds of a layer's forward pass: nothing, or the products of its routed experts."""


@jax.custom_vjp
def in_turn(params: Any, inputs: Any) -> tuple[Any, Any]:
    """(params, inputs) of a layer, as they are; the backward pass ends this layer before it begins the one before it.

    Without that a compiler may leave the gradients of weights, and all that they need, to the end of the program. Nor
    can it cast the weights of all layers ahead of the loop that slices them, which would keep a second copy of all.
    """
    return _together(params), inputs


def _forward(params, inputs):
    return in_turn(params, inputs), None


def _backward(_, gradients):
    return _together(gradients)


in_turn.defvjp(_forward, _backward)


def _together(tree: Any) -> Any:
    """``tree``, none of which can be used, or moved, before all of it is there; without what has no gradient."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]
    for i, leaf in zip(kept, lax.optimization_barrier([leaves[i] for i in kept]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
