"""The hyper-connections of a block where they can run as kernels: on each device's own tokens."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from deepseek_v4.execution import Execution


def on_own_tokens(
    operation: Callable,
    of_tokens: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array],
    execution: Execution,
    **constants: Any,
) -> Any:
    """``operation(**of_tokens, **weights, **constants)`` of ``pallas_kernels.hyper_connection``, over any mesh.

    ``of_tokens`` [B, S, ...] follow the batch, as the results do; ``weights`` are the same on every device. The
    gradient is that of the XLA twin of the whole operation: in it the partitioner adds up, over the axes of the batch,
    what each device's tokens say about the weights, where a transposed ``shard_map`` would add over every mesh axis.
    """
    call = functools.partial(operation, **constants)
    if execution.placement is None:
        return call(**of_tokens, **weights, implementation=execution.implementation)
    names = (*of_tokens, *weights)

    def local(*arrays: jax.Array) -> Any:
        return call(**dict(zip(names, arrays, strict=True)), implementation=execution.implementation)

    @jax.custom_vjp
    def run(of_tokens, weights):
        arrays = of_tokens | weights
        in_axes = [("batch",) if name in of_tokens else () for name in names]
        return execution.per_shard(local, [arrays[name] for name in names], in_axes, ("batch",))

    def forward(of_tokens, weights):
        return run(of_tokens, weights), (of_tokens, weights)

    def backward(saved, gradient):
        _, pull = jax.vjp(lambda of_tokens, weights: call(**of_tokens, **weights, implementation="xla"), *saved)
        return pull(gradient)

    run.defvjp(forward, backward)
    return run(dict(of_tokens), dict(weights))
