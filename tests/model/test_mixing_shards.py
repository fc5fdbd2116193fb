"""Hyper-connections over a mesh against one device: values, gradients, and that kernels may run where they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4 import Execution, Placement, make_mesh
from deepseek_v4.nn.mixing import on_own_tokens
from pallas_kernels.hyper_connection import post_mix, pre_mix, seam
from pallas_kernels.implementation import arrays_may_be_split

N, D, BATCH, LENGTH = 4, 32, 4, 3
CONSTANTS = {"sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6}


def problem():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    comb = rng.uniform(0.1, 1, (BATCH, LENGTH, N, N))
    of_tokens = {
        "y": normal(BATCH, LENGTH, D),
        "streams": normal(BATCH, LENGTH, N, D),
        "post": jnp.asarray(rng.uniform(0, 2, (BATCH, LENGTH, N)), jnp.float32),
        "comb": jnp.asarray(comb / comb.sum(-1, keepdims=True), jnp.float32),
    }
    mixes = (2 + N) * N
    weights = {"fn": normal(mixes, N * D) / 10, "scale": normal(3), "base": normal(mixes)}
    return of_tokens, weights


def value_and_gradients(operation, of_tokens, weights, placement):
    execution = Execution("float32", placement=placement)
    constants = {} if operation is post_mix else CONSTANTS

    @jax.jit
    def run(of_tokens, weights):
        def value(of_tokens, weights):
            # As a block names them: not in the order in which a traced dict keeps them.
            ordered = {name: weights[name] for name in ("fn", "scale", "base") if name in weights}
            results = on_own_tokens(operation, of_tokens, ordered, execution, **constants)
            leaves = jax.tree.leaves(results)
            factors = [jnp.cos(jnp.arange(a.size).reshape(a.shape)) for a in leaves]
            return sum(jnp.sum(a * f) for a, f in zip(leaves, factors, strict=True)), results

        (_, results), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(of_tokens, weights)
        return results, gradients

    if placement is not None:
        rows = NamedSharding(placement.mesh, PartitionSpec("data"))
        of_tokens = {name: jax.device_put(a, rows) for name, a in of_tokens.items()}
        weights = {name: jax.device_put(a, placement.replicated()) for name, a in weights.items()}
    return run(of_tokens, weights)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "data=4,tensor=2", "expert=4,tensor=2"])
@pytest.mark.parametrize("operation", [pre_mix, post_mix, seam])
def test_a_mesh_gives_what_one_device_gives(operation, mesh):
    of_tokens, weights = problem()
    if operation is pre_mix:
        of_tokens = {"streams": of_tokens["streams"]}
    if operation is post_mix:
        weights = {}
    found = value_and_gradients(operation, of_tokens, weights, Placement(make_mesh(mesh)))
    expected = value_and_gradients(operation, of_tokens, weights, None)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums over tokens are added up device by device: a few float32 roundings of sums of order ten. A sum over an
        # axis too many or too few would be wrong by a factor.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_kernels_may_run_on_own_tokens():
    """Inside, no array can be spread over devices any more, and a device sees its own rows alone."""
    of_tokens, _ = problem()
    seen = []

    def operation(*, streams, implementation):
        seen.append((streams.shape, arrays_may_be_split()))
        return streams

    placement = Placement(make_mesh("data=4,tensor=2"))
    execution = Execution("float32", placement=placement)
    jax.jit(lambda a: on_own_tokens(operation, {"streams": a}, {}, execution))(of_tokens["streams"])
    assert seen == [((1, LENGTH, N, D), False)]
