"""Cache bytes from formulas, against published figures and against the arrays of the model's own cache."""

import math
from pathlib import Path

import jax
import pytest
from small_models import FLASH_LIKE, ODD, PRO_LIKE, small_config

from deepseek_v4 import Config, Execution, Model
from deepseek_v4.planning.cache_bytes import (
    BFLOAT16,
    PUBLISHED,
    bytes_per_token,
    cache_bytes,
    gqa_bytes_per_token,
    model_cache_bytes,
    v32_bytes_per_token,
)
from deepseek_v4.planning.flops import V32

_CONFIGS = Path(__file__).parents[2] / "configs"
FLASH, PRO = (Config.from_file(f"configs/{name}") for name in ("flash", "pro"))


def test_published_bytes_per_token_of_context():
    assert PUBLISHED.row(512, 64) == 584
    assert PUBLISHED.index_key(128) == 68
    assert bytes_per_token(FLASH) == 21 * (584 + 68) / 4 + 20 * 584 / 128 == 3514.25
    assert bytes_per_token(PRO) == 30 * (584 + 68) / 4 + 31 * 584 / 128 == 5031.4375
    assert v32_bytes_per_token(V32()) == 61 * (656 + 132) == 48068
    assert BFLOAT16.row(512, 64) == 1024


def test_cache_is_about_two_percent_of_grouped_query_attention():
    for config in (FLASH, PRO):
        share = bytes_per_token(config) / gqa_bytes_per_token(config.num_hidden_layers)
        assert share == pytest.approx(0.02, rel=0.01)


def test_a_million_tokens_of_flash_by_part():
    parts = cache_bytes(FLASH, 1 << 20)
    assert parts["entries"] == (21 * 262144 + 20 * 8192) * 584
    assert parts["index keys"] == 21 * 262144 * 68
    assert parts["window"] == 43 * 128 * 584
    assert parts["state"] == 2 * 4 * (21 * 8 * 2 * (512 + 128) + 20 * 128 * 512)


@pytest.mark.parametrize("ratios", [FLASH_LIKE, PRO_LIKE, ODD], ids=["flash", "pro", "odd"])
@pytest.mark.parametrize(("batch", "context", "rollback"), [(1, 64, 0), (3, 640, 0), (2, 1000, 4)])
def test_formulas_equal_the_arrays_of_the_model(ratios, batch, context, rollback):
    config = small_config(ratios)
    model = Model(config, execution=Execution(entry_layout="plain"))
    cache = model.abstract_cache(batch, context, rollback)
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert model_cache_bytes(config, batch, context, rollback) == kept
