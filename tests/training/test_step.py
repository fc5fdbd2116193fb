"""The training step: what reaches which parameter, and that batches, devices and memory do not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config

from deepseek_v4 import Execution, Model, Placement, Rules, make_mesh
from deepseek_v4.nn.variables import MASTER
from deepseek_v4.parameters import is_spec
from deepseek_v4.positions import Training
from deepseek_v4.training.optimizer import OptimizerConfig
from deepseek_v4.training.partition import parameter_names
from deepseek_v4.training.step import Objective, Program, random_params

CONFIG = small_config((0, 4, 128), num_hash_layers=1, index_topk=8, num_attention_heads=8, o_groups=4)
ROWS, LENGTH = 8, 144
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_steps=1,
    decay_start=2,
    total_steps=4,
    clip_norm=1.0,
    eps=1e-4,  # AdamW's first step is the sign of the gradient, also where that is rounding; not with this
)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """The same arithmetic without LLVM's optimisations: compiling is most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def program(mesh: str | None = None, rules: Rules | None = None, **changes) -> Program:
    placement = None if mesh is None else Placement(make_mesh(mesh), rules or Rules())
    model = Model(CONFIG, MASTER, Execution("float32", placement=placement))
    options = {"objective": Objective(indexer="sparse"), **changes}
    return Program(model=model, optimizer=OPTIMIZER, **options)


@functools.cache
def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of one to three documents, some targets left out, an empty tail in the last row."""
    rng = np.random.default_rng(seed)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    for row in range(ROWS // 2):
        for cut in rng.integers(1, LENGTH, 2):
            positions[row, cut:] = np.arange(LENGTH - cut)
    real = np.ones((ROWS, LENGTH), bool)
    real[-1, 100:] = False
    positions[-1, 100:] = np.arange(LENGTH - 100)
    targets = (rng.random((ROWS, LENGTH)) < 0.8) & real
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "positions": positions, "targets": targets, "real": real}


@functools.cache
def start_values():
    return jax.tree.map(np.asarray, random_params(program().model, 0))


def start(run: Program):
    params = jax.tree.map(
        lambda a, like: jax.device_put(a, like.sharding) if like.sharding else jnp.asarray(a),
        start_values(),
        run.model.abstract_params(),
    )
    return run.init_state(params, (ROWS, LENGTH))


@functools.cache
def two_steps(run: Program):
    """(params and optimizer state after one step, metrics of two steps) as NumPy arrays and numbers."""
    state, frozen = start(run)
    state, first = run.train_step(state, frozen, run.place_batch(batch()))
    after = jax.tree.map(np.asarray, (run.params(state, frozen), state["optimizer"]))
    _, second = run.train_step(state, frozen, run.place_batch(batch(1)))
    return *after, [{k: float(v) for k, v in metrics.items()} for metrics in (first, second)]


def named_leaves(run: Program, params):
    """(name, leaf) of every parameter."""
    names = jax.tree.leaves(
        parameter_names(run.model.parameter_specs()), is_leaf=lambda n: isinstance(n, tuple) and isinstance(n[0], str)
    )
    return list(zip((n[0] for n in names), jax.tree.leaves(params), strict=True))


def close(found: Program, expected: Program) -> None:
    """Gradients, which are the optimizer's moments after a step, and the metrics of that step and the next.

    Not the parameters: where a gradient has directions that should be zero, Muon makes rounding as large as the rest.
    """
    (_, moments, metrics), (_, wanted, wanted_metrics) = two_steps(found), two_steps(expected)
    for step, tolerance in ((0, 2e-5), (1, 1e-3)):
        for name, value in wanted_metrics[step].items():
            np.testing.assert_allclose(metrics[step][name], value, rtol=tolerance, atol=1e-6, err_msg=f"{step} {name}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moments), jax.tree.leaves(wanted), strict=True):
        # float32 sums in the order that another program takes; the whole gradient has norm 1 (clip_norm), and some of
        # it is zero but for rounding: a norm follows the output head's weights, which alike streams only scale.
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-4 * np.abs(b).max() + 2e-6, err_msg=name)


def test_a_step_on_eight_devices_is_that_of_one() -> None:
    close(program("data=2,expert=2,tensor=2", Rules(fsdp=("data",))), program())


def test_parts_of_a_batch_add_up() -> None:
    """Losses are means over the whole batch; balance and index losses are means of the parts'."""
    free = Objective(balance_weight=0.0, indexer_weight=0.0)
    close(program(accumulate=4, objective=free), program(objective=free))


@pytest.mark.parametrize("remat", ["experts", "full"])
def test_recomputing_changes_nothing(remat) -> None:
    close(program(remat=remat), program())


def test_layers_in_a_row_have_the_gradients_of_a_loop() -> None:
    """Three alike, two of which an iteration runs and computes again."""
    looped = Model(small_config((0, 0, 0), mtp=False), MASTER, Execution("float32"))
    params, ids = random_params(looped, 0), jnp.arange(40, dtype=jnp.int32)[None] % 32

    def gradient(model: Model, remat: str | None):
        def total(groups):
            used = {**params, "groups": groups}
            return model.hidden(used, ids, training=Training(ids >= 0), remat=remat).main.sum()

        return jax.jit(jax.grad(total, allow_int=True))(params["groups"])

    expected = gradient(looped, None)
    found = gradient(dataclasses.replace(looped, execution=Execution("float32", unroll=2)), "full")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if a.dtype == jnp.float32:
            # The same sums in another program, float32 in another order.
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-6)


