"""Routers and experts against closed forms: selection, weights, extremes, imbalance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from deepseek_v4 import Execution
from deepseek_v4.layer_spec import layer_spec
from deepseek_v4.nn.moe import Router, log_sqrt_softplus
from deepseek_v4.nn.swiglu import clamped_swiglu
from deepseek_v4.nn.variables import MASTER
from pallas_kernels.grouped_matmul import expert_mlp

CONFIG = small_config((0,), num_hash_layers=0, hidden_size=16)
EXPERTS, CHOICES = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok


def router(hashed: bool, weight: np.ndarray, bias=None, table=None):
    module = Router(CONFIG, layer_spec(CONFIG, 0, hashed), MASTER)
    module.weight = nnx.Param(jnp.asarray(weight, jnp.float32))
    if hashed:
        module.tid2eid = nnx.Variable(jnp.asarray(table))
    else:
        module.bias = nnx.Variable(jnp.asarray(bias, jnp.float32))
    return functools.partial(module, execution=Execution(dtype="float32"))


def exact_score(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(logit)) if logit < 700 else logit)


def test_scores_select_with_bias_and_weigh_without() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(EXPERTS, 16))
    bias = rng.normal(size=EXPERTS)
    ids, weights, _ = router(False, weight, bias)(jnp.asarray(x), jnp.zeros(50, jnp.int32))
    plain_ids, _, _ = router(False, weight, np.zeros(EXPERTS))(jnp.asarray(x), jnp.zeros(50, jnp.int32))
    assert (np.sort(ids) != np.sort(plain_ids)).any()
    for i in range(50):
        scores = np.array([exact_score(float(w.astype(np.float32) @ x[i])) for w in weight])
        expected = np.argsort(-(scores + bias), kind="stable")[:CHOICES]
        np.testing.assert_array_equal(ids[i], expected)
        np.testing.assert_allclose(weights[i], scores[expected] / scores[expected].sum() * 1.5, rtol=1e-5)


def test_equal_scores_choose_the_lowest_ids() -> None:
    ids, weights, _ = router(False, np.zeros((EXPERTS, 16)), np.zeros(EXPERTS))(
        jnp.ones((2, 16)), jnp.zeros(2, jnp.int32)
    )
    np.testing.assert_array_equal(ids, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_allclose(weights, 1.5 / CHOICES, rtol=1e-6)


def test_hash_layers_look_experts_up_and_weigh_them_by_score() -> None:
    rng = np.random.default_rng(1)
    table = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(CONFIG.vocab_size)]).astype(np.int32)
    x, weight = rng.normal(size=(20, 16)).astype(np.float32), rng.normal(size=(EXPERTS, 16))
    tokens = rng.integers(0, CONFIG.vocab_size, 20)
    ids, weights, _ = router(True, weight, table=table)(jnp.asarray(x), jnp.asarray(tokens))
    np.testing.assert_array_equal(ids, table[tokens])
    scores = np.vectorize(exact_score)(x @ weight.T.astype(np.float32))
    chosen = np.take_along_axis(scores, table[tokens], axis=1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True) * 1.5, rtol=1e-5)


@pytest.mark.parametrize("logit", [-3e4, -1000.0, -104.0, -88.0, -20.0, 0.0, 80.0, 3e4])
def test_hash_weights_are_finite_for_any_logit(logit: float) -> None:
    """softplus underflows to 0 below -104 in float32, and three of them to 0/0."""
    weight = np.zeros((EXPERTS, 16))
    weight[:, 0] = 1
    weight[2, 1] = 2 * math.log(2)  # the score of expert 2 is twice the others' where softplus is an exponential
    x = np.zeros((1, 16), np.float32)
    x[0, :2] = logit, 1
    table = np.tile(np.array([[0, 2, 5]], np.int32), (CONFIG.vocab_size, 1))
    _, weights, _ = router(True, weight, table=table)(jnp.asarray(x), jnp.zeros(1, jnp.int32))
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 1.5, rtol=1e-5)
    if logit <= -20:
        # Logits of 3e4 are rounded to 2e-3.
        np.testing.assert_allclose(weights[0], [0.375, 0.75, 0.375], rtol=2e-3)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.floats(-1e5, 1e5, width=32))
def test_log_of_the_score_equals_the_closed_form(logit: float) -> None:
    found = float(log_sqrt_softplus(jnp.float32(logit)))
    # log(log1p(exp(x))) is x - exp(x)/2 + ... far below zero, where exp underflows even in float64.
    exact = logit if logit < -40 else math.log(math.log1p(math.exp(logit)) if logit < 700 else logit)
    assert found == pytest.approx(exact / 2, rel=2e-6, abs=2e-6)


def test_the_gate_is_clamped_above_and_the_up_projection_on_both_sides() -> None:
    gate = jnp.asarray([-50.0, -10.5, 0.5, 10.5, 50.0])
    up = jnp.asarray([-20.0, 20.0, 3.0, -11.0, 9.0])
    expected = [g / (1 + math.exp(-g)) * u for g, u in ((-50, -10), (-10.5, 10), (0.5, 3), (10, -10), (10, 9))]
    np.testing.assert_allclose(clamped_swiglu(gate, up, 10.0), expected, rtol=1e-5)


TOKENS, WIDTH, HIDDEN, E, K = 37, 16, 12, 5, 3


@pytest.fixture(scope="module")
def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=s).astype(np.float32) for s in ((E, HIDDEN, WIDTH), (E, WIDTH, HIDDEN), (E, HIDDEN, WIDTH))]


@pytest.fixture(scope="module")
def run(weights):
    stored = [(jnp.asarray(w), None) for w in weights]
    return jax.jit(lambda x, ids, routing: expert_mlp(x, ids, routing, *stored, limit=1.0))


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), kind=st.sampled_from(["uniform", "one expert", "two experts", "other shards", "none"])
)
def test_experts_drop_no_token_whatever_the_imbalance(run, weights, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x, routing = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32), rng.uniform(size=(TOKENS, K)).astype(np.float32)
    ids = {
        "uniform": rng.integers(0, E, (TOKENS, K)),
        "one expert": np.full((TOKENS, K), rng.integers(0, E)),
        "two experts": rng.integers(0, 2, (TOKENS, K)) * (E - 1),
        "other shards": rng.integers(-3, E + 3, (TOKENS, K)),
        "none": np.full((TOKENS, K), -1),
    }[kind]
    found = run(jnp.asarray(x), jnp.asarray(ids, jnp.int32), jnp.asarray(routing))
    expected = np.zeros((TOKENS, WIDTH))
    for i, j in np.ndindex(ids.shape):
        if 0 <= ids[i, j] < E:
            w1, w2, w3 = (w[ids[i, j]].astype(float) for w in weights)
            gate, up = np.minimum(w1 @ x[i], 1), np.clip(w3 @ x[i], -1, 1)
            expected[i] += w2 @ (routing[i, j] * gate / (1 + np.exp(-gate)) * up)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert found.dtype == jnp.float32
