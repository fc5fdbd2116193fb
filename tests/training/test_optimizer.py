"""The optimizer against its closed form in float64, however parameters are stacked, fused and sharded."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import small_config

from deepseek_v4 import Config, Execution, Model, Placement, Rules, make_mesh
from deepseek_v4.nn.variables import MASTER, Weight
from deepseek_v4.parameters import ParameterSpec, flatten, is_spec, map_specs
from deepseek_v4.sharding import parse_mesh
from deepseek_v4.training import muon
from deepseek_v4.training.muon import newton_schulz, orthogonalise
from deepseek_v4.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    partition_labels,
    schedule,
    state_shardings,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HYBRID = 8 * [(3.4445, -4.7750, 2.0315)] + 2 * [(2.0, -1.5, 0.5)]
CONFIG = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2, decay_start=4, total_steps=8, weight_decay=0.1
)


def describe(role, shape, axes, matrices=()):
    return ParameterSpec(shape, jnp.dtype(jnp.float32), axes, role, Weight, matrices)


# Every role; stacks that no mesh below divides evenly; tall, wide, fused and flat matrices.
SPECS = {
    "queries": describe("linear", (5, 32, 24), (None, "heads", "q_lora"), 4 * (8,)),
    "output": describe("linear", (5, 16, 32), (None, "embed", "o_groups")),
    "up": describe("expert", (3, 8, 16, 24), (None, "experts", "expert_width", "embed")),
    "down": describe("expert", (3, 8, 24, 16), (None, "experts", "embed", "expert_width")),
    "few": describe("expert", (3, 2, 16, 24), (None, "experts", "expert_width", "embed")),
    "router": describe("matrix", (5, 8, 24), (None, None, "embed")),
    "single": describe("matrix", (40, 16), (None, "embed")),
    "mixes": describe("hyper", (3, 24, 64), (None, None, None), (4, 4, 16)),
    # As no model is laid out today: shards that cut fused matrices of unequal rows.
    "cut": describe("hyper", (2, 24, 64), (None, "heads", None), (4, 4, 16)),
    "embed": describe("embedding", (32, 16), ("vocab", "embed")),
    "norm": describe("norm", (3, 16), (None, None)),
    "sink": describe("island", (3, 8), (None, "heads")),
    "adapter": describe("adapter", (3, 16, 4), (None, "embed", None)),
}
BOTH = Rules(embed=("data",), q_lora=("data",))
FSDP = Rules(fsdp=("data",))
LAYOUTS = {
    "one device": None,
    "all axes": ("data=2,expert=2,tensor=2", Rules()),
    "shards cut matrices": ("tensor=8", Rules()),
    "both dims sharded": ("data=2,tensor=4", BOTH),
    "cut once more": ("data=4,expert=2", FSDP),
}


def place(layout) -> Placement | None:
    if layout is None:
        return None
    mesh, rules = layout
    return Placement(make_mesh(mesh, jax.devices()[: math.prod(parse_mesh(mesh).values())]), rules)


def random(seed, specs=None, placement=None, scale=1.0):
    rng = np.random.default_rng(seed)

    def leaf(spec):
        value = (scale * rng.standard_normal(spec.shape)).astype(np.float32)
        return jax.device_put(value, None if placement is None else placement.parameter_sharding(spec))

    return map_specs(leaf, SPECS if specs is None else specs)


def compiled(function, *args):
    """Ahead of time and without LLVM's optimisations, which are most of the time here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}).lower(*args).compile()


