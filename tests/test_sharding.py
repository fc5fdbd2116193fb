"""Sharded execution against one device, and the meshes that must be refused."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small_models import small_config, small_model

from deepseek_v4 import Config, Execution, MeshError, Model, Placement, Rules, make_mesh
from deepseek_v4.dispatch import Exchange
from deepseek_v4.nn.linear import Linear
from deepseek_v4.nn.variables import RELEASED, RELEASED_BASE
from deepseek_v4.parameters import flatten
from deepseek_v4.planning.program import collectives
from deepseek_v4.positions import Training
from deepseek_v4.relayout import scatter_tokens
from deepseek_v4.sharding import check_placement, parse_mesh

# One layer of every kind, both routers; sizes divide over every mesh below in whole scale blocks.
CONFIG = small_config(
    (128, 4), num_hash_layers=1, num_attention_heads=8, o_groups=4, moe_intermediate_size=256, num_hidden_layers=2
)
MESHES = (
    "tensor=2",
    "data=2,expert=2",
    "data=2,expert=2,tensor=2",
    "data=2,tensor=4",
    "expert=8",
    "expert=2,tensor=2,context=2",
)
LENGTH = 136  # crosses the window and one HCA block; in the first call rows are split between sublayers over 2, 4, 8


def placement(mesh: str) -> Placement:
    sizes = parse_mesh(mesh)
    return Placement(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))


@pytest.fixture(scope="module")
def small():
    return small_model(CONFIG)


def run(model: Model, params):
    """Two ragged calls of one compiled program: logits and draft logits of the real tokens."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 2, LENGTH)), jnp.int32)
    lengths = np.array([[LENGTH, 70], [1, 66]])
    cache = model.init_cache(2, 2 * LENGTH, 4)
    step = jax.jit(functools.partial(model.forward, draft=True), donate_argnums=2)
    results = []
    for call in range(2):
        out = step(params, tokens[call], cache, jnp.asarray(lengths[call]))
        cache = out.cache
        for row in range(2):
            results.append(np.asarray(out.logits)[row, : lengths[call, row]])
            results.append(np.asarray(out.draft_logits)[row, 1 - min(call, 1) : lengths[call, row]])
    return results


@pytest.fixture(scope="module")
def expected(small):
    return run(small.model, small.params)


@pytest.mark.parametrize("mesh", [*MESHES, "gather", "dispatch"])
def test_meshes_agree_with_one_device(small, expected, mesh):
    where = placement("expert=2,tensor=2" if mesh in ("gather", "dispatch") else mesh)
    if mesh in ("gather", "dispatch"):
        where = dataclasses.replace(where, rules=Rules.expert_parallel(), exchange=Exchange(mesh, rows=128))
    model = dataclasses.replace(small.model, execution=Execution(dtype="float32", placement=where))
    params = jax.tree.map(lambda a, spec: jax.device_put(a, spec.sharding), small.params, model.abstract_params())
    for ours, theirs in zip(run(model, params), expected, strict=True):
        # Shards add partial sums in another order: a few float32 roundings of logits of order one.
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)


def test_rows_that_travel_in_fp8_are_nearly_the_others(small, expected):
    mesh = make_mesh("expert=2,tensor=2", jax.devices()[:4])
    where = Placement.of(mesh, expert_parallel=True, expert_precision="fp8-bfloat16")
    where = dataclasses.replace(where, exchange=dataclasses.replace(where.exchange, form="dispatch", rows=128))
    model = dataclasses.replace(small.model, execution=Execution(dtype="float32", placement=where))
    params = jax.tree.map(lambda a, spec: jax.device_put(a, spec.sharding), small.params, model.abstract_params())
    for ours, theirs in zip(run(model, params), expected, strict=True):
        # E4M3 has three bits behind the leading one: inputs of experts are off by 2^-4 of themselves at most, and what
        # experts say is a part of the streams.
        assert 0 < np.std(ours - theirs) < 2**-4 * np.std(theirs), np.std(ours - theirs) / np.std(theirs)


