"""The list of matrix products against closed forms, the published figures, and products counted in traced programs."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small_models import FLASH_LIKE, PRO_LIKE, small_config

from deepseek_v4 import Config, Execution, Model
from deepseek_v4.planning import efficiency
from deepseek_v4.planning.flops import V32, WEIGHTS, Term, equivalent_operations, token_terms
from deepseek_v4.planning.lowered import dot_operations

MILLION = 1 << 20
_CONFIGS = Path(__file__).parents[2] / "configs"
FLASH, PRO = (Config.from_file(f"configs/{name}") for name in ("flash", "pro"))


def by_name(terms):
    assert len({term.name for term in terms}) == len(terms)
    return {term.name: term for term in terms}


def test_flash_terms_that_grow_with_context_in_numbers():
    # 21 CSA layers score a quarter of the tokens with 64 heads of 128; 20 HCA layers read one entry in 128, twice.
    terms = by_name(token_terms(FLASH, MILLION))
    assert terms["indexer scores"].operations == 21 * 2 * 64 * 128 * 262144
    assert terms["HCA entries"].operations == 20 * 2 * 2 * 64 * 512 * 8192
    assert terms["CSA entries"].operations == 21 * 2 * 2 * 64 * 512 * 512
    assert terms["attn window"].operations == 43 * 2 * 2 * 64 * 512 * 128


def test_pro_terms_of_the_weights_in_numbers():
    terms = by_name(token_terms(PRO, MILLION))
    assert terms["routed experts"].operations == 61 * 2 * 6 * 3 * 7168 * 3072
    assert terms["attn.wo_a"].operations == 61 * 2 * 16 * 1024 * 4096
    assert terms["hyper-connections"].operations == 61 * 2 * 2 * 24 * 28672
    assert terms["head"].operations == 2 * 129280 * 7168


def test_v32_reads_2048_keys_and_scores_every_token():
    terms = by_name(V32().token_terms(MILLION))
    assert terms["indexer scores"].operations == 61 * 2 * 64 * 128 * MILLION
    assert terms["attn selected keys"].operations == 61 * 2 * 128 * (576 + 512) * 2048


def test_weights_of_v32_add_up_to_its_published_active_parameters():
    # V3 activates 37B, of which 0.9B are the embedding, which multiplies nothing; the indexer of V3.2 adds 0.85B.
    weights = [t for t in V32().token_terms(MILLION) if t.name not in ("attn selected keys", "indexer scores")]
    assert sum(t.operations for t in weights) / 2 == pytest.approx(37e9 - 0.93e9 + 0.85e9, rel=0.02)


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_weights_of_a_token_add_up_to_the_active_parameters(config):
    grown = ("attn window", "CSA entries", "HCA entries", "indexer scores")
    products = sum(t.operations for t in token_terms(config, MILLION) if t.name not in grown) // 2
    # All that is active but does not multiply: norms, sinks, position biases, mHC scales and bases.
    vectors = efficiency.count_parameters(config).active - products
    assert 0 < vectors < 1e-3 * products


def test_equivalent_operations_are_decided_by_the_wider_operand_unless_a_pair_is_named():
    term = Term("x", 1, 100, "fp8", "fp4", "")
    assert term.equivalent() == 100
    assert term.equivalent({**WEIGHTS, "fp8*fp4": 0.5}) == 50
    assert Term("x", 1, 100, "bf16", "fp8", "").equivalent() == 200
    assert equivalent_operations([Term("x", 1, 100, "fp4", "fp4", ""), Term("y", 1, 1, "fp32", "bf16", "")]) == 54


@pytest.mark.parametrize(
    ("config", "operations", "times_less", "cache", "cache_less"),
    [(FLASH, 0.10, 9.8, 0.07, 13.7), (PRO, 0.27, 3.7, 0.10, 9.5)],
    ids=["flash", "pro"],
)
def test_published_ratios_at_a_million_tokens(config, operations, times_less, cache, cache_less):
    found = efficiency.ratios(config)
    assert round(found["operations ratio"], 2) == operations
    assert round(1 / found["operations ratio"], 1) == times_less
    assert round(found["cache ratio"], 2) == cache
    # 9.554 is printed as 9.5 by the paper: truncated, not rounded.
    assert math.floor(10 / found["cache ratio"] + 0.05) / 10 == pytest.approx(cache_less, abs=0.1)


def test_the_reading_with_fp4_at_half_the_fp8_rate_is_25_9_percent_for_pro():
    # An independent count that halves FP8 x FP4 and runs wo_a and the head as the reference code does.
    reading = efficiency.VARIANTS["FP8 x FP4 at 0.5, wo_a in BF16, head in FP32"]
    found = efficiency.ratios(PRO, precision=reading)
    assert round(found["operations ratio"], 3) == 0.259
    # What separates it from the default: 24.2 GFLOP of experts less, 8.2 of wo_a and 3.7 of the head more.
    default = efficiency.ratios(PRO)["operations"]
    experts, wo_a, head = 61 * 6 * 3 * 7168 * 3072, 61 * 2 * 16 * 1024 * 4096, 2 * 2 * 129280 * 7168
    assert found["operations"] - default == -experts + wo_a + head


def test_published_parameter_counts():
    # Totals: logical parameters without MTP of the released inventories, hash tables not being parameters.
    flash, pro = efficiency.count_parameters(FLASH), efficiency.count_parameters(PRO)
    assert round(flash.total / 1e9, 2) == 284.33
    assert round(pro.total / 1e9) == 1573
    assert (math.floor(flash.active / 1e9), round(pro.active / 1e9)) == (13, 49)


@pytest.mark.parametrize("ratios", [FLASH_LIKE, PRO_LIKE], ids=["flash-like", "pro-like"])
@pytest.mark.parametrize("context", [128, 640, 4096])
def test_list_equals_the_products_of_the_traced_decode_step(ratios, context):
    config = small_config(ratios)
    model = Model(config, execution=Execution(implementation="xla", entry_layout="plain"))
    step = functools.partial(model.forward, last_only=True, draft=True)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = dot_operations(step, model.abstract_params(), tokens, model.abstract_cache(1, context))
    assert counted.total() == sum(term.operations for term in token_terms(config, context, draft=True))


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_list_and_cache_equal_the_program_at_full_size(config):
    for what, listed, program in efficiency.compare_with_program(config, MILLION):
        assert listed == program, what


def test_products_in_loops_and_branches_are_counted_as_often_as_they_run():
    a = jnp.ones((3, 5))
    b = jnp.ones((5, 5))

    def scanned(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]

    assert dot_operations(scanned, a, b).total() == 7 * 2 * 3 * 5 * 5

    def branched(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ b)

    assert dot_operations(branched, a, b).total() == 2 * 2 * 3 * 5 * 5

    def unknown(a, b):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ b, a)

    with pytest.raises(ValueError, match="while"):
        dot_operations(unknown, a, b)
