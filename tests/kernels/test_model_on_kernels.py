"""A whole float32 model on the kernels that take float32, interpreted, prefers the same tokens as on the twins."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled, small_config, small_model

from deepseek_v4 import Model

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