def apply(optimizer):
    def step(params, gradients, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


# --- the closed form --------------------------------------------------------------------------------------------------


def orthogonal64(x):
    """The iteration as the report states it, on one float64 matrix."""
    x = x / np.linalg.norm(x)
    for a, b, c in HYBRID:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def each_matrix(function, x, spec):
    """``function`` of every independent matrix of an array."""
    out = np.empty_like(x)
    ends = np.cumsum(spec.matrices or (spec.shape[-2],))
    for index in np.ndindex(*x.shape[:-2]):
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            out[index][start:end] = function(x[index][start:end])
    return out


def learning_rate64(step):
    rate = CONFIG.learning_rate * min(1, (step + 1) / CONFIG.warmup_steps)
    if step > CONFIG.decay_start:
        part = min(1, (step - CONFIG.decay_start) / (CONFIG.total_steps - CONFIG.decay_start))
        half = (CONFIG.learning_rate - CONFIG.final_learning_rate) / 2
        rate = CONFIG.final_learning_rate + half * (1 + np.cos(np.pi * part))
    return rate


def expected64(spec, weight, gradients):
    """A parameter after one step per gradient, by training facts of the report: Muon or AdamW as its role says."""
    weight = np.asarray(weight, np.float64)
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        gradient = np.asarray(gradient, np.float64)
        if spec.role in ("linear", "expert", "matrix", "hyper"):
            first = 0.95 * first + gradient
            update = each_matrix(
                lambda x: orthogonal64(x) * np.sqrt(max(x.shape)) * 0.18, 0.95 * first + gradient, spec
            )
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            update = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-20)
        weight = weight * (1 - learning_rate64(step) * 0.1) - learning_rate64(step) * update
    return weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_closed_form_on_every_layout(layout):
    placement = place(LAYOUTS[layout])
    optimizer = make_optimizer(CONFIG, SPECS, placement)
    params = start = random(0, placement=placement)
    gradients = [random(1, placement=placement, scale=1e-12), random(2, placement=placement, scale=3e-12)]
    state = jax.jit(optimizer.init)(params)
    step = compiled(apply(optimizer), params, gradients[0], state)
    for count in (1, 2):
        params, state = step(params, gradients[count - 1], state)
        for name, spec in SPECS.items():
            expected = expected64(spec, start[name], [g[name] for g in gradients[:count]])
            # Weights of order 3 round at 2e-7 a step; the iteration enlarges the rounding of its smallest singular
            # values, and what is left of that is multiplied by the learning rate of 1e-2.
            np.testing.assert_allclose(params[name], expected, atol=2e-6, rtol=0, err_msg=f"{name} after {count}")
    if placement is not None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if leaf.ndim:
                assert leaf.dtype == jnp.float32
                assert leaf.sharding.is_equivalent_to(params[path[-1].key].sharding, leaf.ndim), path


def test_no_device_holds_more_than_its_share(monkeypatch):
    """Small pieces are made whole, one after the other: no array of the program exceeds the largest shard twice."""
    monkeypatch.setattr(muon, "STACK_BYTES", 1)
    placement = place(("data=2,tensor=4", BOTH))
    specs = {name: SPECS[name] for name in ("queries", "output", "up", "down")}
    transform = orthogonalise(specs, placement)
    updates = random(1, specs, placement)
    run = compiled(lambda updates: transform.update(updates, transform.init(updates))[0], updates)
    text = run.as_text()
    assert "all-to-all" in text
    assert "all-gather" not in text
    shard = max(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(updates))
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) <= 2 * shard < max(leaf.size for leaf in jax.tree.leaves(updates)) / 3
    for name, leaf in run(updates).items():
        expected = each_matrix(
            lambda x: orthogonal64(x) * np.sqrt(max(x.shape)) * 0.18, np.asarray(updates[name], np.float64), specs[name]
        )
        np.testing.assert_allclose(leaf, expected, atol=1e-4, err_msg=name)  # see above, before the learning rate


def test_stacking_and_fusing_do_not_matter():
    alone = {"a": describe("matrix", (12, 20), (None, None)), "b": describe("matrix", (12, 20), (None, None))}
    stacked = {"ab": describe("matrix", (2, 12, 20), (None, None, None))}
    experts = {"ab": describe("expert", (1, 2, 12, 20), (None, None, None, None))}
    fused = {"ab": describe("linear", (24, 20), (None, None), (12, 12))}
    x = random(3, stacked)["ab"]

    def run(specs, updates):
        transform = orthogonalise(specs)
        return jnp.stack(jax.tree.leaves(transform.update(updates, transform.init(updates))[0])).reshape(x.shape)

    expected = run(alone, {"a": x[0], "b": x[1]})
    for specs in (stacked, experts, fused):
        found = run(specs, {"ab": x.reshape(specs["ab"].shape)})
        np.testing.assert_allclose(found, expected, atol=1e-5)  # sums in another order


