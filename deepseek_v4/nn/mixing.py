"""The hyper-connections between sublayers: what one hands to the next, and kernels on each device's own tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_v4.execution import Execution
from pallas_kernels.hyper_connection import post_mix


class Unmixed(NamedTuple):
    """The output of a sublayer beside the residual streams it is still to be mixed into: what ``post_mix`` takes.

    y [B, S, d] and streams [B, S, n, d] of activations; post [B, S, n] and comb [B, S, n, n] float32. The sublayer that
    comes next mixes in the same pass in which it reads the streams (``seam``), across layers too.
    """

    y: jax.Array
    streams: jax.Array
    post: jax.Array
    comb: jax.Array


def unmixed(embedded: jax.Array, n: int) -> Unmixed:
    """The embedded tokens [B, S, d] as the output that becomes each of the n streams: those of ``repeat``, exactly."""
    tokens = embedded.shape[:2]
    return Unmixed(
        embedded,
        jnp.zeros((*tokens, n, embedded.shape[-1]), embedded.dtype),
        jnp.ones((*tokens, n), jnp.float32),
        jnp.zeros((*tokens, n, n), jnp.float32),
    )


def mixed(streams: jax.Array | Unmixed, execution: Execution) -> jax.Array:
    """The residual streams [B, S, n, d], whatever was still to be mixed into them."""
    whole: jax.Array = (
        on_own_tokens(post_mix, streams._asdict(), {}, execution) if isinstance(streams, Unmixed) else streams
    )
    return execution.constrain(whole, execution.tokens(whole.shape[1]))


def on_own_tokens(
    operation: Callable,
    of_tokens: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array],
    execution: Execution,
    **constants: Any,
) -> Any:
    """``operation(**of_tokens, **weights, **constants)`` of ``pallas_kernels.hyper_connection``, over any mesh.

    ``of_tokens`` [B, S, ...] are split as tokens are, and so are the results; ``weights`` are the same on every device.
    The gradient is that of the XLA twin of the whole operation: in it the partitioner adds up, over the axes of tokens,
    what each device's tokens say about the weights, where a transposed ``shard_map`` would add over every mesh axis.
    """
    call = functools.partial(operation, **constants)
    if execution.placement is None:
        return call(**of_tokens, **weights, implementation=execution.implementation)
    names = (*of_tokens, *weights)
    split = execution.tokens(next(iter(of_tokens.values())).shape[1])

    def local(*arrays: jax.Array) -> Any:
        return call(**dict(zip(names, arrays, strict=True)), implementation=execution.implementation)

    @jax.custom_vjp
    def run(of_tokens, weights):
        arrays = of_tokens | weights
        in_axes = [split if name in of_tokens else () for name in names]
        return execution.per_shard(local, [arrays[name] for name in names], in_axes, split)

    def forward(of_tokens, weights):
        return run(of_tokens, weights), (of_tokens, weights)

    def backward(saved, gradient):
        _, pull = jax.vjp(lambda of_tokens, weights: call(**of_tokens, **weights, implementation="xla"), *saved)
        return pull(gradient)

    run.defvjp(forward, backward)
    return run(dict(of_tokens), dict(weights))