def test_parameters_stay_as_given():
    """Weights that are cut are gathered into new dicts, not the caller's: a scan around the call would keep tracers."""
    where = dataclasses.replace(placement("data=2,expert=4"), rules=Rules.expert_parallel(fsdp=True))
    model = Model(CONFIG, RELEASED, Execution(placement=where))

    def steps(params, tokens, lengths, cache):
        given = jax.tree.leaves(params)
        cache = model.forward(params, tokens[:, None], cache, draft=True).cache
        model.draft_step(params, tokens, model.last_streams(cache), cache["position"], lengths, cache)
        model.hidden(params, tokens[:, None], training=Training(jnp.ones((8, 1), bool)), draft=True)
        model.vocabulary(params)
        assert all(now is before for now, before in zip(jax.tree.leaves(params), given, strict=True))

    row = jax.ShapeDtypeStruct((8,), jnp.int32)
    jax.eval_shape(steps, model.abstract_params(), row, row, model.abstract_cache(8, 512, 4))


def test_decode_moves_only_what_it_must():
    """The compiled decode step's collectives: partial sums of activations, never weights, caches or index keys."""
    model = Model(CONFIG, RELEASED, Execution(dtype="float32", placement=placement("data=2,expert=2,tensor=2")))
    batch = 2
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = jax.jit(functools.partial(model.forward, draft=True), donate_argnums=2)
    compiled = step.lower(model.abstract_params(), tokens, model.abstract_cache(batch, 512, 4)).compile()
    collectives = collections.Counter()
    for shape, kind in re.findall(
        r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    ):
        elements = [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\[([\d,]+)\]", shape)]
        assert max(elements, default=0) <= batch * max(CONFIG.hidden_size, 512 // 4), (kind, shape)
        collectives[kind] += 1
    # Per layer: attention output, routed experts, shared expert; plus the index scores of the one CSA layer and the
    # embedding. The draft block is a third layer.
    assert set(collectives) == {"all-reduce"}, collectives
    assert collectives["all-reduce"] <= 3 * 3 + 1 + 2, collectives


def test_decode_moves_tokens_to_experts():
    """With a batch over experts: as above, a layer's tokens are gathered, and what experts say of them is scattered."""
    where = dataclasses.replace(placement("data=2,expert=2,tensor=2"), rules=Rules.expert_parallel())
    model = Model(CONFIG, RELEASED, Execution(dtype="float32", placement=where))
    tokens = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    step = jax.jit(functools.partial(model.forward, draft=True), donate_argnums=2)
    compiled = step.lower(model.abstract_params(), tokens, model.abstract_cache(4, 512, 4)).compile()
    found = {c.kind: c for c in collectives(compiled.as_text())}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    # In three layers tokens, ids and weights of two tokens, and float32 sums of one: never experts. XLA may join some.
    row = 4 * CONFIG.hidden_size
    assert found["all-gather"].times <= 3 * 3
    assert found["all-gather"].bytes <= 3 * 2 * 1.1 * row
    assert found["reduce-scatter"].bytes == 3 * row
    # Attention, routed and shared experts over tensor; index scores of one layer; the embedding's rows, twice.
    assert found["all-reduce"].times <= 3 * 3 + 1 + 2
    assert found["all-reduce"].bytes <= (3 * 3 + 1 + 2) * row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_split_between_sublayers(dtype):
    """A chunk of a prompt over experts and width: streams stay where they are, latents and sublayer inputs travel.

    CPUs gather bfloat16 as float32, so that bytes are the same.
    """
    # Whole scale blocks on every device, as in the released models.
    config = dataclasses.replace(CONFIG, q_lora_rank=128, o_lora_rank=64, hc_sinkhorn_iters=2)
    model = Model(config, RELEASED, Execution(dtype=dtype, placement=placement("expert=2,tensor=2")))
    rows, length, width = 2, 64, config.hidden_size
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    step = jax.jit(functools.partial(model.forward, draft=True, last_only=True), donate_argnums=2)
    program = step.lower(model.abstract_params(), tokens, model.abstract_cache(rows, 512, 4)).compile()
    found = {c.kind: c for c in collectives(program.as_text())}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
    of_all = 4 * rows * length
    # In three layers: sums of attention, routed and shared experts. Shared experts and attention's output projection
    # are computed for half of the tokens already, and scattered over tensor alone; routed experts to halves of all
    # tokens, then to quarters.
    assert found["reduce-scatter"].times == 3 * 4
    assert found["reduce-scatter"].bytes == 3 * (1 + 1 + 2 + 1) * of_all * width // 4
    # Latents of queries and keys, those of compressors (HCA; CSA and its indexer), index weights, selected entries,
    # expert inputs with ids and weights; and once the weight [16, 256] that makes the index weights. XLA may join some,
    # or gather less.
    latents = 3 * (config.q_lora_rank + config.head_dim) + 2 * 64 + 2 * 2 * 64 + 2 * 2 * 32
    latents += config.index_n_heads + config.index_topk
    experts = 3 * (width + 2 * config.num_experts_per_tok)
    expected = of_all * (latents + experts) + 4 * config.index_n_heads * width
    assert 0.98 * expected <= found["all-gather"].bytes <= expected
    assert found["all-gather"].largest == of_all * width
    # Index queries are shared out: whole heads of half of them, each with its weight.
    assert found["all-to-all"].bytes <= of_all // 2 * config.index_n_heads * (config.index_head_dim + 1)
    # The embedding's rows, the streams of five tokens that the draft will need and of the last ones for two heads;
    # drafting begins with the streams of the token before, which is another device's.
    assert found["all-reduce"].times <= 4
    assert found["all-reduce"].largest <= of_all * width
    assert found["collective-permute"].bytes == 4 * rows * config.hc_mult * width


def test_scattered_sums_and_their_gradients():
    mesh, names = make_mesh("expert=2,tensor=2", jax.devices()[:4]), ("expert", "tensor")
    parts = np.random.default_rng(0).normal(size=(4, 3, 8, 5)).astype(np.float32)

    def scattered(parts):
        def shard(part):
            return scatter_tokens(part[0], names)

        spec = PartitionSpec(names)
        return jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None, names), check_vma=False)(
            parts
        )

    total = parts.sum(axis=0)
    np.testing.assert_allclose(jax.jit(scattered)(parts), total, atol=1e-6, rtol=0)
    gradient = jax.jit(jax.grad(lambda parts: jnp.sum(jnp.sin(scattered(parts)))))(parts)
    np.testing.assert_allclose(gradient, np.broadcast_to(np.cos(total), parts.shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["flash", "pro", "flash-base", "pro-base"])
def test_large_tensors_of_released_models_really_shard(shared_dir, name):
    config = Config.from_file(shared_dir / "fixtures" / "configs" / f"{name}.json")
    storage = RELEASED_BASE if name.endswith("base") else RELEASED
    model = Model(config, storage, Execution(placement=placement("data=1,expert=4,tensor=2")))
    for group in model.abstract_params()["groups"]:
        for member in group:
            for path, leaf in flatten(member).items():
                shard = leaf.sharding.shard_shape(leaf.shape)
                parts = np.prod(leaf.shape) // np.prod(shard)
                joined = ".".join(path)
                if joined.startswith("ffn.experts"):
                    assert parts == 8, joined
                elif joined.startswith(("attn.wq_b", "attn.wo_", "attn.attn_sink", "attn.indexer.wq_b", "ffn.shared")):
                    assert parts == 2, joined
    shell = model.abstract_params()["shell"]
    for name in ("embed", "head"):
        leaf = shell[name]["weight"]
        assert leaf.sharding.shard_shape(leaf.shape)[0] == config.vocab_size // 8
    for leaf in jax.tree.leaves(model.abstract_cache(2, 1024)["groups"]):
        assert leaf.sharding.spec[1] is None or "data" in leaf.sharding.spec[1]


def test_illegal_meshes_are_refused_before_compiling():
    def refusal(mesh, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        with pytest.raises(MeshError) as error:
            Model(config, RELEASED, Execution(placement=placement(mesh)))
        return str(error.value)

    assert "o_groups" in refusal("tensor=8")
    assert "n_routed_experts 6" in refusal("expert=4", n_routed_experts=6)
    assert "vocab_size 255" in refusal("expert=2", vocab_size=255)
    assert "index_n_heads 9" in refusal("tensor=2", index_n_heads=9)
    message = refusal("tensor=4", moe_intermediate_size=96)
    assert "moe_intermediate_size 96" in message
    assert "blocks of 32" in message
    several = refusal("expert=4,tensor=2", n_routed_experts=6, index_n_heads=9)
    assert "n_routed_experts 6" in several
    assert "index_n_heads 9" in several
    check_placement(placement("data=8"), CONFIG, RELEASED)
    # The simulated rounding of a width shard must see whole blocks of 128.
    check_placement(placement("tensor=4"), CONFIG, RELEASED)
    with pytest.raises(MeshError, match="blocks of 128"):
        check_placement(placement("tensor=4"), CONFIG, RELEASED, frozenset({"activations"}))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data=2,sequence=2", "sequence"),
        ("data=2,data=4", "twice"),
        ("data=0", "positive"),
        ("tensor", "AXIS=SIZE"),
        ("expert=x", "positive"),
    ],
)
def test_bad_mesh_text(text, complaint):
    with pytest.raises(MeshError, match=complaint):
        parse_mesh(text)


