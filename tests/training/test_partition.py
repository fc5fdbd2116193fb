"""Masks of trained parameters by name, and trees cut in two."""

import jax
import numpy as np
import pytest
from released import released_tensors
from small_models import FLASH_LIKE, small_config

from deepseek_v4 import RELEASED, Model
from deepseek_v4.names import matches
from deepseek_v4.nn.variables import MASTER, Buffer, Packed
from deepseek_v4.parameters import is_spec
from deepseek_v4.training import partition

# Groups of the layers: 0 and 1 stacked, 2 alone, then (3, 4) and (5, 6) as two stacks of two.
MODEL = Model(small_config(FLASH_LIKE), MASTER)
SPECS = MODEL.parameter_specs()


def trained(**patterns) -> set[str]:
    mask = partition.trainable_mask(SPECS, **patterns)
    names = jax.tree.leaves(
        jax.tree.map(lambda spec, keep, leaf: list(leaf) if keep else [], SPECS, mask, NAMES, is_leaf=is_spec)
    )
    return set(names)


NAMES = partition.parameter_names(SPECS)
ALL = trained()


def test_names_are_those_of_the_release():
    released = {name for name in released_tensors(MODEL.config, MASTER) if ".ffn.experts." not in name}
    found = set(jax.tree.leaves(NAMES))
    assert {name for name in found if ".ffn.experts." not in name} == released
    assert "layers.6.ffn.experts.w2.weight" in found


def test_everything_is_trained_but_buffers_and_packed_weights():
    kinds = jax.tree.leaves(jax.tree.map(lambda s: issubclass(s.kind, (Buffer, Packed)), SPECS, is_leaf=is_spec))
    assert jax.tree.leaves(partition.trainable_mask(SPECS)) == [not kind for kind in kinds]
    packed = Model(MODEL.config, RELEASED).parameter_specs()
    mask = partition.trainable_mask(packed)
    assert not mask["groups"][0][0]["attn"]["wq_a"]["weight"]
    assert not mask["groups"][0][0]["ffn"]["experts"]["w1"]["scale"]
    assert mask["groups"][0][0]["attn_norm"]["weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"only": ["attn"]}, lambda n: ".attn." in n),
        ({"only": ["attn.wq_*"]}, lambda n: ".attn.wq_" in n),
        ({"only": ["layers.2"]}, lambda n: n.startswith("layers.2.")),
        ({"only": ["layers.0", "layers.1"]}, lambda n: n.startswith(("layers.0.", "layers.1."))),
        ({"freeze": ["embed", "mtp", "layers.*.ffn"]}, lambda n: "ffn." not in n and n[:3] not in ("emb", "mtp")),
        ({"only": ["attn"], "freeze": ["*.compressor"]}, lambda n: ".attn." in n and ".compressor." not in n),
        ({"only": ["attn_norm"]}, lambda n: "attn_norm" in n),
    ],
)  # fmt: skip
def test_patterns_name_modules_and_parameters(patterns, expected):
    assert trained(**patterns) == {name for name in ALL if expected(name)}


def test_what_patterns_cannot_mean_is_refused():
    with pytest.raises(ValueError, match=r"'atn' names no parameter.*attn"):
        trained(freeze=["atn"])
    with pytest.raises(ValueError, match=r"'ffn.gate.tid2eid' names no trainable parameter"):
        trained(only=["ffn.gate.tid2eid"])
    with pytest.raises(ValueError, match=r"layers\.3\.attn.* is named but layers\.5\.attn"):
        trained(only=["layers.3.attn.wq_a"])
    assert not matches("attn", "layers.0.attn_norm.weight")


def test_merge_undoes_split():
    params = jax.tree.map(lambda spec: np.zeros(spec.shape[:1]), SPECS, is_leaf=is_spec)
    mask = partition.trainable_mask(SPECS, only=["attn"])
    kept, frozen = partition.split(params, mask)
    assert len(jax.tree.leaves(kept)) == sum(jax.tree.leaves(mask))
    assert len(jax.tree.leaves(kept)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))
    merged = partition.merge(kept, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))
