"""Continuations in one call; the engine behind them has tests of its own (tests/engine)."""

import jax
import numpy as np
import pytest
from small_models import small_config, small_model

from deepseek_v4.generation import generate

PROMPTS = [(3, 5, 7), (11,), tuple(range(20, 60))]


@pytest.fixture(scope="module")
def small():
    return small_model(small_config((4,), mtp=False, num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=128))


def test_every_prompt_gets_its_greedy_continuation(small):
    found = generate(small.model, small.params, PROMPTS, 4, slots=2, prefill_chunk=16)
    run = jax.jit(lambda p, t: small.model.forward(p, t).logits)
    for prompt, new in zip(PROMPTS, found, strict=True):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(prompt) + 4] = prompt + new
        logits = np.asarray(run(small.params, padded))[0]
        assert tuple(np.argmax(logits[len(prompt) - 1 :][:4], axis=-1)) == new


def test_settings_are_those_of_a_request(small):
    options = {"slots": 2, "prefill_chunk": 16, "temperature": 1.0, "seed": 3}
    first, second = generate(small.model, small.params, [PROMPTS[0]] * 2, 4, **options)
    assert first != second
    assert generate(small.model, small.params, [], 4) == []
    with pytest.raises(ValueError, match="top_p"):
        generate(small.model, small.params, PROMPTS, 4, top_p=0.0)
    broken = jax.tree.map(lambda a: a * np.nan if a.dtype == np.float32 else a, small.params)
    with pytest.raises(ValueError, match="prompt 0: the model produced a logit"):
        generate(small.model, broken, PROMPTS, 4, slots=2, prefill_chunk=16)
