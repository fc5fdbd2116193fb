"""No token moves what came before it: bit by bit, at every position mod every ratio, with several windows around."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config, small_model

from deepseek_v4.visibility import visible_entries

ROWS, LENGTH = 4, 300
# Every residue mod 128 (and so mod 4), each with a complete HCA window and 32 complete CSA windows before it.
POSITIONS = range(136, 264)


@pytest.fixture(scope="module")
def run():
    config = small_config(
        (0, 4, 128), num_hash_layers=1, hc_sinkhorn_iters=2, hidden_size=64, head_dim=32, index_topk=8
    )
    small = small_model(config, seed=21)
    model = small.model
    forward = compiled(lambda p, t: model.forward(p, t, draft=True)[:2])

    def outputs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, draft = forward(small.params, jnp.asarray(tokens))
        return np.asarray(logits), np.asarray(draft)

    return outputs


@pytest.fixture(scope="module")
def base(run):
    tokens = np.tile(np.random.default_rng(21).integers(0, 256, LENGTH), (ROWS, 1))
    return tokens, *run(tokens)


@pytest.mark.parametrize("first", range(POSITIONS.start, POSITIONS.stop, 32))
def test_a_changed_token_moves_nothing_before_it(run, base, first: int) -> None:
    tokens, logits, draft = base
    for start in range(first, first + 32, ROWS):
        changed = tokens.copy()
        for b in range(ROWS):
            changed[b, start + b] = (changed[b, start + b] + 1) % 256
        now, now_draft = run(changed)
        for b in range(ROWS):
            position = start + b
            np.testing.assert_array_equal(now[b, :position], logits[b, :position])
            np.testing.assert_array_equal(now_draft[b, 1:position], draft[b, 1:position])
            # Two tokens may share a hash row, but never an embedding.
            assert (now[b, position] != logits[b, position]).any()
            assert (now_draft[b, position] != draft[b, position]).any()
            assert (now[b, position + 1 :] != logits[b, position + 1 :]).any(axis=-1).all()


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(position=st.integers(0, 2**20), ratio=st.sampled_from([4, 128]), entry=st.integers(0, 2**19))
def test_an_entry_is_visible_exactly_when_its_window_is_complete(position: int, ratio: int, entry: int) -> None:
    visible = entry < int(visible_entries(position, ratio))
    assert visible == ((entry + 1) * ratio - 1 <= position)
