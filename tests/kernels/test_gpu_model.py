"""A whole float32 model on the GPU kernel that takes float32 (attention), interpreted, prefers the same tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from small_models import compiled, small_config, small_model

from deepseek_v4 import Model

# A window that slides, several CSA entries, one HCA entry.
LENGTH = 135


def test_a_model_on_the_attention_kernel_prefers_the_same_tokens():
    small = small_model(small_config((0, 4, 128), mtp=False), seed=7)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, small.model.config.vocab_size, (1, LENGTH)))

    def logits(implementation):
        execution = dataclasses.replace(small.model.execution, implementation=implementation)
        model = Model(small.model.config, small.model.storage, execution)
        assert model.execution.implementation == implementation
        return np.asarray(compiled(lambda params: model.forward(params, tokens).logits)(small.params))

    expected, got = logits("xla"), logits("gpu_interpret|xla")
    # float32 throughout; the kernel adds the same terms in another order, and a layer multiplies what differs.
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max(), rtol=0)
    assert not np.array_equal(got, expected), "the kernel did not run"
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