def gradients(objective: Objective):
    """Of every trained parameter by name, without the optimizer."""
    run = program(objective=objective)
    state, frozen = start(run)
    placed = run.place_batch(batch())

    @jax.jit
    def gradient(state, frozen, placed):
        return run._gradients(state, frozen, placed, run._weights(state["step"], placed), None)[0]

    found = gradient(state, frozen, placed)
    names = named_leaves(run, jax.tree.map(lambda s: s, run.model.parameter_specs(), is_leaf=is_spec))
    trained = jax.tree.leaves(found, is_leaf=lambda leaf: leaf is None)
    return {name: leaf for (name, _), leaf in zip(names, trained, strict=True)}


def test_the_indexer_learns_from_its_own_loss_alone() -> None:
    """Weights 0 and 1000 of that loss leave every other gradient bit-identical; buffers never receive one."""
    none, much = (gradients(Objective(indexer="sparse", indexer_weight=w)) for w in (0.0, 1000.0))
    for name, found in much.items():
        if name.endswith(("gate.bias", "tid2eid")):
            assert found is None, name
        elif ".indexer." in name:
            assert not np.any(none[name]), name
            assert np.any(found), name
        else:
            np.testing.assert_array_equal(found, none[name], err_msg=name)
            # A draft's indexer does not exist; everything else learns from the language.
            assert np.any(found), name


def test_balance_biases_move_by_their_rate_towards_an_even_load() -> None:
    run = program()
    before = dict(named_leaves(run, start_values()))
    after = dict(named_leaves(run, two_steps(run)[0]))
    state, frozen = start(run)
    sums = run.eval_step(state, frozen, run.place_batch(batch()))
    load = np.asarray(sums["load"])
    biases = {name: after[name] - before[name] for name in after if name.endswith("gate.bias")}
    assert "layers.0.ffn.gate.bias" not in biases  # hash-routed
    rate = run.objective.bias_rate
    for layer in range(1, CONFIG.num_hidden_layers):
        moved = biases[f"layers.{layer}.ffn.gate.bias"]
        moved = moved.reshape(-1, moved.shape[-1])[0]
        np.testing.assert_allclose(moved, rate * np.sign(load[layer].mean() - load[layer]), rtol=1e-6)
    np.testing.assert_allclose(biases["mtp.0.ffn.gate.bias"], rate * np.sign(load[-1].mean() - load[-1]), rtol=1e-6)
    # Every real token is somewhere, and a draft has none for the first token of a document.
    counted = batch()["real"].sum() * CONFIG.num_experts_per_tok
    np.testing.assert_array_equal(load[:-1].sum(axis=1), counted)
    firsts = (batch()["real"] & (batch()["positions"] == 0)).sum() * CONFIG.num_experts_per_tok
    assert load[-1].sum() == counted - firsts


def test_anticipated_routing_uses_the_parameters_of_steps_ago() -> None:
    """With one step of distance, step 1 routes as step 0's parameters would; the rest is of step 1."""
    run = program(anticipate=1, objective=Objective(bias_rate=0.0))
    state, frozen = start(run)
    first, second = run.place_batch(batch()), run.place_batch(batch(1))
    # Routers that change a lot in between: without anticipation the loads would differ.
    early = run.eval_step(state, frozen, second)["load"]
    state, _ = run.train_step(state, frozen, first, second)
    kept = state["routing"]
    counted = np.zeros((CONFIG.num_hidden_layers, CONFIG.n_routed_experts))
    for group, members in zip(run.model.groups, kept["groups"], strict=True):
        for m, member in enumerate(members):
            for repeat in range(group.repeats):
                ids = np.asarray(member["experts"][0, repeat])[batch(1)["real"]]
                counted[group.layer_index(repeat, m)] = np.bincount(ids.reshape(-1), minlength=CONFIG.n_routed_experts)
    np.testing.assert_array_equal(counted, early[:-1])
    late = np.asarray(run.eval_step(state, frozen, second)["load"])
    assert np.any(late != early)
    _, metrics = run.train_step(state, frozen, second, first)
    with_bias = [np.max(load) / np.mean(load) for load in np.asarray(early)]
    np.testing.assert_allclose(float(metrics["imbalance"]), max(with_bias), rtol=1e-6)


def test_what_cannot_be_trained_is_said() -> None:
    model = Model(CONFIG, execution=Execution("float32"))
    with pytest.raises(ValueError, match="float32 masters"):
        Program(model=model, optimizer=OPTIMIZER)
    with pytest.raises(ValueError, match="indexer"):
        Objective(indexer="warm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mtp_weight"):
        dataclasses.replace(Objective(), mtp_weight=-1.0)
    with pytest.raises(ValueError, match="remat"):
        program(remat="some")