# --- Newton-Schulz ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_of_gaussian_matrices_end_at_one(dtype):
    """Measured: [1.0000, 1.0020] in float32, [0.992, 1.008] with bfloat16 operands.

    Square matrices of random entries are nearly singular when they are large, which is the subject of the next test.
    """
    rng = np.random.default_rng(0)
    run = jax.jit(lambda x: newton_schulz(x, dtype))
    for shape in ((4, 1024), (1024, 4), (64, 64), (256, 96), (3, 5, 48, 64), (2, 384, 512)):
        x = rng.standard_normal(shape).astype(np.float32)
        values = np.linalg.svd(np.asarray(run(x), np.float64), compute_uv=False)
        assert 0.99 <= values.min() <= values.max() <= 1.01, shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_of_any_matrix_stay_bounded(dtype):
    rng = np.random.default_rng(1)
    run = jax.jit(lambda x: newton_schulz(x, dtype))
    left, right = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    for decades in (2, 4, 6, 10):
        given = np.logspace(0, -decades, 64)
        x = ((left * given) @ right).astype(np.float32)
        values = np.linalg.svd(np.asarray(run(x), np.float64), compute_uv=False)
        assert values.max() <= 1.01
        if decades <= 4:
            # The iteration acts on each singular value alone. Operands round at 2**-8 in bfloat16; float32 rounding of
            # the entries is 1e-7 of the largest value and grows with the smallest.
            expected = np.diag(orthogonal64(np.diag(given)))
            tolerance = 1e-2 if dtype == "bfloat16" else 1e-3
            np.testing.assert_allclose(values, np.sort(expected)[::-1], atol=tolerance)
    # Powers of two are exact, also where the squares of entries are below the smallest float32.
    np.testing.assert_array_equal(run(x * 2.0**-80), run(x))
    np.testing.assert_array_equal(run(np.zeros((64, 64), np.float32)), 0)


def test_update_has_the_rms_of_adam():
    specs = {name: SPECS[name] for name in ("up", "router", "single")}
    transform = orthogonalise(specs)
    for name, leaf in transform.update(random(4, specs), optax.EmptyState())[0].items():
        # min(rows, cols) singular values of 1 spread over rows * cols entries.
        assert np.sqrt(np.mean(np.square(leaf))) == pytest.approx(0.18, rel=2e-3), name


def test_optax_contrib_muon_agrees_where_it_computes_the_same():
    """Its first step is ours; later its bias-corrected average mixes momentum and gradient in other proportions."""
    shape = (3, 12, 20)
    specs = {"w": describe("matrix", shape, (None, None, None))}
    theirs = optax.chain(
        optax.contrib.scale_by_muon(
            tuple(HYBRID), 10, 0.95, eps=0.0, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(1, 2)}
        ),
        optax.scale(np.sqrt(20) * 0.18),
    )
    ours = optax.chain(optax.trace(0.95, nesterov=True), orthogonalise(specs))
    first, second = random(5, specs), random(6, specs)
    states = theirs.init(first), ours.init(first)
    (a, theirs_state), (b, ours_state) = theirs.update(first, states[0]), ours.update(first, states[1])
    np.testing.assert_allclose(a["w"], b["w"], atol=1e-4)  # float32 rounding in the iteration
    a, b = theirs.update(second, theirs_state)[0], ours.update(second, ours_state)[0]
    assert np.abs(a["w"] - b["w"]).max() > 1e-2


# --- schedule, decay, clipping ----------------------------------------------------------------------------------------


def test_schedule():
    rate = jax.jit(schedule(CONFIG))
    found = [float(rate(step)) for step in range(11)]
    assert found == pytest.approx([learning_rate64(step) for step in range(11)], rel=1e-6)
    assert found[:5] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2])
    assert found[6] == pytest.approx((1e-2 + 1e-3) / 2)
    assert found[8:] == pytest.approx(3 * [1e-3])
    flat = dataclasses.replace(CONFIG, warmup_steps=0, decay_start=8, final_learning_rate=1e-2)
    assert [float(schedule(flat)(step)) for step in (0, 7, 8, 9)] == pytest.approx(4 * [1e-2])


