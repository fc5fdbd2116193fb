"""The lightning indexer's scores and exact top-k against brute force, ties and garbage included."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.index_topk import index_topk, xla

HEADS, WIDTH, ENTRIES, QUERIES = 4, 8, 23, 6


def brute_force(q, weights, keys, counts, k):
    """One query at a time in float64: descending score, ties to the lowest index, -1 where fewer are visible."""
    out = np.full((*counts.shape, min(k, keys.shape[1])), -1)
    for b, t in np.ndindex(counts.shape):
        count = min(counts[b, t], keys.shape[1])
        scores = [float(weights[b, t] @ np.maximum(q[b, t] @ key, 0)) for key in keys[b, :count]]
        best = sorted(range(count), key=lambda s: (-scores[s], s))[:k]
        out[b, t, : len(best)] = best
    return out


def small_integers(shape, low=-1, high=1):
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


@pytest.fixture(scope="module")
def select():
    def run(k):
        return compiled(lambda q, w, keys, counts: index_topk(q, w, keys[None], counts, k=k))

    return {k: run(k) for k in (1, 5, 40)}


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    q=small_integers((2, QUERIES, HEADS, WIDTH)),
    weights=small_integers((2, QUERIES, HEADS), -2, 2),
    keys=small_integers((2, ENTRIES, WIDTH)),
    counts=small_integers((2, QUERIES), 0, ENTRIES),
    k=st.sampled_from([1, 5, 40]),
)
def test_exact_and_stable_under_many_ties(select, q, weights, keys, counts, k) -> None:
    """Small integers are exact in float32, and tie all the time: at 0, at -0, and between different heads."""
    q, weights, keys = (a.astype(np.float32) for a in (q, weights, keys))
    found = select[k](*(jnp.asarray(a) for a in (q, weights, keys, counts)))
    np.testing.assert_array_equal(found, brute_force(q, weights, keys, counts, k))


def random_case(seed: int):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2, QUERIES, HEADS, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(2, QUERIES, HEADS)).astype(np.float32)
    keys = rng.normal(size=(2, ENTRIES, WIDTH)).astype(np.float32)
    return q, weights, keys, np.array([[0, 1, 4, 5, 6, 23], [2, 2, 2, 2, 23, 22]])


def test_garbage_in_invisible_keys_is_never_chosen(select) -> None:
    q, weights, keys, counts = random_case(0)
    counts = np.minimum(counts, 11)
    expected = brute_force(q, weights, keys, counts, 5)
    for garbage in (np.nan, np.inf, 1e30):
        dirty = keys.copy()
        dirty[:, 11:] = garbage
        found = select[5](*(jnp.asarray(a) for a in (q, weights, dirty, counts)))
        np.testing.assert_array_equal(found, expected)


def test_blocks_of_queries_choose_what_all_at_once_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    q, weights, keys, counts = (jnp.asarray(a) for a in random_case(1))
    whole = index_topk(q, weights, keys[None], counts, k=5, implementation="xla")
    monkeypatch.setattr(xla, "_SCORE_ELEMENTS", 2 * HEADS * ENTRIES * 4)  # blocks of 4, the last one padded
    np.testing.assert_array_equal(index_topk(q, weights, keys[None], counts, k=5, implementation="xla"), whole)


def test_only_the_given_layer_is_read(select) -> None:
    q, weights, keys, counts = random_case(2)
    stack = np.stack([np.full_like(keys, np.nan), keys, keys[:, ::-1]])
    found = index_topk(*(jnp.asarray(a) for a in (q, weights, stack, counts)), layer=jnp.int32(1), k=5)
    np.testing.assert_array_equal(found, brute_force(q, weights, keys, counts, 5))
