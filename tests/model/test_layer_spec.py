"""Scan groups: any schedule, in order, in few bodies; program size independent of depth."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FLASH_LIKE, ODD, PRO_LIKE, small_config

from deepseek_v4 import Execution, Model
from deepseek_v4.layer_spec import draft_specs, layer_specs, scan_groups


def expanded(groups) -> list:
    return [spec for group in groups for _ in range(group.repeats) for spec in group.pattern]


def summary(ratios, hashed: int) -> list[tuple[tuple[int, ...], int]]:
    groups = scan_groups(layer_specs(small_config(tuple(ratios), num_hash_layers=hashed)))
    return [(tuple(spec.compress_ratio for spec in group.pattern), group.repeats) for group in groups]


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(ratios=st.lists(st.sampled_from([0, 4, 128]), min_size=1, max_size=14), data=st.data())
def test_groups_are_the_layers_in_order(ratios: list[int], data: st.DataObject) -> None:
    specs = layer_specs(small_config(tuple(ratios), num_hash_layers=data.draw(st.integers(0, len(ratios)))))
    groups = scan_groups(specs)
    assert expanded(groups) == list(specs)
    index = [g.layer_index(r, m) for g in groups for r in range(g.repeats) for m in range(len(g.pattern))]
    assert index == list(range(len(specs)))
    assert sum(len(group.pattern) for group in groups) <= len(specs)
    runs = 1 + sum(a != b for a, b in itertools.pairwise(specs))
    assert sum(len(group.pattern) for group in groups) <= runs


def test_groups_of_known_schedules() -> None:
    assert summary([0, 0] + [4, 128] * 20 + [4], 3) == [((0,), 2), ((4,), 1), ((128, 4), 20)]
    assert summary([128, 128] + [4, 128] * 29 + [4], 3) == [((128,), 2), ((4,), 1), ((128, 4), 29)]
    assert summary([4], 0) == [((4,), 1)]
    assert summary([0] * 7, 0) == [((0,), 7)]
    assert sum(len(pattern) for pattern, _ in summary(ODD, 0)) == 4
    for ratios in (FLASH_LIKE, PRO_LIKE):
        assert len(summary(ratios, 3)) == 3


def test_the_draft_layer_is_no_main_layer() -> None:
    config = small_config((128, 4), num_hash_layers=2)
    assert len(layer_specs(config)) == 2
    (draft,) = draft_specs(config)
    assert (draft.kind, draft.hash_router, draft.rope.yarn, draft.rope.theta) == ("SWA", False, None, 1e4)
    assert draft_specs(small_config((4,), mtp=False, num_hash_layers=0)) == ()


def program_size(ratios, cached: bool) -> int:
    """Operations of the traced program, those inside loops and calls counted once."""
    model = Model(small_config(tuple(ratios), num_hash_layers=1, hc_sinkhorn_iters=2), execution=Execution("float32"))
    cache = model.abstract_cache(1, 256) if cached else None
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    traced = jax.jit(lambda p, t, c: model.forward(p, t, c, draft=True)).trace(model.abstract_params(), tokens, cache)
    return traced.lower().as_text().count(" = ")


@pytest.mark.parametrize("cached", [False, True])
def test_program_size_does_not_depend_on_depth(cached: bool) -> None:
    small, large = (program_size([0, 0] + [4, 128] * pairs, cached) for pairs in (3, 30))
    # Lowering shares functions of equal shapes, of which another depth makes a few more or less.
    assert abs(large - small) < 0.005 * small