def test_mesh_must_use_all_devices():
    with pytest.raises(MeshError, match=r"needs 4 devices, found 8"):
        make_mesh("data=4")


def test_rules_refuse_collisions():
    with pytest.raises(MeshError, match="output group"):
        Rules(heads=("tensor",), o_groups=("expert",))
    with pytest.raises(MeshError, match="both"):
        Rules(experts=("tensor",), expert_width=("tensor",))
    with pytest.raises(MeshError, match="unknown mesh axes"):
        Rules(embed=("fsdp",))


LINEARS = {
    # axes of (out, in), groups: rows split, inputs split (partial sums), whole groups split, nothing split
    "rows": (("heads", None), 1),
    "inputs": (("embed", "o_groups"), 1),
    "groups": (("o_groups", None), 4),
    "whole": ((None, "embed"), 1),
}


@pytest.mark.parametrize("case", LINEARS)
def test_packed_linears_run_on_shards(case):
    """What a kernel sees is one device's shards; whole numbers and powers of two are summed exactly in any order."""
    axes, groups = LINEARS[case]
    out = inputs = 512
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.choice([-2.0, -1.0, -0.5, 0.0, 1.0, 2.0], (out, inputs)), jnp.float8_e4m3fn)
    scale = jnp.asarray(2.0 ** rng.integers(-2, 2, (-(-out // 128), -(-inputs // 128))), jnp.float8_e8m0fnu)
    shape = (4, 1, groups, inputs) if groups > 1 else (4, 1, inputs)
    x = jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)
    split = Execution(placement=placement("data=2,tensor=4"))

    def run(execution, x, weight, scale):
        linear = Linear(out, inputs, axes, RELEASED, groups=groups)
        linear.weight[...], linear.scale[...] = weight, scale
        return linear(x, execution)

    def gradient(execution, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(run(execution, x, weight, scale).astype(jnp.float32))))(x)

    whole = Execution(implementation="xla")
    expected = jax.jit(functools.partial(run, whole))(x, weight, scale)
    # Partial sums travel in bfloat16: of K = 512 of numbers below 8 in quarters, some take more than its 8 bits.
    tolerance = 2**-7 * float(jnp.abs(expected).max()) if case == "inputs" else 0.0
    compiled = jax.jit(functools.partial(run, split)).lower(x, weight, scale).compile()
    found = compiled(x, weight, scale)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0, atol=tolerance)
    sums = len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text()))
    assert sums == (1 if case == "inputs" else 0)
    if case != "inputs":
        np.testing.assert_array_equal(
            *(np.float32(jax.jit(functools.partial(gradient, execution))(x)) for execution in (whole, split))
        )
