"""Cross-entropy in parts, labels in packed rows, load and balance, against definitions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_v4 import Execution, vocabulary
from deepseek_v4.nn.moe import load_and_balance, log_sqrt_softplus
from deepseek_v4.training import losses
from pallas_kernels.compressed_attention import index_divergence

EXECUTION = Execution("float32")


@pytest.mark.parametrize("most", [1, 10, 1 << 24])
def test_cross_entropy_in_parts_equals_optax(monkeypatch, most) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS", most * 33)
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 11, 8), (29, 8)))
    following = jnp.asarray(rng.integers(0, 29, (3, 11)))
    wanted = jnp.asarray(rng.random((3, 11)) < 0.7)

    def ours(hidden, weight):
        return losses.cross_entropy(hidden, weight, following, wanted, EXECUTION).loss

    def theirs(hidden, weight):
        logits = jnp.einsum("bsd,vd->bsv", hidden, weight, precision="highest")
        return jnp.sum(jnp.where(wanted, optax.softmax_cross_entropy_with_integer_labels(logits, following), 0))

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(hidden, weight) for f in (ours, theirs))
    # float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    logits = np.einsum("bsd,vd->bsv", hidden, weight)
    sums = losses.cross_entropy(hidden, weight, following, wanted, EXECUTION)
    np.testing.assert_array_equal(sums.greedy, logits.argmax(-1))
    assert float(sums.correct) == np.sum(np.asarray(wanted) & (logits.argmax(-1) == np.asarray(following)))
    z = np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2
    np.testing.assert_allclose(sums.z, z[np.asarray(wanted)].sum(), rtol=1e-5)


def test_all_logits_never_exist() -> None:
    """The program for 4,096 tokens and the released vocabulary holds a part of the logits, forward and backward."""
    hidden = jax.ShapeDtypeStruct((1, 4096, 64), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((129280, 64), jnp.float32)
    row = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(hidden, weight, row):
        return losses.cross_entropy(hidden, weight, row, row >= 0, Execution("bfloat16")).loss

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, weight, row).as_text()
    assert "4096x129280" not in text
    assert "4096x4096xf32" in text


def test_labels_end_with_their_document_and_are_shifted_once() -> None:
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 3]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0]])
    targets = jnp.asarray([[True, True, False, True, True, True]])
    following, wanted = losses.labels(tokens, positions, targets)
    np.testing.assert_array_equal(following[0, :5], [6, 7, 8, 9, 3])
    # 5 -> 6 is learnt; 7 is no target; 8 and 3 begin documents; 8 -> 9 is learnt; nothing follows the last.
    np.testing.assert_array_equal(wanted, [[True, False, False, True, False, False]])


def test_load_and_balance_equal_their_definitions() -> None:
    rng = np.random.default_rng(1)
    rows, length, experts, choices = 3, 17, 6, 2
    logits = rng.normal(size=(rows, length, experts)).astype(np.float32)
    ids = np.argsort(-logits, axis=-1)[..., :choices]
    real = np.arange(length)[None] < np.array([[17], [9], [0]])
    load, balance = load_and_balance(jnp.asarray(ids), log_sqrt_softplus(jnp.asarray(logits)), jnp.asarray(real))
    scores = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
    shares = scores / scores.sum(-1, keepdims=True)
    expected = []
    for row, count in ((0, 17), (1, 9)):
        f = np.array([np.sum(ids[row, :count] == e) for e in range(experts)]) * experts / (choices * count)
        expected.append(np.sum(f * shares[row, :count].mean(0)))
    np.testing.assert_allclose(balance, np.mean(expected), rtol=1e-5)
    np.testing.assert_array_equal(load, [np.sum(ids[real] == e) for e in range(experts)])


@pytest.mark.parametrize("sparse", [False, True])
def test_index_divergence_equals_a_float64_loop(sparse) -> None:
    """KL of the joint softmax (window, entries, sink), summed over heads and renormalised, from the indexer's."""
    rng = np.random.default_rng(2)
    rows, length, heads, width, total, window, chosen = 2, 9, 3, 8, 5, 4, 3
    q, kv, entries = (
        rng.normal(size=s) for s in ((rows, length, heads, width), (rows, length, width), (rows, total, width))
    )
    sink, scores = rng.normal(size=heads), rng.normal(size=(rows, length, total))
    counts = np.minimum((np.arange(length) + 1) // 2, total)[None].repeat(rows, 0)
    first = np.maximum(counts - 3, 0)
    seen = (np.arange(total) < counts[..., None]) & (np.arange(total) >= first[..., None])
    scores = np.where(seen, scores, -np.inf)
    indices = None
    if sparse:
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :chosen]
        indices = np.where(np.take_along_axis(seen, order, -1), order, -1)
    expected = np.zeros((rows, length))
    for b, t in np.ndindex(rows, length):
        picked = np.flatnonzero(seen[b, t]) if indices is None else indices[b, t][indices[b, t] >= 0]
        if not len(picked):
            continue
        taught = np.zeros(len(picked))
        for h in range(heads):
            keys = np.concatenate([kv[b, max(0, t - window + 1) : t + 1], entries[b, picked]])
            weights = np.exp(keys @ q[b, t, h] * 0.3)
            taught += weights[-len(picked) :] / (weights.sum() + np.exp(sink[h]))
        taught /= taught.sum()
        student = np.exp(scores[b, t, picked])
        expected[b, t] = np.sum(taught * np.log(taught / (student / student.sum())))

    def f32(a):
        return jnp.asarray(a, jnp.float32)

    def divergence(scores, q):
        return index_divergence(
            scores,
            q,
            jnp.pad(f32(kv), [(0, 0), (window - 1, 0), (0, 0)]),
            f32(sink),
            jnp.zeros(rows, jnp.int32),
            None,
            f32(entries)[None],
            0,
            jnp.asarray(counts),
            None if indices is None else jnp.asarray(indices),
            None,
            jnp.asarray(first),
            window_size=window,
            scale=0.3,
        )

    # float32 against float64.
    np.testing.assert_allclose(divergence(f32(scores), f32(q)), expected, rtol=1e-4, atol=1e-5)
    of_scores, of_queries = jax.grad(lambda s, q: divergence(s, q).sum(), argnums=(0, 1))(f32(scores), f32(q))
    assert np.isfinite(of_scores).all()
    assert np.any(of_scores)
    assert not np.any(of_queries)  # the teacher does not learn
