"""Hyper-connections against a float64 loop, and the properties the paper gives them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle
from small_models import small_config

from deepseek_v4 import Execution, Model
from deepseek_v4.nn.mixing import mixed, unmixed
from deepseek_v4.positions import Training
from pallas_kernels.hyper_connection import head_mix, post_mix, pre_mix

N, D, LENGTH = 4, 24, 10
CONFIG = {"hc_mult": N, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "rms_norm_eps": 1e-6}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixes = (2 + N) * N
    values = {
        "layer_fn": rng.normal(size=(mixes, N * D)) / 5,
        "layer_scale": np.array([0.9, 1.2, 1.5]),
        "layer_base": rng.normal(size=mixes),
        "head_fn": rng.normal(size=(N, N * D)) / 5,
        "head_scale": np.array([0.8]),
        "head_base": rng.normal(size=N),
        "streams": rng.normal(size=(LENGTH, N, D)) * np.arange(1, N + 1)[:, None],
        "y": rng.normal(size=(LENGTH, D)),
    }
    return {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}


def device(values: dict[str, np.ndarray], *names: str) -> list:
    return [jnp.asarray(values[name], jnp.float32) for name in names]


def pre(values, streams=None, iterations=20):
    streams = jnp.asarray(values["streams"], jnp.float32)[None] if streams is None else streams
    out = pre_mix(
        streams,
        *device(values, "layer_fn", "layer_scale", "layer_base"),
        sinkhorn_iters=iterations,
        norm_eps=1e-6,
        hc_eps=1e-6,
    )
    return [np.asarray(a[0], np.float64) for a in out]


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_the_mix_in_equals_the_loop(iterations: int) -> None:
    values = tensors()
    expected = Oracle(CONFIG | {"hc_sinkhorn_iters": iterations}, values).mix("layer", values["streams"])
    for found, wanted in zip(pre(values, iterations=iterations), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_mix_back_transposes_comb() -> None:
    values = tensors()
    rng = np.random.default_rng(1)
    post, comb = rng.uniform(size=(LENGTH, N)), rng.uniform(size=(LENGTH, N, N))
    streams, y = device(values, "streams", "y")
    found = post_mix(y[None], streams[None], jnp.asarray(post, jnp.float32)[None], jnp.asarray(comb, jnp.float32)[None])
    expected = post[:, :, None] * values["y"][:, None] + np.einsum("sjk,sjd->skd", comb, values["streams"])
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)


def test_comb_is_doubly_stochastic_and_not_symmetric() -> None:
    _, _, comb = pre(tensors())
    np.testing.assert_allclose(comb.sum(axis=-2), 1, atol=2e-6)
    # Columns come last; rows are as close as twenty iterations bring matrices this uneven.
    np.testing.assert_allclose(comb.sum(axis=-1), 1, atol=0.02)
    assert np.abs(comb - np.swapaxes(comb, -1, -2)).max() > 0.1


def test_the_output_head_equals_the_loop() -> None:
    values = tensors()
    streams, *weights = device(values, "streams", "head_fn", "head_scale", "head_base")
    found = head_mix(streams[None], *weights, norm_eps=1e-6, hc_eps=1e-6)
    mixes = Oracle(CONFIG, values).projected("head", values["streams"])
    gates = 1 / (1 + np.exp(-(mixes * values["head_scale"] + values["head_base"]))) + 1e-6
    np.testing.assert_allclose(found[0], (gates[..., None] * values["streams"]).sum(1), rtol=0, atol=1e-5)


def test_coefficients_of_bfloat16_streams_are_float32() -> None:
    values = tensors()
    streams = jnp.asarray(values["streams"], jnp.bfloat16)[None]
    rounded = values | {"streams": np.asarray(streams[0].astype(jnp.float32), np.float64)}
    x, post, comb = pre(values, streams)
    expected_x, expected_post, expected_comb = Oracle(CONFIG, rounded).mix("layer", rounded["streams"])
    np.testing.assert_allclose(post, expected_post, rtol=0, atol=1e-5)
    np.testing.assert_allclose(comb, expected_comb, rtol=0, atol=1e-5)
    # The sum over streams is rounded once, to bfloat16's eight bits.
    np.testing.assert_allclose(x, expected_x, rtol=2**-8, atol=1e-4)


def test_gradients_of_bfloat16_streams_are_those_of_float32_sums() -> None:
    """Of weights, and of streams up to the rounding of the result, as float32 arithmetic on the same values has it."""
    values = tensors()
    weights = device(values, "layer_fn", "layer_scale", "layer_base")
    constants = {"sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6}

    def loss(streams, fn):
        _, post, comb = pre_mix(streams, fn, *weights[1:], **constants)
        return jnp.sum(jnp.sin(jnp.arange(post.size).reshape(post.shape)) * post) + jnp.sum(comb[..., 0] ** 2)

    streams = jnp.asarray(values["streams"], jnp.bfloat16)[None]
    found = jax.grad(loss, (0, 1))(streams, weights[0])
    wanted = jax.grad(loss, (0, 1))(streams.astype(jnp.float32), weights[0])
    size = float(jnp.max(jnp.abs(wanted[0])))
    # One rounding to bfloat16's eight bits; the order of float32 sums.
    np.testing.assert_allclose(found[0].astype(jnp.float32), wanted[0], rtol=2**-8, atol=2**-18 * size)
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=2**-18 * float(jnp.max(jnp.abs(wanted[1]))))


def test_one_stream_of_any_size_is_normalised_with_the_others() -> None:
    """The root mean square runs over all n * d values: scaling every stream alike changes nothing, one alone does."""
    values = tensors()
    _, post, _ = pre(values)
    _, same, _ = pre(values | {"streams": values["streams"] * 8})
    one = values["streams"].copy()
    one[:, 1] *= 8
    _, other, _ = pre(values | {"streams": one})
    np.testing.assert_allclose(same, post, atol=1e-5)
    assert np.abs(other - post).max() > 0.1


def test_embedded_tokens_become_every_stream() -> None:
    embedded = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, D)), jnp.bfloat16)
    streams = mixed(unmixed(embedded, N), Execution("bfloat16"))
    np.testing.assert_array_equal(streams, np.repeat(np.asarray(embedded)[:, :, None], N, axis=2))


@pytest.mark.parametrize("remat", [None, "full"])
def test_one_pass_over_the_streams_between_two_sublayers(remat: str | None) -> None:
    """As many kernel calls as passes: two in the body of each group's loop, one at the end; more where layers end."""
    model = Model(
        small_config((4, 4, 4), mtp=False), execution=Execution("bfloat16", implementation="tpu_interpret|xla")
    )
    ids = jnp.zeros((1, 8), jnp.int32)

    def run(params):
        if remat is None:
            return model.forward(params, ids).logits
        return model.hidden(params, ids, training=Training(jnp.ones((1, 8), bool)), remat=remat).main

    program = str(jax.make_jaxpr(run)(model.abstract_params()))
    found = {name: program.count(f"name=hyper_connection_{name}") for name in ("pre_mix", "seam", "post_mix")}
    bodies = sum(len(group.pattern) for group in model.groups)
    apart = {"pre_mix": bodies, "seam": bodies, "post_mix": bodies + 1}
    assert found == ({"pre_mix": 0, "seam": 2 * bodies, "post_mix": 1} if remat is None else apart)
