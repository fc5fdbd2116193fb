"""Adapters beside packed weights, against the same adapters beside the decoded weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import small_config, small_model

from deepseek_v4 import RELEASED, RELEASED_BASE, Execution, Model, Placement, make_mesh
from deepseek_v4.adapters import LoRA
from deepseek_v4.checkpoint import CheckpointError, load_params, open_checkpoint, save_params, to_hf
from deepseek_v4.formats import dequantize
from deepseek_v4.nn.variables import MASTER, Storage
from deepseek_v4.parameters import flatten, is_spec
from deepseek_v4.training import lora, merging
from deepseek_v4.training.masters import to_masters
from deepseek_v4.training.partition import trainable_mask

# Without leave to skip roundings between operations, which the compiler takes in different places in each program.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
)

# A stack of two layers with indexers, a draft, and sizes that divide over eight devices in whole scale blocks.
CONFIG = small_config(
    (4, 4),
    num_hash_layers=0,
    num_attention_heads=8,
    o_groups=4,
    moe_intermediate_size=64,
    swiglu_limit=10.0,
    index_topk=8,
)
PATTERNS = ("attn.wq_b", "attn.wo_*", "ffn.shared_experts.w1", "ffn.experts", "e_proj")
ADAPTERS = LoRA(rank=4, alpha=8.0, patterns=PATTERNS)
LENGTH = 72


@dataclasses.dataclass
class Setup:
    model: Model
    base: dict
    adapters: dict

    @property
    def params(self):
        return lora.attach(self.base, self.adapters)


def setup(storage: Storage = RELEASED, dtype="float32", seed=0) -> Setup:
    """A model with adapters that have been trained: b is not zero."""
    small = small_model(CONFIG, storage)
    model = Model(CONFIG, storage, Execution(dtype), ADAPTERS)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda a: a if a.any() else jnp.asarray(rng.normal(size=a.shape) * 0.02, jnp.float32),
        lora.init_adapters(model, seed),
    )
    return Setup(model, small.params, adapters)


@pytest.fixture(scope="module")
def packed():
    return setup()


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, LENGTH)), jnp.int32)


def loss(model, base, tokens, adapters):
    out = model.forward(lora.attach(base, adapters), tokens, draft=True)
    targets = jnp.roll(tokens, -1, axis=1)[..., None]
    both = (jax.nn.log_softmax(logits)[:, 1:-1] for logits in (out.logits, out.draft_logits))
    return -sum(jnp.mean(jnp.take_along_axis(logits, targets[:, 1:-1], axis=-1)) for logits in both)


def loss_and_gradient(model, base, adapters, tokens):
    run = quick(jax.value_and_grad(lambda adapters, base: loss(model, base, tokens, adapters)))
    return run(adapters, base)


@pytest.fixture(scope="module")
def expected(packed, tokens):
    return loss_and_gradient(packed.model, packed.base, packed.adapters, tokens)


def check(expected, found, tolerance):
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    for a, b in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * float(jnp.abs(a).max()))


def test_beside_packed_weights_as_beside_decoded_ones(packed, expected, tokens):
    model = dataclasses.replace(packed.model, storage=MASTER)
    masters = to_masters(jax.tree.map(jnp.copy, packed.base), lora.base_model(model))
    # float32 sums in the order that another program takes.
    check(expected, loss_and_gradient(model, masters, packed.adapters, tokens), 2e-4)
    for path in (("attn", "wq_b"), ("attn", "wo_a"), ("ffn", "experts", "w2"), ("ffn", "shared_experts", "w1")):
        for leaf in ("lora_a", "lora_b"):
            assert flatten(expected[1]["groups"][0][0])[*path, leaf].any(), (path, leaf)
    assert expected[1]["drafts"][0]["e_proj"]["lora_b"].any()


def test_eight_devices_compute_what_one_does(packed, expected, tokens):
    placement = Placement(make_mesh("data=2,expert=2,tensor=2"))
    model = dataclasses.replace(packed.model, execution=Execution("float32", placement=placement))
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), packed.params, model.abstract_params())
    base = lora.split_adapters(placed)[0]
    new = lora.init_adapters(model, 0)
    adapters = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), packed.adapters, new)
    axes = adapters["groups"][0][0]["ffn"]["experts"]["w2"]["lora_a"].sharding.spec
    assert axes[1] == "expert"
    check(expected, loss_and_gradient(model, base, adapters, tokens), 2e-4)


@pytest.mark.parametrize(("storage", "dtype"), [(RELEASED, "bfloat16"), (RELEASED_BASE, "float32")])
def test_new_adapters_change_nothing(tokens, storage, dtype):
    small = small_model(CONFIG, storage, dtype=dtype)
    model = dataclasses.replace(small.model, adapters=ADAPTERS)
    adapters = lora.init_adapters(model, 3)
    assert all(leaf.any() == (path[-1] == "lora_a") for path, leaf in flatten(adapters["groups"][0][0]).items())
    found, expected = (
        quick(lambda p, m=m: m.forward(p, tokens, draft=True)[:2])(p)
        for m, p in ((model, lora.attach(small.params, adapters)), (small.model, small.params))
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    _, merged, report = merging.merge(model, lora.attach(small.params, adapters))
    jax.tree.map(np.testing.assert_array_equal, merged, small.params)
    assert all((row.changed, row.error, row.lost) == (0, 0, 0) for row in report)


@pytest.mark.parametrize("storage", [RELEASED, MASTER])
def test_merged_weights_contain_the_adapters(tokens, storage):
    case = setup(storage)
    # Large enough to reach over the steps of FP4.
    adapters = jax.tree.map(lambda a: 4 * a, case.adapters)
    params = lora.attach(case.base, adapters)
    model, merged, report = merging.merge(case.model, params)
    assert model == lora.base_model(case.model)
    by_name = {row.name: row for row in report}
    assert len(by_name) == len(report) == 3 * 7 + 1
    exact = storage == MASTER

    # One matrix of each kind against float64.
    group, before, after = (tree["groups"][0][0] for tree in (params, case.base, merged))
    for path, expert, name in (
        (("attn", "wq_b"), (), "layers.1.attn.wq_b"),
        (("ffn", "experts", "w2"), (5,), "layers.1.ffn.experts.w2"),
    ):
        a, b = (np.asarray(flatten(group)[*path, leaf], np.float64)[1][expert] for leaf in ("lora_a", "lora_b"))
        delta = ADAPTERS.scale * b @ a

        def weight(tree, path=path, expert=expert):
            found = [flatten(tree).get((*path, leaf)) for leaf in ("weight", "scale")]
            return np.asarray(dequantize(*(None if f is None else f[1] for f in found)), np.float64)[expert]

        error = np.linalg.norm(weight(after) - weight(before) - delta) / np.linalg.norm(delta)
        lost = 1 - np.sum((weight(after) - weight(before)) * delta) / np.sum(delta**2)
        if exact:
            assert error < 1e-4
        if not expert:
            row = by_name[name]
            # From float32 sums of thousands of terms.
            np.testing.assert_allclose((row.error, row.lost), (error, lost), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(row.changed, np.mean(weight(after) != weight(before)), rtol=1e-6)

    def logits(model, params):
        return quick(lambda p: model.forward(p, tokens).logits)(params)

    adapted, base, found = logits(case.model, params), logits(model, case.base), logits(model, merged)
    if exact:
        np.testing.assert_allclose(found, adapted, atol=1e-3 * float(jnp.abs(adapted).max()))
    # Rounding takes some of the change and adds noise; most of the change must arrive.
    moved = np.asarray(adapted - base).ravel()
    kept = np.asarray(found - base).ravel()
    assert kept @ moved / (np.linalg.norm(kept) * np.linalg.norm(moved)) > (0.999 if exact else 0.8)


def test_small_changes_are_lost_in_packed_weights_and_the_report_says_so(packed):
    tiny = jax.tree.map(lambda a: a * 1e-3, packed.adapters)
    _, _, report = merging.merge(packed.model, lora.attach(packed.base, tiny))
    lost = [row.lost for row in report if ".experts." in row.name]
    assert min(lost) > 0.5
    assert all(row.changed < 0.1 for row in report)
    assert "lost" in str(report[0])


def test_merging_on_a_mesh_gives_the_same_bytes(packed):
    execution = Execution("float32", placement=Placement(make_mesh("data=2,expert=2,tensor=2")))
    model = dataclasses.replace(packed.model, execution=execution)
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), packed.params, model.abstract_params())
    sharded, merged, report = merging.merge(model, placed)
    _, expected, expected_report = merging.merge(packed.model, packed.params)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    jax.tree.map(
        lambda a, s: a.sharding.is_equivalent_to(s.sharding, a.ndim) or 1 / 0, merged, sharded.abstract_params()
    )
    for a, b in zip(report, expected_report, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose((a.changed, a.error, a.lost), (b.changed, b.error, b.lost), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_merged_while_it_is_written(packed, tmp_path):
    model = lora.base_model(packed.model)
    save_params(tmp_path / "base", model, packed.base, files={"tokenizer.json": b"{}"})
    source = merging.MergedSource(open_checkpoint(tmp_path / "base").source, packed.model, packed.adapters)
    assert to_hf(source, tmp_path / "merged")
    _, expected, report = merging.merge(packed.model, packed.params)
    found = load_params(tmp_path / "merged", model)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == b"{}"
    rows = {row.name: row for row in source.report}
    assert rows.keys() == {row.name for row in report}
    for row in report:
        np.testing.assert_allclose(dataclasses.astuple(rows[row.name])[1:], dataclasses.astuple(row)[1:], rtol=1e-4)
    other = dataclasses.replace(packed.model, storage=RELEASED_BASE)
    with pytest.raises(CheckpointError, match="another model"):
        merging.MergedSource(open_checkpoint(tmp_path / "base").source, other, packed.adapters)


def test_adapters_are_saved_alone_and_checked_when_loaded(packed, tmp_path):
    lora.save_adapters(tmp_path, packed.model, packed.params)
    assert lora.read_adapter_config(tmp_path)[0] == ADAPTERS
    saved = lora.split_adapters(packed.params)[1]
    found = lora.load_adapters(tmp_path, packed.model, packed.base)
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["layers.1.attn.wq_b.lora_a"], packed.adapters["groups"][0][0]["attn"]["wq_b"]["lora_a"][1]
    )
    assert tensors["mtp.0.ffn.experts.w2.lora_b"].shape == (8, 256, 4)

    mesh = Execution("float32", placement=Placement(make_mesh("expert=4,tensor=2")))
    sharded = dataclasses.replace(packed.model, execution=mesh)
    placed = lora.load_adapters(tmp_path, sharded)
    jax.tree.map(np.testing.assert_array_equal, placed, saved)

    other = jax.tree.map(lambda a: a, packed.base)
    weight = other["groups"][0][0]["ffn"]["experts"]["w1"]["weight"]
    other["groups"][0][0]["ffn"]["experts"]["w1"]["weight"] = weight.at[0, 3, 5, 7].add(1)
    with pytest.raises(CheckpointError, match=r"beside other weights[^$]*layers\.00000: not the one") as error:
        lora.load_adapters(tmp_path, packed.model, other)
    assert "layers.00001" not in str(error.value)
    with pytest.raises(CheckpointError, match="rank=2"):
        lora.load_adapters(tmp_path, dataclasses.replace(packed.model, adapters=LoRA(2, 8.0, PATTERNS)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    fewer = LoRA(4, 8.0, ("attn.wq_b",))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | dataclasses.asdict(fewer)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wo_a\.lora_a: unknown"):
        lora.load_adapters(tmp_path, dataclasses.replace(packed.model, adapters=fewer))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config"):
        lora.read_adapter_config(tmp_path)


def test_balance_biases_travel_with_the_adapters(packed, tmp_path):
    """They move while adapters are trained, and decide which experts these were trained for."""
    params = jax.tree.map(lambda a: a, packed.params)
    gate = params["groups"][0][0]["ffn"]["gate"]
    gate["bias"] = gate["bias"] + jnp.arange(8) * 0.001
    lora.save_adapters(tmp_path / "adapters", packed.model, params)
    save_params(tmp_path / "base", lora.base_model(packed.model), packed.base)
    adapters = lora.load_adapters(tmp_path / "adapters", packed.model, packed.base)
    jax.tree.map(np.testing.assert_array_equal, lora.attach(packed.base, adapters), params)
    source = merging.open_merged(open_checkpoint(tmp_path / "base").source, tmp_path / "adapters")
    to_hf(source, tmp_path / "merged")
    found = load_params(tmp_path / "merged", lora.base_model(packed.model))
    np.testing.assert_array_equal(found["groups"][0][0]["ffn"]["gate"]["bias"], gate["bias"])


def test_the_fingerprint_is_that_of_the_weights_on_any_mesh(packed):
    model = dataclasses.replace(
        packed.model, execution=Execution(placement=Placement(make_mesh("data=2,expert=2,tensor=2")))
    )
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), packed.params, model.abstract_params())
    assert lora.fingerprint(model, placed) == lora.fingerprint(packed.model, packed.base)
    moved = jax.tree.map(lambda a: a, packed.base)
    gate = moved["groups"][0][0]["ffn"]["gate"]
    gate["bias"] = gate["bias"] + 1
    assert lora.fingerprint(model, moved) == lora.fingerprint(model, placed)
    norm = moved["groups"][0][0]["attn_norm"]
    norm["weight"] = norm["weight"][::-1]
    assert lora.fingerprint(model, moved) != lora.fingerprint(model, placed)


def test_a_checkpoint_is_loaded_beneath_adapters(packed, tmp_path):
    save_params(tmp_path / "base", lora.base_model(packed.model), packed.base)
    base = lora.load_base(open_checkpoint(tmp_path / "base"), packed.model)
    params = lora.attach(base, packed.adapters)
    assert jax.tree.structure(params) == jax.tree.structure(packed.model.abstract_params())
    back, adapters = lora.split_adapters(params)
    assert jax.tree.structure(back) == jax.tree.structure(packed.base)
    assert adapters["shell"] == {}
    jax.tree.map(np.testing.assert_array_equal, back, packed.base)


def test_only_adapters_are_trained_by_their_pattern(packed):
    specs = packed.model.parameter_specs()
    mask = trainable_mask(specs, only=("*.lora_?",))
    roles = jax.tree.map(lambda spec, keep: (spec.role == "adapter") == keep, specs, mask, is_leaf=is_spec)
    assert all(jax.tree.leaves(roles))
    assert any(jax.tree.leaves(mask))


def test_patterns_choose_linears_and_complain():
    def adapted(*patterns):
        specs = Model(CONFIG, adapters=LoRA(2, 2.0, patterns)).parameter_specs()["groups"][0][0]
        return {".".join(path[:-1]) for path in flatten(specs) if path[-1] == "lora_a"}

    assert adapted("attn.w*") == {f"attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")}
    assert adapted("attn") == adapted("attn.w*") | {"attn.indexer.wq_b"}
    assert adapted("ffn.shared_experts.w2", "ffn.experts.*") == {
        "ffn.shared_experts.w2",
        *(f"ffn.experts.w{i}" for i in (1, 2, 3)),
    }
    assert adapted("h_proj") == set()
    with pytest.raises(ValueError, match=r"'attn\.q_proj' names no linear; there are: attn\.indexer\.wq_b, attn\.wkv"):
        Model(CONFIG, adapters=LoRA(patterns=("attn.q_proj",)))
    with pytest.raises(ValueError, match="names no linear"):
        Model(CONFIG, adapters=LoRA(patterns=("ffn.gate",)))
    with pytest.raises(ValueError, match="positive rank"):
        LoRA(rank=0)
