"""Restoring onto devices from both formats, and saving parameters again."""

import dataclasses

import jax
import numpy as np
import pytest
from checkpoint_cases import tiny_config
from released import released_tensors, write_released

from deepseek_v4 import RELEASED, RELEASED_BASE, Execution, Model, Placement, make_mesh
from deepseek_v4.checkpoint import (
    CheckpointError,
    ParamsSource,
    compare,
    load_params,
    open_checkpoint,
    open_source,
    save_params,
    to_hf,
    to_orbax,
)
from deepseek_v4.parameters import flatten

CONFIG = tiny_config(
    num_hidden_layers=5,
    compress_ratios=[0, 4, 128, 4, 128, 0],
    num_hash_layers=1,
    n_routed_experts=4,
    # Two shards of whole FP8 scale blocks.
    moe_intermediate_size=256,
)


def _written(root, storage):
    write_released(root / "hf", CONFIG, storage)
    (root / "hf/tokenizer.json").write_text("{}")
    to_orbax(open_source(root / "hf"), root / "orbax")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return _written(tmp_path_factory.mktemp("fp4"), RELEASED)


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory):
    return _written(tmp_path_factory.mktemp("base"), RELEASED_BASE)


def _expected(tensors, prefix, path):
    """A leaf from the tensors of the release, by the layout's definition."""
    if path[:2] == ("ffn", "experts"):
        experts = range(CONFIG.n_routed_experts)
        value = np.stack([tensors[f"{prefix}ffn.experts.{e}.{'.'.join(path[2:])}"] for e in experts])
    else:
        value = tensors[prefix + ".".join(path)]
    if value.dtype == np.int8:
        return value.view(np.uint8)
    return value.astype(np.int32) if value.dtype == np.int64 else value


def _check(params, model, tensors):
    compared = 0
    for path, leaf in flatten(params["shell"]).items():
        assert np.asarray(leaf).tobytes() == _expected(tensors, "", path).tobytes()
        compared += 1
    for group, members in zip(model.groups, params["groups"], strict=True):
        for member, tree in enumerate(members):
            for path, leaf in flatten(tree).items():
                for repeat in range(group.repeats):
                    expected = _expected(tensors, f"layers.{group.layer_index(repeat, member)}.", path)
                    assert np.asarray(leaf)[repeat].tobytes() == expected.tobytes(), path
                    assert leaf.dtype == expected.dtype
                    compared += 1
    for index, tree in enumerate(params["drafts"]):
        for path, leaf in flatten(tree).items():
            assert np.asarray(leaf).tobytes() == _expected(tensors, f"mtp.{index}.", path).tobytes()
            compared += 1
    return compared


def _load_and_check(root, storage, kind, mesh):
    opened = open_checkpoint(root / kind)
    placement = None if mesh is None else Placement(make_mesh(mesh))
    model = Model(opened.config, opened.storage, Execution(placement=placement))
    assert any(group.repeats > 1 for group in model.groups)
    read = []
    params = opened.load(model, on_bytes=read.append)
    assert _check(params, model, released_tensors(CONFIG, storage)) > 200
    abstract = model.abstract_params()
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    if placement is not None:
        for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    # However many devices hold a part, it is read once.
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("mesh", [None, "data=1,expert=4,tensor=2", "data=4,expert=2"])
def test_every_leaf_arrives(kind, mesh, checkpoint):
    _load_and_check(checkpoint, RELEASED, kind, mesh)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_every_leaf_of_a_base_release_arrives(kind, base_checkpoint):
    _load_and_check(base_checkpoint, RELEASED_BASE, kind, "data=2,expert=2,tensor=2")


def test_stack_is_written_in_place(checkpoint):
    """The stacked array keeps its memory while layers are inserted: the donated buffer is the result's."""
    opened = open_checkpoint(checkpoint / "orbax")
    model = Model(opened.config, opened.storage)
    pointers = []
    original = jax.block_until_ready

    def watch(tree):
        pointers.append({path: leaf.unsafe_buffer_pointer() for path, leaf in tree.items()})
        return original(tree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "block_until_ready", watch)
        opened.load(model)
    repeats = [group.repeats for group in model.groups for _ in group.pattern if group.repeats > 1]
    start = 0
    for count in repeats:
        assert all(pointers[start + row] == pointers[start] for row in range(count))
        start += count
    assert start == len(pointers)


def test_what_an_opened_checkpoint_tells(checkpoint):
    root, storage = checkpoint, RELEASED
    for kind in ("hf", "orbax"):
        opened = open_checkpoint(root / kind)
        assert (opened.config, opened.storage) == (CONFIG, storage)
        assert opened.tokenizer_path == root / kind / "tokenizer.json"


def test_model_without_the_draft_layer(checkpoint):
    root, storage = checkpoint, RELEASED
    config = dataclasses.replace(CONFIG, drafter=None, num_nextn_predict_layers=0, compress_ratios=CONFIG.layer_ratios)
    params = load_params(root / "orbax", Model(config, storage))
    assert params["drafts"] == ()


def test_other_models_are_refused(checkpoint):
    root, storage = checkpoint, RELEASED

    def changed(**changes):
        return dataclasses.replace(CONFIG, **changes)

    for kind in ("hf", "orbax"):
        opened = open_checkpoint(root / kind)
        with pytest.raises(CheckpointError, match=r"embed\.weight: the model has .*bfloat16.*32, 128"):
            opened.load(Model(changed(vocab_size=32), storage))
        with pytest.raises(CheckpointError, match=r"ffn\.experts\.w1\.weight"):
            opened.load(Model(changed(moe_intermediate_size=128), storage))
        deeper = changed(num_hidden_layers=6, compress_ratios=(0, 4, 128, 4, 128, 4, 0))
        with pytest.raises(CheckpointError, match=r"layers\.00005: the model has it"):
            opened.load(Model(deeper, storage))
        shallower = changed(num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0))
        with pytest.raises(CheckpointError, match=r"layers\.00004: the checkpoint has it"):
            opened.load(Model(shallower, storage))


@pytest.mark.parametrize("mesh", [None, "data=1,expert=4,tensor=2"])
def test_saved_parameters_are_the_checkpoint(mesh, checkpoint, tmp_path):
    root, storage = checkpoint, RELEASED
    placement = None if mesh is None else Placement(make_mesh(mesh))
    model = Model(CONFIG, storage, Execution(placement=placement))
    params = load_params(root / "orbax", model)
    save_params(tmp_path / "saved", model, params, files={"tokenizer.json": b"{}"})
    result = compare(open_source(root / "hf"), open_source(tmp_path / "saved"))
    assert result.equal
    assert result.compared == len(released_tensors(CONFIG, storage))
    to_hf(ParamsSource(model, params), tmp_path / "hf")
    for shard in sorted((root / "hf").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "hf" / shard.name).read_bytes()
