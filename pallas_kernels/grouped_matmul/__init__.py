"""Expert MLPs over tokens that were routed to them, weights in their stored format (architecture section 6)."""

import functools
from collections.abc import Callable
from types import ModuleType

import jax

from pallas_kernels.grouped_matmul import gpu, tpu, tpu_backward, xla
from pallas_kernels.grouped_matmul import gradient as twin
from pallas_kernels.grouped_matmul.gradient import Exchange, Gather, Kernels, as_multiplied, with_gradient
from pallas_kernels.grouped_matmul.unserved import unserved_weights
from pallas_kernels.grouped_matmul.xla import Adapter
from pallas_kernels.implementation import choose
from pallas_kernels.targets import Chip

_GRADIENTS: dict[str, Callable] = {
    "xla": twin.expert_mlp_gradient,
    "tpu": tpu_backward.expert_mlp_gradient,
    "tpu_interpret": functools.partial(tpu_backward.expert_mlp_gradient, interpret=True),
}

_WEIGHT_GRADIENTS: dict[str, Callable] = {
    "xla": twin.expert_mlp_weight_gradient,
    "tpu": tpu_backward.expert_mlp_weight_gradient,
    "tpu_interpret": functools.partial(tpu_backward.expert_mlp_weight_gradient, interpret=True),
}

_KERNELS = {name: Kernels(_GRADIENTS[name], _WEIGHT_GRADIENTS[name]) for name in ("tpu", "tpu_interpret")}

_IMPLEMENTATIONS = {
    "xla": with_gradient(xla.expert_mlp, xla.expert_mlp_saving),
    "tpu": with_gradient(tpu.expert_mlp, kernels=_KERNELS["tpu"]),
    "tpu_interpret": with_gradient(
        functools.partial(tpu.expert_mlp, interpret=True), kernels=_KERNELS["tpu_interpret"]
    ),
    "gpu": with_gradient(gpu.expert_mlp),
    "gpu_interpret": with_gradient(functools.partial(gpu.expert_mlp, interpret=True)),
}


def expert_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    w1: tuple[jax.Array, jax.Array | None],
    w2: tuple[jax.Array, jax.Array | None],
    w3: tuple[jax.Array, jax.Array | None],
    *,
    limit: float,
    simulate_activations: bool = False,
    layer: jax.Array | int | None = None,
    adapters: tuple[Adapter | None, Adapter | None, Adapter | None] | None = None,
    gather: Gather | None = None,
    exchange: Exchange | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of every token's experts: sum_k W2 (r_k * silu(min(W1 x, limit)) * clip(W3 x, +-limit)).

    Shapes: x [N, D]; expert_ids int32 [N, K], local to these weights: an id outside 0..E-1 belongs to another shard
    and contributes nothing; expert_weights float32 [N, K], the routing weights r; w1, w3 (weight [E, M, D], scale) and
    w2 (weight [E, D, M], scale): packed FP4 (uint8, half the last dim, scale per 32 inputs), FP8 (E4M3, scale per
    128 x 128) or plain (scale None). No token is ever dropped, whatever the imbalance. ``simulate_activations`` rounds
    the input of W2 to E4M3 per 128 channels. Products are accumulated in float32, the activation is computed in
    float32, cast to the dtype of x before W2, and the experts of a token are summed in float32 in the order of K.
    Returns [N, D] float32. Source: paper 2.1, 4.2.3.

    With ``layer`` the weights are stacked, with a leading dim of which that index is used. ``adapters`` (a [E, r, in],
    b [E, out, r]) of w1, w2 and w3, of one layer, add b (a input) to their products; kernels do not serve them.
    Gradients reach x, routing weights, adapters and plain weights (see ``gradient``). Plain weights that are wider
    than x are rounded to its dtype: by the twin one expert at a time, for kernels of TPUs all of the layer. With
    ``gather`` weights and adapters are shards, and what is said here holds of what it makes of them. With ``exchange``
    the ids count the experts of a whole group of devices, among which rows are sent to and fro.
    """
    whole = (w1, w2, w3)
    if gather is not None:
        whole, _ = jax.eval_shape(gather.gather, whole, adapters, layer)
    adapted = adapters is not None

    rounded, _ = jax.eval_shape(functools.partial(as_multiplied, dtype=x.dtype), whole, layer)

    def unserved(chip: Chip | None, module: ModuleType) -> str | None:
        w1, w2, _ = rounded if module is tpu else whole
        return module.unserved(chip, x, w1, w2, adapted=adapted)

    reasons = {
        name: functools.partial(unserved, module=tpu if name.startswith("tpu") else gpu)
        for name in set(_IMPLEMENTATIONS) - {"xla"}
    }
    function = choose("expert_mlp", _IMPLEMENTATIONS, implementation, reasons)
    return function(
        x,
        expert_ids,
        expert_weights,
        w1,
        w2,
        w3,
        limit=limit,
        simulate_activations=simulate_activations,
        layer=layer,
        **({} if adapters is None else {"adapters": adapters}),
        **({} if gather is None else {"gather": gather}),
        **({} if exchange is None else {"exchange": exchange}),
    )


def expert_mlp_gradient(
    gradient: jax.Array,
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    w1: tuple[jax.Array, jax.Array | None],
    w2: tuple[jax.Array, jax.Array | None],
    w3: tuple[jax.Array, jax.Array | None],
    *,
    limit: float,
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of ``expert_mlp`` to its rows and routing weights, from ``gradient`` [N, D], that of its result.

    Arguments as there, without adapters; weights are constants, and rounded activations count as they are before. The
    gradient is rounded to the dtype of x before it meets W2, and those of gate and up before W1 and W3; all sums are
    float32, in an order that is a token's own. Returns float32 [N, D] and [N, K].
    """

    def unserved(chip: Chip | None) -> str | None:
        return tpu_backward.unserved(chip, x, w1, w2)

    function = choose("expert_mlp_gradient", _GRADIENTS, implementation, {"tpu": unserved, "tpu_interpret": unserved})
    return function(gradient, x, expert_ids, expert_weights, w1, w2, w3, limit=limit, layer=layer)


def expert_mlp_weight_gradient(
    gradient: jax.Array,
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    w1: tuple[jax.Array, None],
    w2: tuple[jax.Array, None],
    w3: tuple[jax.Array, None],
    *,
    limit: float,
    simulate_activations: bool = False,
    layer: jax.Array | int | None = None,
    totals: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """The gradient of ``expert_mlp`` to its rows, routing weights and plain weights, from that of its result [N, D].

    Arguments as in ``expert_mlp_gradient``. What is multiplied is in the dtype of x: the gradient, those of gate and
    up, rows, and the inputs of W2, which ``simulate_activations`` rounds further. Returns float32 [N, D], [N, K] and,
    of w1, w2 and w3, [E, M, D], [E, D, M] and [E, M, D], those of one layer; they are added to ``totals``, if given.
    An expert's rows are added in the order of the tokens; an expert without rows has zeros.
    """

    def unserved(chip: Chip | None) -> str | None:
        return unserved_weights(w1) or tpu_backward.unserved(chip, x, w1, w2)

    reasons = {"tpu": unserved, "tpu_interpret": unserved}
    function = choose("expert_mlp_weight_gradient", _WEIGHT_GRADIENTS, implementation, reasons)
    options = {"limit": limit, "simulate_activations": simulate_activations, "layer": layer, "totals": totals}
    return function(gradient, x, expert_ids, expert_weights, w1, w2, w3, **options)
