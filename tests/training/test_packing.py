"""Rows of several documents: each document as if it were alone, in every kind of layer and in the MTP block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled, small_config, small_model

from deepseek_v4 import RELEASED
from deepseek_v4.positions import Tokens, Training, entry_range, window_ends

CONFIG = small_config((0, 4, 128), num_hash_layers=1, index_topk=8)
LENGTH = 290
# Documents that begin and end at every place of a window, one without a complete window, one of a single token, one
# longer than a sliding window with entries of both kinds, one that ends with its window.
LENGTHS = (133, 2, 1, 4, 7, 130, 13)


@pytest.fixture(scope="module")
def small():
    return small_model(CONFIG, RELEASED)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, LENGTH)


def documents(lengths=LENGTHS) -> jnp.ndarray:
    return jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)


def run(small, indexer: str):
    def hidden(params, tokens, positions):
        training = Training(jnp.ones(tokens.shape, bool), indexer)
        out = small.model.hidden(params, tokens, training=training, positions=positions, draft=True)
        head = small.model.vocabulary(params).astype(out.main.dtype)
        return out.main @ head.T, out.draft @ head.T

    return compiled(hidden)


@pytest.mark.parametrize("indexer", ["off", "dense"])
def test_logits_of_a_document_are_those_of_the_document_alone(small, tokens, indexer) -> None:
    program = run(small, indexer)
    main, draft = program(small.params, jnp.asarray(tokens)[None], documents())
    first = 0
    for length in LENGTHS:
        # Alone at the start of a row; what follows it there is another document.
        rest = (length, LENGTH - length)
        row = np.roll(tokens, -first)
        alone, alone_draft = program(small.params, jnp.asarray(row)[None], documents(rest))
        # float32 rounding: sums run over the same keys at other places. Logits are of size one.
        np.testing.assert_allclose(main[0, first : first + length], alone[0, :length], rtol=0, atol=3e-5)
        np.testing.assert_allclose(draft[0, first + 1 : first + length], alone_draft[0, 1:length], rtol=0, atol=3e-5)
        first += length


def test_a_row_of_one_document_equals_the_forward_pass(small, tokens) -> None:
    main, draft = run(small, "off")(small.params, jnp.asarray(tokens)[None], documents((LENGTH,)))
    out = compiled(lambda params, tokens: small.model.forward(params, tokens, draft=True))(
        small.params, jnp.asarray(tokens)[None]
    )
    np.testing.assert_allclose(main, out.logits, rtol=0, atol=3e-5)
    np.testing.assert_allclose(draft[:, 1:], out.draft_logits[:, 1:], rtol=0, atol=3e-5)


def test_no_gradient_crosses_a_boundary(small, tokens) -> None:
    """The loss of one document does not move with the embedding of another's tokens."""
    model = small.model
    where = documents()[0]
    number = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ids = np.where(number == 5, 7, np.where(number == 4, 9, 11))[None]  # tokens of their own for each document

    def loss(embedding, params):
        params = {**params, "shell": {**params["shell"], "embed": {"weight": embedding}}}
        out = model.hidden(
            params,
            jnp.asarray(ids),
            training=Training(jnp.ones(ids.shape, bool), "off"),
            positions=where[None],
            draft=True,
        )
        of_five = (number == 5)[None, :, None]
        return jnp.sum(jnp.where(of_five, jnp.sin(out.main), 0)) + jnp.sum(
            jnp.where(of_five & (where > 0)[None, :, None], jnp.sin(out.draft), 0)
        )

    gradient = compiled(jax.grad(loss))(small.params["shell"]["embed"]["weight"].astype(jnp.float32), small.params)
    assert np.abs(gradient[7]).max() > 0
    assert np.abs(gradient[9]).max() == 0
    assert np.abs(gradient[11]).max() == 0


@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_of_a_row_are_counted_as_a_loop_counts_them(ratio) -> None:
    positions = documents()
    ends, first, count, done, begin = [], [], [], 0, 0
    for place, position in enumerate(np.asarray(positions)[0]):
        begin = done if position == 0 else begin
        if (position + 1) % ratio == 0:
            ends.append(place)
            done += 1
        first.append(begin)
        count.append(done)
    row = jnp.zeros((1, LENGTH), jnp.int32)
    tokens = Tokens(row, jnp.zeros(1, jnp.int32), jnp.full(1, LENGTH, jnp.int32), positions)
    found_first, found_count = entry_range(tokens, ratio)
    np.testing.assert_array_equal(found_count[0], count)
    np.testing.assert_array_equal(found_first[0], first)
    np.testing.assert_array_equal(window_ends(positions, ratio)[0, : len(ends)], ends)
