"""Caches split over a mesh axis against whole ones: top-k with ties, one softmax of parts, the model, the engine."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from small_models import SmallModel, compiled, small_config, small_model

from deepseek_v4 import Execution, MeshError, Model, Placement, Rules, make_mesh, rollback
from deepseek_v4.cache import ENTRIES
from deepseek_v4.engine import Engine, Pool, PrefixStore, Request
from deepseek_v4.engine.state import cache_bytes, device_cache_bytes
from deepseek_v4.sharding import parse_mesh
from deepseek_v4.stored_rows import positions_axis, positions_in_row
from pallas_kernels import shares
from pallas_kernels.compressed_attention import compressed_attention, merge
from pallas_kernels.index_topk import index_topk

CONFIG = small_config((4, 128), num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=128, index_topk=8)

# float32 rounding of another order of summation, in logits of order one; up to 4e-6 was measured.
ATOL = 2e-5


def placement(mesh: str, rules: Rules | None = None) -> Placement:
    sizes = parse_mesh(mesh)
    count = int(np.prod(list(sizes.values())))
    return Placement(make_mesh(sizes, jax.devices()[:count]), rules or Rules())


def on_mesh(small: SmallModel, mesh: str, **execution):
    """(model, params) on the first devices."""
    options = {"dtype": "float32", "placement": placement(mesh)} | execution
    model = dataclasses.replace(small.model, execution=Execution(**options))
    return model, jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), small.params, model.abstract_params())


@pytest.fixture(scope="module")
def small() -> SmallModel:
    return small_model(CONFIG, seed=5)


def in_blocks(monkeypatch, queries: int, numbers: int) -> None:
    """Parts in blocks of so many queries, of ``numbers`` per query of the call."""
    monkeypatch.setattr(merge, "_QUERY_BLOCK", queries)
    monkeypatch.setattr(merge, "PART_NUMBERS", queries * numbers)


# --- the operations ---------------------------------------------------------------------------------------------------


def shards(count: int):
    """A function to run on ``count`` devices, and the axes that its rows are split over: two where that can be."""
    shape = (2, count // 2) if count > 2 else (1, count)
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("outer", "inner"))
    axes = ("outer", "inner")
    whole, split = PartitionSpec(), PartitionSpec(None, None, axes)

    def run(function, rows, *rest):
        specs = (split, *(whole for _ in rest))
        local = jax.shard_map(
            functools.partial(function, axes), mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False
        )
        return np.asarray(compiled(local)(rows, *rest))

    return run


@pytest.mark.parametrize("few", [True, False], ids=["all merge all", "shares of queries"])
@pytest.mark.parametrize(("count", "k"), [(2, 5), (4, 5), (8, 5), (8, 40)])
def test_merged_topk_is_the_unsplit_one_with_all_its_ties(count: int, k: int, few: bool, monkeypatch) -> None:
    """Small integers are exact in float32, and tie all the time; 40 is more than a device's 3 keys, and than all 24."""
    if not few:
        monkeypatch.setattr(shares, "FEW", 0)
    rng = np.random.default_rng(k)
    batch, queries, heads, entries, width = 4, 7, 3, 24, 4
    q = rng.integers(-1, 2, (batch, queries, heads, width)).astype(np.float32)
    weights = rng.integers(-2, 3, (batch, queries, heads)).astype(np.float32)
    keys = rng.integers(-1, 2, (1, batch, entries, width)).astype(np.float32)
    counts = np.array([[0, 1, 3, 4, 11, 12, 24], [24, 24, 23, 9, 6, 5, 0], [24] * 7, [2, 0, 24, 13, 1, 24, 7]])
    if not few:  # 24 rows divide over all numbers of devices
        q, weights, counts = q[:, :6], weights[:, :6], counts[:, :6]
    expected = np.full((*counts.shape, min(k, entries)), -1)
    for b, t in np.ndindex(counts.shape):
        scores = [weights[b, t] @ np.maximum(q[b, t] @ key, 0) for key in keys[0, b, : counts[b, t]]]
        best = sorted(range(counts[b, t]), key=lambda s: (-scores[s], s))[:k]
        expected[b, t, : len(best)] = best

    def split(axes, keys, q, weights, counts):
        return index_topk(q, weights, keys, counts, k=k, keys_over=axes)

    np.testing.assert_array_equal(shards(count)(split, keys, q, weights, counts), expected)
    whole = index_topk(*map(jnp.asarray, (q, weights, keys, counts)), k=k)
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("kind", ["CSA", "HCA"])
@pytest.mark.parametrize(
    ("length", "few", "block"), [(1, True, 0), (3, True, 0), (3, False, 0), (7, False, 2)]
)  # all join all parts, or a share, of two queries at a time
def test_parts_are_one_softmax_with_one_window_and_one_sink(kind, length, few, block, monkeypatch) -> None:
    window_size, heads, width, entries, count = 5, 4, 16, 24, 4
    if not few:
        monkeypatch.setattr(shares, "FEW", 0)
    if block:
        in_blocks(monkeypatch, block, 3 * heads * (width + 2))
    rng = np.random.default_rng(length)
    start = np.array([0, 3, 70])
    q = rng.normal(size=(3, length, heads, width)).astype(np.float32)
    window = rng.normal(size=(3, window_size - 1 + length, width)).astype(np.float32)
    rows = rng.normal(size=(3, entries, width)).astype(np.float32)
    sink = np.array([0.3, -20, 20, 0], np.float32)
    counts = np.minimum((start[:, None] + np.arange(length) + 1) // 4, entries)
    indices = np.full((3, length, 6), -1)
    for b, t in np.ndindex(counts.shape):
        chosen = rng.permutation(counts[b, t])[:6]
        indices[b, t, rng.permutation(6)[: len(chosen)]] = chosen
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [window[b, t + i] for i in range(window_size) if start[b] + t - (window_size - 1) + i >= 0]
        seen += [rows[b, i] for i in (range(counts[b, t]) if kind == "HCA" else indices[b, t]) if i >= 0]
        weights = np.exp(np.array([row @ q[b, t, h].astype(float) for row in seen]) * 0.37)
        total = weights.sum() + np.exp(float(sink[h]))
        expected[b, t, h] = sum(w * row for w, row in zip(weights, seen, strict=True)) / total
    for b in range(3):
        rows[b, counts[b].max() :] = np.nan  # not written: also whole devices of a short sequence

    def split(axes, rows, q, window, sink, start, counts, indices):
        chosen = indices if kind == "CSA" else None
        return compressed_attention(
            q, window, sink, start, entries=rows, counts=counts, indices=chosen, window_size=window_size, scale=0.37,
            entries_over=axes,
        )  # fmt: skip

    found = shards(count)(split, rows[None], q, window, sink, start, counts, indices)
    # A float32 softmax over a few dozen rows of size one.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_kernels_that_cannot_refuse() -> None:
    q, window, sink = jnp.zeros((1, 1, 8, 16)), jnp.zeros((1, 5, 16)), jnp.zeros(8)
    counts, rows, at = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1, 4, 16)), jnp.zeros(1, jnp.int32)
    options = {"window_size": 5, "scale": 1.0, "entries_over": ("context",), "implementation": "gpu"}
    with pytest.raises(ValueError, match="no implementation 'gpu'"):
        compressed_attention(q, window, sink, at, entries=rows, counts=counts, **options)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True], ids=["all joined by all", "blocks joined in shares"])
