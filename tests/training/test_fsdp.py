"""Parameters cut over the data axis as well: what is computed stays the same, and nothing is whole for long."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config, small_model

from deepseek_v4 import RELEASED, Execution, MeshError, Model, Placement, Rules, make_mesh
from deepseek_v4.adapters import LoRA
from deepseek_v4.checkpoint import load_params, save_params
from deepseek_v4.dispatch import BY_SIZE, Exchange
from deepseek_v4.nn.variables import MASTER, Weight
from deepseek_v4.parameters import flatten, map_specs
from deepseek_v4.training import lora, merging
from deepseek_v4.training.masters import to_masters
from deepseek_v4.training.optimizer import OptimizerConfig, make_optimizer
from deepseek_v4.training.partition import merge, split, trainable_mask
from deepseek_v4.training.quantisation import export_params

# Without leave to skip roundings between operations, which the compiler takes in different places in each program.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}

# Stacks of two layers, with indexers and a draft, and without.
SIZES = {"num_hash_layers": 0, "num_attention_heads": 8, "o_groups": 4, "swiglu_limit": 10.0, "index_topk": 8}
CONFIG = small_config((4, 4), **SIZES)
WINDOWS = small_config((0, 0), mtp=False, **SIZES)
RULES = Rules(fsdp=("data",))


def placed(model: Model, params, rules=RULES, mesh="data=4,expert=2", exchange=BY_SIZE):
    """The model on eight devices, and its parameters there."""
    execution = dataclasses.replace(model.execution, placement=Placement(make_mesh(mesh), rules, exchange))
    sharded = dataclasses.replace(model, execution=execution)
    return sharded, jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, sharded.abstract_params())


def full_training():
    """Masters that are rounded to the released format in the forward pass."""
    model = Model(CONFIG, MASTER, Execution("float32", quantise=RELEASED))
    return model, to_masters(small_model(CONFIG).params, model)


def adapters_beside_packed_weights(patterns=("attn.wq_b", "attn.wo_*", "ffn")):
    model = Model(WINDOWS, RELEASED, Execution("float32"), LoRA(rank=4, alpha=8.0, patterns=patterns))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda a: a if a.any() else jnp.asarray(rng.normal(size=a.shape) * 0.02, jnp.float32),
        lora.init_adapters(model, 0),
    )
    return model, lora.attach(small_model(WINDOWS).params, adapters)


def loss_and_gradient(model: Model, params):
    """((loss, gradient of what is trained), text of the compiled program)."""
    patterns = ("*.lora_?",) if model.adapters else ()
    trained, frozen = split(params, trainable_mask(model.parameter_specs(), only=patterns))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (4, 40)), jnp.int32)

    def loss(trained, frozen):
        out = model.forward(merge(trained, frozen), tokens, draft=bool(model.drafts))
        targets = jnp.roll(tokens, -1, axis=1)[:, 1:-1, None]
        logits = [jax.nn.log_softmax(found)[:, 1:-1] for found in out[:2] if found is not None]
        return -sum(jnp.mean(jnp.take_along_axis(found, targets, axis=-1)) for found in logits)

    run = jax.jit(jax.value_and_grad(loss), compiler_options=OPTIONS).lower(trained, frozen).compile()
    return run(trained, frozen), run.as_text()


@functools.cache
def one_device(case):
    model, params = case()
    return model, params, loss_and_gradient(model, params)[0]


# Tensor shards that are cut further; with a batch over experts, in the gather and in the dispatch form, in two rounds.
ALL = "data=2,expert=2,tensor=2"
TRAVEL = Rules.expert_parallel(fsdp=True)
LAYOUTS = [
    (full_training, RULES, "data=4,expert=2", BY_SIZE),
    (adapters_beside_packed_weights, RULES, "data=4,expert=2", BY_SIZE),
    (adapters_beside_packed_weights, RULES, ALL, BY_SIZE),
    (full_training, TRAVEL, ALL, Exchange("gather")),
    (full_training, TRAVEL, ALL, Exchange("dispatch", rows=200)),
    (adapters_beside_packed_weights, TRAVEL, ALL, Exchange("dispatch", rows=200)),
]


@pytest.mark.parametrize(("case", "rules", "mesh", "exchange"), LAYOUTS)
def test_loss_and_gradients_are_those_of_one_device(case, rules, mesh, exchange):
    model, params, expected = one_device(case)
    sharded, cut = placed(model, params, rules, mesh, exchange)
    (loss, gradient), text = loss_and_gradient(sharded, cut)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    wanted = dict(jax.tree_util.tree_leaves_with_path(sharded.abstract_params()))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected[1]), jax.tree.leaves(gradient), strict=True):
        # float32 sums in the order that another program takes.
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-4 * float(jnp.abs(a).max()), err_msg=str(path))
        if "experts" in str(path):
            assert b.sharding.is_equivalent_to(wanted[path].sharding, b.ndim), path

    # Gathers bring one layer's share of one tensor at a time: of w1, half of the experts; of packed ones, bytes.
    shapes = [
        tuple(map(int, dims.split(",")))
        for shape in re.findall(r"= (\S+) all-gather(?:-start)?\(", text)
        for dims in re.findall(r"\[([\d,]+)\]", shape)
    ]
    # Where there is no ragged all-to-all, rows that travel are gathered: 3 choices of 40 tokens of a device, and back.
    # Where rows are split between sublayers, experts gather their inputs, two rows of 40, and attention the gradients
    # of its outputs, of a device's two head groups of two heads.
    rows = [(2, count, CONFIG.hidden_size) for count in (40, 3 * 40, exchange.rows)]
    rows.append((2, 40, 2, 2 * CONFIG.head_dim))
    # Gradients of sums that were scattered over four devices come back as four blocks of ten tokens.
    rows.append((4, 2, 10, CONFIG.hidden_size))
    gathered = [math.prod(shape) for shape in shapes if len(shape) > 2 and shape not in rows]
    tensor = sharded.execution.placement.size("expert_width")
    share = CONFIG.n_routed_experts // 2 * CONFIG.moe_intermediate_size // tensor * CONFIG.hidden_size
    assert max(gathered) == (share if model.adapters is None else share // 2)
    if model.adapters is None:
        # w1, w2 and w3, in the loop over layers and in the draft, forward and backward.
        assert sum(size == share for size in gathered) <= 3 * 2 * 2
        assert len(re.findall(r" reduce-scatter(?:-start)?\(", text)) >= 3 * 2
    # Nor is any array of the program as large as the experts of all layers, or kept for the backward pass.
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16|u8)\[([\d,]+)\]", text)]
    assert max(sizes) < 2 * CONFIG.n_routed_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size


def test_each_device_stores_its_part():
    """Masters, gradients' layout and moments: all matrices are cut by the data axis, others are whole."""
    model, params = full_training()
    sharded, cut = placed(model, params)
    reference, whole = placed(model, params, Rules())
    specs = map_specs(lambda spec: spec if spec.kind is Weight else None, sharded.parameter_specs())
    options = OptimizerConfig(
        learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=1, decay_start=2, total_steps=3
    )

    def bytes_of(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = []
    for model, params in ((sharded, cut), (reference, whole)):
        trained, _ = split(params, trainable_mask(model.parameter_specs()))
        state = make_optimizer(options, specs, model.execution.placement).init(trained)
        found.append((bytes_of(params), bytes_of(state)))
    # What is no matrix: norms, sinks, biases, scales and position biases, each with two moments at most.
    rest = sum(
        leaf.nbytes
        for leaf, spec in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded.parameter_specs()), strict=True)
        if spec.role in ("norm", "island", "router_bias", "token_table")
    )
    for fewer, all_bytes in zip(*found, strict=True):
        assert all_bytes / 4 <= fewer <= all_bytes / 4 + 2 * rest


