"""Whole models on kernels, interpreted, prefer the same tokens as on the twins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled, small_config, small_model

from deepseek_v4 import Execution, Model
from deepseek_v4.stored_rows import KVRows, KVWords

# A window that slides, several CSA entries, one HCA entry.
LENGTH = 135


@pytest.mark.parametrize("kernels", ["tpu_interpret", "gpu_interpret"])
def test_a_model_on_kernels_prefers_the_same_tokens(kernels):
    small = small_model(small_config((0, 4, 128), mtp=False), seed=7)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, small.model.config.vocab_size, (1, LENGTH)))

    def logits(implementation):
        execution = dataclasses.replace(small.model.execution, implementation=implementation)
        model = Model(small.model.config, small.model.storage, execution)
        assert model.execution.implementation == implementation
        return np.asarray(compiled(lambda params: model.forward(params, tokens).logits)(small.params))

    expected, got = logits("xla"), logits(f"{kernels}|xla")
    # float32 throughout: kernels add the same terms in another order. Seen: 1e-6 of the largest; ten times that passes.
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert not np.array_equal(got, expected), "no kernel ran"
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def continued():
    """``run(layout, implementation)``: logits of a chunk and steps behind a cache that the twins filled, and tokens."""
    config = small_config((4, 128), mtp=False, num_hash_layers=0, hidden_size=128, index_topk=8)
    small = small_model(config, seed=3, dtype="bfloat16")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (1, 150)))

    def run(layout, implementation, form=jax.Array):
        execution = Execution("bfloat16", frozenset({"kv", "indexer"}), entry_layout=layout, implementation="xla")
        twins = dataclasses.replace(small.model, execution=execution)
        filled = compiled(twins.forward)(small.params, tokens[:, :130], twins.init_cache(1, 256)).cache
        assert any(isinstance(m["entries"], form) for group in filled["groups"] for m in group if "entries" in m)
        execution = dataclasses.replace(twins.execution, implementation=implementation)
        step = compiled(dataclasses.replace(small.model, execution=execution).forward)
        result = step(small.params, tokens[:, 130:], filled)
        out, chosen = [result.logits], []
        for _ in range(3):
            chosen.append(int(jnp.argmax(out[-1][0, -1])))
            result = step(small.params, jnp.asarray([[chosen[-1]]]), result.cache)
            out.append(result.logits)
        return np.concatenate([np.asarray(a, np.float32) for a in out], axis=1), chosen

    return run


@pytest.mark.slow  # every kernel of two layers is interpreted, several times
def test_a_model_on_kernels_over_the_published_cache_prefers_the_same_tokens(continued):
    """CSA entries as words and HCA entries in columns."""
    expected, by_twins = continued("columns", "xla", KVWords)
    got, by_kernels = continued("columns", "tpu_interpret|xla", KVWords)
    assert by_kernels == by_twins
    assert not np.array_equal(got, expected), "no kernel ran"
    # bfloat16 streams round terms that were added in another order to 2^-9 of themselves, layer by layer.
    np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow  # every kernel of two layers is interpreted, several times
def test_gpu_kernels_over_published_rows_give_what_they_give_over_the_same_numbers(continued):
    """The twins' tokens too; their logits differ at one token by 4 % of the largest, whichever cache kernels read."""
    twins, by_twins = continued("published", "xla", KVRows)
    expected, over_numbers = continued("plain", "gpu_interpret|xla")
    got, over_rows = continued("published", "gpu_interpret|xla", KVRows)
    assert over_rows == over_numbers == by_twins
    assert not np.array_equal(got, twins), "no kernel ran"
    # Channels of a product are added in other parts; then as above.
    np.testing.assert_allclose(got, expected, atol=0.03 * np.abs(expected).max(), rtol=0)