def test_chunks_and_decode_over_every_boundary_equal_one_full_pass(small, blocks, monkeypatch) -> None:
    """Ragged rows, prefilled by pieces and decoded across 4 and 128, with drafts that are taken back."""
    rows, length = 3, 520
    if blocks:  # 131 queries are two blocks and a part of one
        monkeypatch.setattr(shares, "FEW", 0)
        in_blocks(monkeypatch, 64, rows * CONFIG.num_attention_heads // 2 * (CONFIG.head_dim + 2))
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (rows, length))
    full = np.asarray(compiled(lambda p, t: small.model.forward(p, t).logits)(small.params, tokens))
    model, params = on_mesh(small, "tensor=2,context=4")
    step = compiled(model.forward)
    cache = model.init_cache(rows, length, 4)

    def advance(cache, counts, wrong=()):
        size = 1 if max(counts) == 1 else 131
        start = np.asarray(cache["position"])
        taken = np.full((rows, size), 7)
        for b, n in enumerate(counts):
            taken[b, :n] = tokens[b, start[b] : start[b] + n] + (1 if b in wrong else 0)
        out = step(params, taken % 256, cache, jnp.asarray(counts))
        for b, n in enumerate(counts):
            if b not in wrong:
                np.testing.assert_allclose(out.logits[b, :n], full[b, start[b] : start[b] + n], rtol=0, atol=ATOL)
        return out.cache

    cache = advance(cache, [131, 1, 0])
    cache = advance(cache, [124, 125, 3])
    for _ in range(4):  # to 259, 130, 7
        cache = advance(cache, [1, 1, 1])
    back = cache["position"]
    for _ in range(2):
        cache = advance(cache, [1, 0, 1], wrong=(0, 2))
    cache = advance(rollback(cache, back), [131, 0, 131])
    cache = advance(cache, [122, 131, 1])
    for _ in range(3):  # over 512
        cache = advance(cache, [1, 1, 1])
    np.testing.assert_array_equal(cache["position"], [515, 264, 142])