def test_checkpoints_exports_and_merges_do_not_depend_on_it(tmp_path):
    model, params = full_training()
    sharded, cut = placed(model, params)
    released, packed = export_params(model, params, RELEASED)
    _, found = export_params(sharded, cut, RELEASED)
    jax.tree.map(np.testing.assert_array_equal, found, packed)
    save_params(tmp_path, released, packed)
    execution = dataclasses.replace(sharded.execution, quantise=None)
    sharded_release = dataclasses.replace(released, execution=execution)
    loaded = load_params(tmp_path, sharded_release)
    jax.tree.map(np.testing.assert_array_equal, loaded, packed)
    for array, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(sharded_release.abstract_params()), strict=True):
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
    again = to_masters(loaded, sharded)
    assert flatten(again["groups"][0][0])["ffn", "experts", "w1", "weight"].sharding.spec[1] == ("expert", "data")

    model, params = adapters_beside_packed_weights(("attn.wq_b", "ffn.experts.w2"))
    _, expected, rows = merging.merge(model, params)
    _, merged, sharded_rows = merging.merge(*placed(model, params))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    for a, b in zip(rows, sharded_rows, strict=True):
        np.testing.assert_allclose((a.changed, a.lost), (b.changed, b.lost), rtol=1e-4, atol=1e-5)


def test_matrices_are_cut_where_they_divide():
    placement = Placement(make_mesh("data=4,expert=2"), RULES)

    def cut(axes, shape, role="linear"):
        spec = dataclasses.replace(PLAIN, shape=shape, axes=axes, role=role)
        return tuple(placement.parameter_sharding(spec).spec)

    experts = ("experts", "expert_width", "embed")
    assert cut(experts, (8, 64, 256), "expert") == (("expert", "data"), None, None)
    assert cut(experts, (4, 64, 256), "expert") == ("expert", None, "data")  # too few experts
    assert cut((None, *experts), (3, 4, 64, 256), "expert") == (None, "expert", None, "data")
    assert cut(("heads", "q_lora"), (512, 64)) == ("data", None)
    assert cut(("vocab", "embed"), (256, 32), "embedding") == ("expert", "data")
    assert cut((None, "embed"), (16, 6)) == ("data", None)
    assert cut((None, "embed"), (6, 6)) == (None, None)
    assert cut((None, "heads"), (4, 64), "island") == (None, None)
    assert cut((None, None), (4, 64), "norm") == (None, None)
    assert Placement(make_mesh("expert=8"), RULES).parameter_sharding(PLAIN).is_fully_replicated


PLAIN = dataclasses.replace(
    flatten(Model(CONFIG, MASTER).parameter_specs()["shell"])["embed", "weight"], axes=(None, "embed")
)


def test_rules_refuse_axes_that_others_use():
    with pytest.raises(MeshError, match=r"\['expert'\] are used by both sequence and fsdp"):
        Rules(fsdp=("expert",))
    with pytest.raises(MeshError, match="must be among the mesh axes of the batch"):
        Rules(batch=(), fsdp=("data",))
