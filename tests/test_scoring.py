"""Scores against full passes of the model, and their independence of batch, chunk and mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_checkpoint import write_tiny_checkpoint

from deepseek_v4 import Execution, Model, Placement, make_mesh
from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.scoring import score

BATCH, LENGTH, CHUNK = 4, 256, 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def build(checkpoint, mesh=None):
    placement = None if mesh is None else Placement(make_mesh(mesh))
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32", placement=placement))
    return model, checkpoint.load(model)


@pytest.fixture(scope="module")
def tiny(checkpoint):
    return build(checkpoint)


def make_sequences():
    """Ragged: one token, around the compression ratios and the window, whole chunks, several chunks."""
    rng = np.random.default_rng(4)
    return [tuple(int(t) for t in rng.integers(3, 4000, length)) for length in (1, 5, 63, 64, 127, 129, 200)]


SEQUENCES = make_sequences()


@pytest.fixture(scope="module")
def scores(tiny):
    return list(score(*tiny, SEQUENCES, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True))


def assert_equal_scores(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            # Other shapes sum in another order: a few float32 roundings of logits of size about 1.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_scores_are_those_of_a_full_pass(tiny, scores):
    model, params = tiny
    padded = np.zeros((len(SEQUENCES), LENGTH), np.int32)
    for row, sequence in enumerate(SEQUENCES):
        padded[row, : len(sequence)] = sequence
    output = jax.jit(lambda p, t: model.forward(p, t, draft=True)[:2])(params, padded)
    logits, draft = (np.asarray(x, np.float64) for x in output)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, (sequence, got) in enumerate(zip(SEQUENCES, scores, strict=True)):
        size = len(sequence)
        assert got.logits.shape == (size, model.config.vocab_size)
        assert got.logprobs.shape == (size - 1,)
        assert got.mtp_logits.shape == (size - 1, model.config.vocab_size)
        assert {array.dtype for array in got} == {np.dtype(np.float32)}
        np.testing.assert_allclose(got.logits, logits[row, :size], rtol=0, atol=1e-5)
        expected = logprobs[row, np.arange(size - 1), list(sequence[1:])]
        np.testing.assert_allclose(got.logprobs, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.mtp_logits, draft[row, 1:size], rtol=0, atol=1e-5)


def test_a_draft_row_sees_the_next_token_and_no_later_one(tiny, scores):
    changed = list(SEQUENCES)
    longest = list(changed[-1])
    longest[150] = (longest[150] + 1) % 4000
    changed[-1] = tuple(longest)
    other = list(score(*tiny, changed, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True))[-1]
    same = scores[-1]
    np.testing.assert_array_equal(other.mtp_logits[:149], same.mtp_logits[:149])
    np.testing.assert_array_equal(other.logits[:150], same.logits[:150])
    assert np.all(np.any(other.mtp_logits[149:153] != same.mtp_logits[149:153], axis=-1))


@pytest.mark.parametrize(("chunk", "batch"), [(512, 7), (33, 4)])
def test_scores_do_not_depend_on_chunk_and_batch(tiny, scores, chunk, batch):
    got = score(*tiny, SEQUENCES, batch_size=batch, prefill_chunk=chunk, mtp=True)
    assert_equal_scores(list(got), scores)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=4,tensor=2"])
def test_scores_do_not_depend_on_the_mesh(checkpoint, scores, mesh):
    got = score(*build(checkpoint, mesh), SEQUENCES, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True)
    assert_equal_scores(list(got), scores)


def test_scoring_refuses_what_it_cannot_do(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="sequence 1: empty"):
        list(score(model, params, [(1,), ()]))
    no_draft = dataclasses.replace(
        model.config, drafter=None, num_nextn_predict_layers=0, compress_ratios=model.config.layer_ratios
    )
    with pytest.raises(ValueError, match="no MTP block"):
        list(score(Model(no_draft), {}, [(1,)], mtp=True))