@pytest.mark.parametrize(
    "layout", ["plain", "words", *(pytest.param(name, marks=pytest.mark.slow) for name in ("published", "columns"))]
)
def test_a_token_far_into_a_long_cache(small, layout) -> None:
    """Beyond 64K every device holds entries that count; the caches are filled with made-up rows."""
    simulate = ("kv", "indexer") if layout in ("published", "columns") else ()
    dtype = "float32" if layout == "plain" else "bfloat16"
    options = {"dtype": dtype, "entry_layout": layout, "simulate": frozenset(simulate)}
    whole = dataclasses.replace(small.model, execution=Execution(**options))
    split, params = on_mesh(small, "context=8", **options)
    rng = np.random.default_rng(2)
    cache = whole.init_cache(2, 1 << 17, 1)

    def fill(path, array):
        if array.dtype == jnp.int32:
            return jnp.asarray([70000, 131068], jnp.int32)
        bits = rng.integers(0, 256, (*array.shape, array.dtype.itemsize), dtype=np.uint8)
        if layout == "columns" and array.dtype == jnp.uint32 and "rope" not in str(path):
            if "entry_words" in str(path):  # 48 codes fill three planes of bytes; the highest begins with their scale
                bits = np.where(np.arange(4) == 3, 126 + bits % 3, bits & 0xBF)
                return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint8), jnp.uint32)
            scales = "scale" in str(path)
            bits = 126 + bits % 3 if scales else bits & 0xBF if "kv_words" in str(path) else bits
            return jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.uint32)
        if array.dtype == jnp.uint8:
            return jnp.asarray(bits[..., 0])
        if array.dtype.itemsize == 1:  # finite E4M3 codes; scales of one half to two
            code = bits[..., 0] & 0xBF if "e4m3" in array.dtype.name else 126 + bits[..., 0] % 3
            return jax.lax.bitcast_convert_type(jnp.asarray(code), array.dtype)
        numbers = rng.normal(size=(*array.shape, 2) if array.dtype == jnp.uint32 else array.shape)
        if array.dtype == jnp.uint32:
            return jax.lax.bitcast_convert_type(jnp.asarray(numbers, jnp.bfloat16), jnp.uint32)
        return jnp.asarray(numbers, array.dtype)

    cache = jax.tree.map_with_path(fill, cache)
    like = split.abstract_cache(2, 1 << 17, 1)
    placed = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), cache, like)
    sizes = CONFIG.head_dim, CONFIG.qk_rope_head_dim
    assert {a.sharding.shard_shape(a.shape)[positions_axis(path)] * positions_in_row(path, *sizes)
            for path, a in jax.tree.leaves_with_path([
        member[name] for group in like["groups"] for member in group for name in ENTRIES if name in member
    ])} == {(1 << 17) // 4 // 8, (1 << 17) // 128 // 8}  # fmt: skip
    token = jnp.asarray([[5], [9]], jnp.int32)
    expected = np.asarray(compiled(whole.forward)(small.params, token, cache).logits)
    found = np.asarray(compiled(split.forward)(params, token, placed).logits)
    # In bfloat16 every device rounds its weights relative to its own largest score: 2^-8 of values of order one.
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL if layout == "plain" else 0.03)
    assert np.abs(expected).max() > 0.3


