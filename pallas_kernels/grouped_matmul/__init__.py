"""Expert MLPs over tokens that were routed to them, weights in their stored format (architecture section 6)."""

import functools

import jax

from pallas_kernels.grouped_matmul import tpu, xla
from pallas_kernels.grouped_matmul.gradient import with_gradient
from pallas_kernels.implementation import choose

_IMPLEMENTATIONS = {
    "xla": xla.expert_mlp,
    "tpu": with_gradient(tpu.expert_mlp),
    "tpu_interpret": with_gradient(functools.partial(tpu.expert_mlp, interpret=True)),
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
    """
    reason = functools.partial(tpu.unserved, x=x, w1=w1, w2=w2)
    unserved = {"tpu": reason, "tpu_interpret": reason}
    function = choose("expert_mlp", _IMPLEMENTATIONS, implementation, unserved)
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
    )
