"""Sampling against closed forms: the distribution drawn from, the nucleus, ties, and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.sampling import Sampling, sample

sample_jit = jax.jit(sample)


def draw(logits, temperature=1.0, top_p=1.0, count=20000, seed=0, top_k=0, min_p=0.0):
    """``count`` draws from one row of logits, one stream each."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    parameters = Sampling(
        jnp.full(count, temperature, jnp.float32),
        jnp.full(count, top_p, jnp.float32),
        jnp.full(count, top_k, jnp.int32),
        jnp.full(count, min_p, jnp.float32),
        jnp.full(count, seed, jnp.uint32),
        jnp.arange(count, dtype=jnp.uint32),
    )
    return np.asarray(sample_jit(rows, parameters, jnp.zeros(count, jnp.int32)))


def chi_square(draws, probability):
    """The statistic and its mean and standard deviation under the null hypothesis (k - 1 degrees of freedom)."""
    counts = np.bincount(draws, minlength=len(probability))
    assert np.all(counts[probability == 0] == 0)
    expected = probability[probability > 0] * len(draws)
    statistic = np.sum((counts[probability > 0] - expected) ** 2 / expected)
    freedom = len(expected) - 1
    return statistic, freedom, np.sqrt(2 * freedom)


LOGITS = np.array([0.3, -1.0, 2.0, 1.9, -0.5, 0.0, 1.0, -2.0])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def nucleus(probability, top_p):
    """The fewest most probable tokens that reach top_p, renormalised, by definition."""
    kept, total = [], 0.0
    for token in sorted(range(len(probability)), key=lambda t: (-probability[t], t)):
        kept.append(token)
        total += probability[token]
        if total >= top_p:
            break
    out = np.zeros_like(probability)
    out[kept] = probability[kept] / probability[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_draws_follow_the_tempered_nucleus(temperature, top_p):
    expected = nucleus(softmax(LOGITS / temperature), top_p)
    statistic, mean, deviation = chi_square(draw(LOGITS, temperature, top_p, seed=11), expected)
    # Five standard deviations of the chi-square statistic above its mean: one false alarm in about 10^5.
    assert statistic <= mean + 5 * deviation + 1e-9


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize(("top_k", "min_p"), [(3, 0.0), (0, 0.25), (4, 0.4), (99, 0.0)])
def test_filters_apply_one_after_the_other(top_k, min_p, top_p):
    probability = softmax(LOGITS)
    order = sorted(range(8), key=lambda t: -probability[t])
    kept = np.zeros(8)
    kept[order[: top_k or 8]] = probability[order[: top_k or 8]]
    kept = nucleus(kept / kept.sum(), top_p)
    kept[probability < min_p * probability.max()] = 0
    expected = kept / kept.sum()
    draws = draw(LOGITS, top_p=top_p, seed=3, top_k=top_k, min_p=min_p)
    statistic, mean, deviation = chi_square(draws, expected)
    assert statistic <= mean + 5 * deviation + 1e-9


def test_equal_logits_at_the_edge_of_the_filters_go_to_the_lowest_ids():
    assert set(draw([1.0, 0, 0, 0, 2.0], top_k=3, count=2000)) == {4, 0, 1}


def test_draws_of_successive_steps_are_independent():
    count = 20000
    rows = jnp.zeros((count, 2), jnp.float32)
    parameters = Sampling.of([(1.0, 1.0, 0, 0.0, 0, stream) for stream in range(count)])
    first = np.asarray(sample_jit(rows, parameters, jnp.zeros(count, jnp.int32)))
    second = np.asarray(sample_jit(rows, parameters, jnp.ones(count, jnp.int32)))
    statistic, mean, deviation = chi_square(2 * first + second, np.full(4, 0.25))
    assert statistic <= mean + 5 * deviation


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=16, max_size=16))
def test_greedy_takes_the_lowest_id_of_the_largest(values):
    parameters = Sampling.of([(0.0, 1.0, 0, 0.0, 5, 0)])
    token = sample_jit(jnp.asarray([values], jnp.float32), parameters, jnp.zeros(1, jnp.int32))
    assert int(token[0]) == values.index(max(values))


def test_equal_logits_at_the_edge_of_the_nucleus_go_to_the_lowest_ids():
    # Eight equal tokens, 0.3 of the mass: three of them, ids 0, 1 and 2.
    assert set(draw(np.zeros(8), top_p=0.3, count=2000)) == {0, 1, 2}


def test_a_tiny_top_p_is_greedy_and_a_tiny_temperature_nearly():
    assert set(draw(LOGITS, top_p=1e-6, count=200)) == {2}
    assert set(draw(LOGITS, temperature=1e-6, count=200)) == {2}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 1000))
def test_a_row_depends_on_nothing_but_itself(order, step):
    rng = np.random.default_rng(step)
    logits = rng.normal(size=(6, 64)).astype(np.float32)
    rows = [
        (0.0, 1.0, 0, 0.0, 1, 0),
        (1.0, 1.0, 0, 0.0, 1, 1),
        (0.7, 0.5, 0, 0.0, 1, 2),
        (1.0, 0.9, 3, 0.1, 2, 1),
        (1.3, 1.0, 9, 0.0, 1, 9),
        (0.0, 0.2, 2, 0.5, 3, 3),
    ]
    steps = np.arange(6, dtype=np.int32) + step

    def run(index):
        return np.asarray(sample_jit(logits[index], Sampling.of([rows[i] for i in index]), steps[index]))

    together, shuffled = run(list(range(6))), run(list(order))
    np.testing.assert_array_equal(shuffled, together[list(order)])
    for i in (1, 2):  # beside copies of itself only: no top-p or greedy row in the batch
        np.testing.assert_array_equal(run([i] * 6), np.full(6, together[i]))


def test_seed_stream_and_step_each_change_the_draws():
    logits = jnp.zeros((1, 4096), jnp.float32)

    def one(seed, stream, step):
        return int(sample_jit(logits, Sampling.of([(1.0, 1.0, 0, 0.0, seed, stream)]), jnp.full(1, step, jnp.int32))[0])

    base = one(0, 0, 0)
    assert one(0, 0, 0) == base
    assert len({base, one(1, 0, 0), one(0, 1, 0), one(0, 0, 1), one(1, 1, 1)}) == 5


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ((-1.0, 1.0, 0, 0.0, 0, 0), "temperature"),
        ((float("nan"), 1.0, 0, 0.0, 0, 0), "temperature"),
        ((float("inf"), 1.0, 0, 0.0, 0, 0), "temperature"),
        ((1.0, 0.0, 0, 0.0, 0, 0), "top_p"),
        ((1.0, 1.5, 0, 0.0, 0, 0), "top_p"),
        ((1.0, 1.0, -1, 0.0, 0, 0), "top_k"),
        ((1.0, 1.0, 0, 1.0, 0, 0), "min_p"),
        ((1.0, 1.0, 0, -0.1, 0, 0), "min_p"),
        ((1.0, 1.0, 0, 0.0, -1, 0), "seed"),
        ((1.0, 1.0, 0, 0.0, 2**32, 0), "seed"),
        ((1.0, 1.0, 0, 0.0, 0, -1), "stream"),
    ],
)
def test_bad_parameters_are_named(row, name):
    with pytest.raises(ValueError, match=name):
        Sampling.of([row])