def test_decode_exchanges_candidates_and_parts_and_never_the_cache() -> None:
    # Sizes divide in whole scale blocks, or XLA moves weights to unpack them.
    even = dataclasses.replace(CONFIG, num_attention_heads=8, o_groups=4, moe_intermediate_size=256)
    model = Model(even, execution=Execution("float32", placement=placement("data=2,tensor=2,context=2")))
    batch, context = 2, 8192
    step = jax.jit(model.forward, donate_argnums=2)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    program = step.lower(model.abstract_params(), tokens, model.abstract_cache(batch, context, 4)).compile()
    found = collections.Counter()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for shape, kind in re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", program.as_text()):
        elements = [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\[([\d,]+)\]", shape)]
        found[kind] += 1
        # Scores of a device's own keys, one row, are the largest; its keys alone are 32 times as many numbers.
        assert max(elements, default=0) <= context // 4 // 2, (kind, shape)
    # CSA: candidates and parts; HCA: parts. No other kind than sums besides.
    assert found["all-gather"] == 3, found
    assert set(found) == {"all-gather", "all-reduce"}, found
    # Attention output, routed and shared experts of two layers, index scores, the embedding.
    assert found["all-reduce"] <= 2 * 3 + 1 + 2, found


def test_capacity_divides_and_bytes_are_those_of_a_device(small) -> None:
    model, _ = on_mesh(small, "data=2,context=4")
    cache = model.abstract_cache(2, 1000, 1)
    for group in cache["groups"]:
        for member in group:
            for name in set(ENTRIES) & set(member):
                assert member[name].shape[2] % 4 == 0
    held = jax.tree.leaves(model.init_cache(2, 1000, 1))
    device = jax.devices()[0]
    stored = sum(s.data.nbytes for a in held for s in a.addressable_shards if s.device == device)
    assert device_cache_bytes(model, 2, 1000, 1) == stored < cache_bytes(model, 1000, 1)


def test_entries_may_follow_an_axis_that_attention_leaves_alone(small) -> None:
    rules = Rules(entries=("expert",), experts=("expert",), vocab=("expert", "tensor"))
    model = dataclasses.replace(small.model, execution=Execution(placement=placement("expert=4,tensor=2", rules)))
    shapes = {name: a for group in model.abstract_cache(1, 512)["groups"] for m in group for name, a in m.items()}
    assert shapes["entries"].sharding.shard_shape(shapes["entries"].shape)[2] == 1
    assert shapes["window"].sharding.is_fully_replicated
    for axis in ("data", "tensor"):
        with pytest.raises(MeshError, match="entries"):
            Rules(entries=(axis,))


# --- the engine -------------------------------------------------------------------------------------------------------


def test_an_engine_with_reuse_and_drafts_gives_the_tokens_of_full_passes(small) -> None:
    rng = np.random.default_rng(3)
    base = tuple(int(t) for t in rng.integers(3, 256, 300))
    requests = [Request(base[:n], 9, stream=n) for n in (5, 125, 128, 300)]
    store = PrefixStore(128, 1 << 26)
    options = {"compiler_options": {"xla_backend_optimization_level": 0}, "prefixes": store}
    engine = Engine(*on_mesh(small, "tensor=2,context=2"), [Pool(2, 384)], chunks=(128,), drafts=2, **options)

    def tokens():
        found = [[] for _ in requests]
        for update in engine.run(requests):
            assert update.error is None
            found[update.request_id] += update.token_ids
        return found

    first = tokens()
    hits = store.hits
    assert tokens() == first
    assert store.hits > hits
    together = np.zeros((len(requests), 309), np.int32)
    for row, (request, new) in enumerate(zip(requests, first, strict=True)):
        together[row, : len(request.token_ids) + 9] = (*request.token_ids, *new)
    logits = np.asarray(compiled(lambda p, t: small.model.forward(p, t).logits)(small.params, together))
    for row, (request, new) in enumerate(zip(requests, first, strict=True)):
        at = logits[row, len(request.token_ids) - 1 :][:9]
        # The winner of the full pass may differ only where two logits are equal to float32 rounding.
        np.testing.assert_allclose(at[np.arange(9), new], at.max(axis=-1), rtol=0, atol=ATOL)
