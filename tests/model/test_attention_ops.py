"""The attention operation against a float64 loop over queries: window, entries, selections, sinks, garbage."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.visibility import visible_entries
from pallas_kernels.compressed_attention import compressed_attention

BATCH, HEADS, WIDTH, WINDOW, ENTRIES = 3, 4, 16, 5, 11
SCALE = 0.37


def loop(q, window, sink, start, entries, counts, indices, window_size=WINDOW):
    """One head of one query at a time."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        position = start[b] + t
        rows = [
            window[b, t + i].astype(float) for i in range(window_size) if position - (window_size - 1) + i >= 0
        ]  # row t + i of the window is position start + t - (window_size - 1) + i
        if entries is not None:
            chosen = range(counts[b, t]) if indices is None else [i for i in indices[b, t] if i >= 0]
            rows += [entries[b, i].astype(float) for i in chosen]
        scores = np.array([row @ q[b, t, h] for row in rows]) * SCALE
        weights = np.exp(scores)
        total = weights.sum() + np.exp(float(sink[h]))
        out[b, t, h] = sum(w * row for w, row in zip(weights, rows, strict=True)) / total
    return out


def inputs(seed: int, length: int, start):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    start = np.asarray(start)
    counts = np.asarray(visible_entries(start[:, None] + np.arange(length), 4)).clip(0, ENTRIES)
    indices = np.full((BATCH, length, 4), -1)
    for b, t in np.ndindex(counts.shape):
        chosen = rng.permutation(counts[b, t])[:4]
        indices[b, t, : len(chosen)] = chosen
    return {
        "q": normal(BATCH, length, HEADS, WIDTH),
        "window": normal(BATCH, WINDOW - 1 + length, WIDTH),
        "sink": normal(HEADS),
        "start": start,
        "entries": normal(BATCH, ENTRIES, WIDTH),
        "counts": counts,
        "indices": indices,
    }


def run(q, window, sink, start, entries, counts, indices):
    optional = {"entries": None if entries is None else entries[None], "counts": counts, "indices": indices}
    return np.asarray(
        compressed_attention(
            *(jnp.asarray(a) for a in (q, window, sink, start)),
            **{k: None if a is None else jnp.asarray(a) for k, a in optional.items()},
            window_size=WINDOW,
            scale=SCALE,
        )
    )


KINDS = {"SWA": ("entries", "counts", "indices"), "CSA": (), "HCA": ("indices",)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "start"), [(1, (0, 3, 17)), (13, (0, 2, 30))])
def test_equals_the_loop(kind: str, length: int, start) -> None:
    case = inputs(length, length, start) | dict.fromkeys(KINDS[kind])
    # A float32 softmax over a few dozen rows of size one.
    np.testing.assert_allclose(run(**case), loop(**case), rtol=0, atol=3e-6)


def test_more_queries_than_a_block_equal_the_loop() -> None:
    case = inputs(5, 131, (0, 2, 7))
    for kind, absent in KINDS.items():
        part = case | dict.fromkeys(absent)
        np.testing.assert_allclose(run(**part), loop(**part), rtol=0, atol=3e-6, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_that_no_query_sees_does_not_leak(kind: str) -> None:
    """NaN times a weight of zero is NaN: positions before the sequence and entries beyond the counts."""
    case = inputs(6, 6, (0, 1, 9)) | dict.fromkeys(KINDS[kind])
    expected = loop(**case)
    dirty = {k: None if v is None else v.copy() for k, v in case.items()}
    for b, start in enumerate(case["start"]):
        dirty["window"][b, : max(WINDOW - 1 - start, 0)] = np.nan
        if dirty["entries"] is not None:
            dirty["entries"][b, case["counts"][b].max() :] = np.nan
    np.testing.assert_allclose(run(**dirty), expected, rtol=0, atol=3e-6)


def test_a_query_with_nothing_to_see_returns_zero() -> None:
    """Only the sink is left, which has no value: rows at negative positions, before a draft's first token."""
    case = inputs(7, 1, (-1, -1, -1))
    case["counts"][:], case["indices"][:] = 0, -1
    case["window"][:], case["entries"][:] = np.nan, np.nan
    np.testing.assert_array_equal(run(**case), 0)


def test_a_huge_sink_takes_all_the_weight_and_a_tiny_one_none() -> None:
    case = inputs(8, 3, (4, 5, 6)) | dict.fromkeys(KINDS["HCA"])
    case["sink"] = np.array([1e4, -1e4, 300, -300], np.float32)
    found = run(**case)
    np.testing.assert_array_equal(found[:, :, [0, 2]], 0)
    quiet = case | {"sink": np.full(HEADS, -50, np.float32)}
    np.testing.assert_allclose(found[:, :, [1, 3]], loop(**quiet)[:, :, [1, 3]], rtol=0, atol=3e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    case = inputs(9, 4, (3, 40, 0))
    whole = run(**case)
    order = np.array([2, 0, 1])
    shuffled = {k: v if k == "sink" else v[order] for k, v in case.items()}
    np.testing.assert_array_equal(run(**shuffled), whole[order])