def test_weight_decay_reaches_every_parameter():
    optimizer = make_optimizer(CONFIG, SPECS)
    params = random(0)
    arguments = jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    updates, _ = compiled(optimizer.update, *arguments)(*arguments)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.1 * 5e-3 * params[name], rtol=1e-6, err_msg=name)


def test_clipping_limits_the_norm_of_the_whole_gradient():
    specs = {name: SPECS[name] for name in ("router", "norm")}
    gradients = random(1, specs)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in gradients.values()))
    for limit, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
        optimizer = make_optimizer(dataclasses.replace(CONFIG, clip_norm=limit), specs)
        _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
        np.testing.assert_allclose(
            optax.tree.get(state, "trace")["router"], factor * gradients["router"], rtol=1e-5, atol=1e-7
        )


def test_plain_adamw_is_that_of_optax():
    ours = make_optimizer(dataclasses.replace(CONFIG, name="adamw"), SPECS)
    theirs = optax.adamw(schedule(CONFIG), 0.9, 0.95, 1e-20, weight_decay=0.1)
    params, gradients = random(0), random(1)
    a, b = (o.update(gradients, o.init(params), params)[0] for o in (ours, theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


# --- which parameter gets what ----------------------------------------------------------------------------------------


def trainable(model: Model):
    return map_specs(lambda spec: spec if spec.kind is Weight else None, model.parameter_specs())


@pytest.mark.parametrize("name", ["default", "flash", "pro"])
def test_every_parameter_is_in_one_partition(name):
    """The split by role is the report's list of names, and as many matrices are kept apart as the model has."""
    config = Config.from_file(CONFIGS / name / "config.json")
    model = Model(config, MASTER)
    specs = trainable(model)
    parts = [specs["shell"], *(member for group in specs["groups"] for member in group), *specs["drafts"]]
    found = {"muon": 0, "adamw": 0}
    matrices = 0
    for part in parts:
        labels = flatten(partition_labels(part))
        for path, spec in flatten(part).items():
            if spec is None:
                continue
            dotted = ".".join(path)
            adamw = (
                dotted in ("embed.weight", "head.weight")
                or dotted.endswith(("norm.weight", "_base", "_scale", "attn_sink", ".ape"))
            )  # fmt: skip
            assert labels[path] == ("adamw" if adamw else "muon"), dotted
            found[labels[path]] += 1
            if not adamw:
                matrices += math.prod(spec.shape[:-2]) * max(1, len(spec.matrices))
    assert sum(found.values()) == len(jax.tree.leaves(specs, is_leaf=is_spec))

    groups, experts = config.o_groups, config.n_routed_experts
    # Routed and shared experts, router, wq_a and wkv and wo_b, wq_b and wo_a by group, two mHC projections of three.
    each = 3 * experts + 3 + 1 + 3 + 2 * groups + 6
    # wkv and wgate, with two lanes in CSA, whose indexer has queries in as many groups of heads, the weights of heads,
    # and a compressor of its own.
    extra = {0: 0, 4: 4 + groups + 1 + 4, 128: 2}
    drafts = len(model.drafts)
    expected = sum(each + extra[ratio] for ratio in config.layer_ratios) + 1 + drafts * (each + 2 + 1)
    assert matrices == expected


def test_frozen_parameters_are_absent_from_the_state():
    specs = {**SPECS, "up": None, "norm": None}
    params = random(0, specs)
    optimizer = make_optimizer(CONFIG, specs)
    state = optimizer.init(params)
    # One moment for Muon, two for AdamW, and the counts of Adam and of the schedule.
    assert len(jax.tree.leaves(state)) == 8 + 2 * 3 + 2
    updates, _ = optimizer.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    # Adapters alone leave Muon nothing to do.
    adapters = {"adapter": SPECS["adapter"], "up": None}
    optimizer = make_optimizer(CONFIG, adapters, place(LAYOUTS["all axes"]))
    params = random(0, adapters)
    assert optimizer.update(params, optimizer.init(params), params)[0]["up"] is None


def test_state_is_laid_out_as_the_parameters_of_a_model():
    placement = place(LAYOUTS["all axes"])
    model = Model(
        small_config((128, 4), num_hash_layers=1, num_attention_heads=8, o_groups=4),
        MASTER,
        Execution(placement=placement),
    )
    specs = trainable(model)
    optimizer = make_optimizer(CONFIG, specs, placement)
    shardings = state_shardings(optimizer, specs, placement)
    params = map_specs(lambda spec: placement.parameter_sharding(spec), specs)
    traced = jax.tree.leaves(optax.tree.get(shardings, "trace"))
    matrices = jax.tree.map(
        lambda label, sharding: sharding if label == "muon" else None, partition_labels(specs), params
    )
    assert traced == jax.tree.leaves(matrices)
    assert {s.spec for s in jax.tree.leaves(shardings) if s not in jax.tree.leaves(params)} == {jax.P()}


def test_what_cannot_be_trained_is_refused():
    packed = describe("router_bias", (8,), (None,))
    with pytest.raises(ValueError, match=r"float32\[8\] of role 'router_bias'"):
        make_optimizer(CONFIG, {"bias": packed})
    with pytest.raises(ValueError, match=r"bfloat16\[40, 16\]"):
        make_optimizer(CONFIG, {"w": dataclasses.replace(SPECS["single"], dtype=jnp.dtype(jnp.bfloat16))})
    transform = orthogonalise({"w": SPECS["single"]})
    with pytest.raises(ValueError, match=r"\(40, 16\).*found.*\(16, 40\)"):
        transform.update({"w": jnp.zeros((16, 40))}, transform.init(None))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "sgd"}, "sgd"),
        ({"newton_schulz": "float16"}, "float16"),
        ({"warmup_steps": 5}, "warmup_steps <= decay_start"),
        ({"decay_start": 9}, "decay_start <= total_steps"),
    ],
)
def test_bad_configurations(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(CONFIG, **changes)


# --- at full size -----------------------------------------------------------------------------------------------------


PART = ("ffn.experts.w1", "attn.wo_b", "attn.attn_sink")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)")
@pytest.mark.parametrize(
    ("name", "topology", "mesh", "patterns"),
    [
        ("flash", "v6e:16x16", "data=16,expert=16", PART),
        pytest.param("flash", "v6e:16x16", "data=16,expert=16", (), marks=pytest.mark.slow),
        pytest.param("flash", "v5p:4x4x8", "data=8,expert=16", (), marks=pytest.mark.slow),
        pytest.param("flash", "v5p:4x4x8", "data=4,expert=8,tensor=4", (), marks=pytest.mark.slow),
    ],
)
def test_full_size_update_moves_shards_and_fits(name, topology, mesh, patterns):
    """The update on 256 chips of v6e and 128 of v5p: matrices are made whole by all-to-all, a small piece at a time."""
    script = Path(__file__).with_name("compile_update.py")
    config = CONFIGS / name / "config.json"
    arguments = [str(config), topology.split(":")[0], topology, mesh, "bfloat16", *patterns]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # Parameters and state are updated in place. Temporaries do not grow with the model: they are a few of the largest
    # leaves on a device (measured: 4.6), of which the compiler updates two at once.
    assert report["alias_bytes"] >= report["parameter_bytes"] + report["state_bytes"]
    assert report["temporary_bytes"] < 5 * report["largest_shard_bytes"], report
    # No array of the program is larger than the largest that a device stores.
    assert 4 * report["largest_array"] <= report["largest_shard_bytes"], report
    # The largest move is a piece of one stack; the largest stack of experts is hundreds of pieces.
    assert set(report["collectives"]) <= {"all-to-all", "all-gather", "all-reduce"}
    assert report["collectives"]["all-to-all"][0] > 0
    assert max(largest for _, largest in report["collectives"].values()) < report["largest_parameter"] / 256, report
