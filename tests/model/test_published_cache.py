"""The published cache layout: the bytes it takes, and the numbers it holds, against the cache that simulates it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import compiled
from small_models import small_config, small_model

from deepseek_v4 import Config, Execution, Model, rollback
from deepseek_v4.cache import layer_cache_shapes
from deepseek_v4.engine.state import cache_bytes, cache_growth
from deepseek_v4.formats import hadamard_transform, simulate_fp4, simulate_kv
from deepseek_v4.layer_spec import layer_specs
from deepseek_v4.planning.cache_bytes import PUBLISHED, bytes_per_token
from deepseek_v4.planning.cache_bytes import cache_bytes as expected_bytes
from deepseek_v4.stored_rows import KeyColumns, KeyRows, KVColumns, KVRows, KVWords, map_shapes

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_EXECUTION = Execution("bfloat16", frozenset({"kv", "indexer"}), entry_layout="published")
COLUMNS_EXECUTION = dataclasses.replace(PUBLISHED_EXECUTION, entry_layout="columns")


def empty(rows, config, spec, name):
    shapes = layer_cache_shapes(config, spec, 4096, 0, "bfloat16", "published")
    return map_shapes(lambda shape, dtype: jnp.zeros((rows, shape[1]), dtype), shapes[name])


@pytest.mark.parametrize(("name", "per_token", "selecting"), [("flash", 3514.25, 21), ("pro", 5031.4375, 30)])
def test_bytes_are_the_published_ones(name, per_token, selecting):
    config = Config.from_file(ROOT / "configs" / name)
    csa = next(spec for spec in layer_specs(config) if spec.indexer)
    row = sum(a.nbytes for a in jax.tree.leaves(empty(1, config, csa, "entries")))
    key = sum(a.nbytes for a in jax.tree.leaves(empty(1, config, csa, "index_entries")))
    window = sum(a.nbytes for a in jax.tree.leaves(empty(1, config, csa, "window")))
    assert (row, key, window) == (584, 68, 584)
    model = Model(config, execution=PUBLISHED_EXECUTION)
    found, fixed = cache_growth(model, 1 << 20, 0)
    assert found == per_token == bytes_per_token(config, PUBLISHED)
    assert cache_bytes(model, 1 << 20, 0) == fixed + per_token * (1 << 20)
    # In columns, entries and index keys take the same bytes; windows stay in bfloat16, rings are whole tiles. Entries
    # that are selected, one per four tokens, take 640 bytes.
    columns = Model(config, execution=COLUMNS_EXECUTION)
    assert cache_growth(columns, 1 << 20, 0)[0] == per_token + selecting * (640 - 584) / 4
    words = next(m["entries"] for m in columns.abstract_cache(1, 1 << 14)["groups"][-1] if "index_entries" in m)
    assert isinstance(words, KVWords)
    assert [a.shape[1:] for a in words] == [(1, 4096, 128), (1, 1024, 128)]
    assert words.shape[1:] == (1, 4096, 512)
    for layer, spec in enumerate(model.groups[-1].pattern):
        name, form, width = ("index_entries", KeyColumns, 128) if spec.indexer else ("entries", KVColumns, 512)
        kept = [m.abstract_cache(1, 1 << 14)["groups"][-1][layer][name] for m in (model, columns)]
        assert isinstance(kept[1], form)
        assert kept[0].shape == kept[1].shape
        assert kept[0].shape[-2:] == ((1 << 14) // spec.compress_ratio, width)
        assert len({sum(a.size * a.dtype.itemsize for a in rows) for rows in kept}) == 1
    # Fixed: windows and float32 rows of unfinished windows as published (ours keep one row fewer of the latter), and
    # what the draft needs: its window, the last streams, a position.
    c = config
    parts = expected_bytes(config, 1 << 20, PUBLISHED)
    fewer = sum(
        2 * 4 * spec.lanes * width
        for spec in layer_specs(config)
        if spec.compress_ratio
        for width in ((c.head_dim, c.index_head_dim) if spec.indexer else (c.head_dim,))
    )
    spare = fewer  # one row fewer to pool from, one more that a call may overwrite
    draft = 128 * 584 + c.hc_mult * c.hidden_size * 2 + 4
    assert fixed == parts["window"] + parts["state"] - fewer + spare + draft


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 300.0])
def test_rows_come_back_as_simulated(scale):
    """Also what was simulated already, as the model hands it over: packing rounds nothing twice."""
    config = Config.from_file(ROOT / "configs" / "flash")
    csa = next(spec for spec in layer_specs(config) if spec.indexer)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(64, 512)) * scale * np.exp(rng.normal(size=(64, 1))), jnp.bfloat16)
    store = empty(64, config, csa, "entries")
    assert isinstance(store, KVRows)
    assert store.shape == (64, 512)
    expected = simulate_kv(rows, 64)
    for given in (rows, expected):
        np.testing.assert_array_equal(store.pack(given).unpack(jnp.bfloat16), expected)
        columns = KVColumns(*(jnp.zeros((words, 1), jnp.uint32) for words in (112, 32, 2))).pack(given)
        assert columns.shape == (64, 512)
        np.testing.assert_array_equal(columns.unpack(jnp.bfloat16), expected)
        words = KVWords(*(jnp.zeros((rows, 128), jnp.uint32) for rows in (4, 1))).pack(given)
        assert (words.shape, words.sharing, words.rope_dims) == ((64, 512), 4, 64)
        np.testing.assert_array_equal(words.unpack(jnp.bfloat16), expected)
        # The bytes themselves: codes, scales, and nothing else in a row; RoPE dims of four entries in another.
        published = store.pack(given)
        planes = [np.asarray(words.entry_words) >> shift & 255 for shift in (0, 8, 16, 24)]
        codes, scales = (np.asarray(a).view(np.uint8) for a in (published.codes, published.scales))
        kept = np.concatenate([codes, scales[:, :7], np.zeros((64, 57), np.uint8)], axis=1)
        np.testing.assert_array_equal(np.concatenate(planes, axis=1), kept)
        rope = np.asarray(published.rope).view(np.uint16).reshape(16, 256)
        shared = np.asarray(words.shared_rope_words)
        np.testing.assert_array_equal(np.concatenate([shared & 0xFFFF, shared >> 16], axis=1), rope)
    keys = hadamard_transform(rows[:, :128])
    store = empty(64, config, csa, "index_entries")
    assert isinstance(store, KeyRows)
    assert store.shape == (64, 128)
    expected = simulate_fp4(keys)
    for given in (keys, expected):
        np.testing.assert_array_equal(store.pack(given).unpack(jnp.bfloat16), expected)
        columns = KeyColumns(jnp.zeros((16, 1), jnp.uint32), jnp.zeros((1, 1), jnp.uint32)).pack(given)
        assert columns.shape == (64, 128)
        np.testing.assert_array_equal(columns.unpack(jnp.bfloat16), expected)
    zeros = jnp.zeros_like(rows)
    np.testing.assert_array_equal(empty(64, config, csa, "entries").pack(zeros).unpack(jnp.bfloat16), zeros)


def test_the_model_computes_what_it_does_on_the_simulating_cache():
    config = small_config((4, 128), num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=128, index_topk=8)
    small = small_model(config, seed=3, dtype="bfloat16", simulate=("kv", "indexer"))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 300)).astype(np.int32)

    def run(model):
        step = compiled(lambda p, t, c, n: model.forward(p, t, c, n, draft=True))
        # Room for a whole tile of columns in every layer: sums over caches of another size add in another order.
        cache = model.init_cache(2, 1 << 14, 3)
        # What was never written may hold anything.
        cache = jax.tree.map(
            lambda a: a if a.dtype == jnp.int32 else (jnp.ones_like(a) * jnp.nan).astype(a.dtype), cache
        )
        # Words of columns: scales of ones are NaN.
        cache = jax.tree.map(lambda a: jnp.full_like(a, 0xFFFFFFFF) if a.dtype == jnp.uint32 else a, cache)
        out = []
        position = np.zeros(2, np.int32)
        for counts in ([136, 5], [3, 136], [1, 1], [1, 1], [136, 4], [0, 136], [1, 1]):
            padded = np.zeros((2, 136), np.int32)
            for b, n in enumerate(counts):
                padded[b, :n] = tokens[b, position[b] : position[b] + n]
            result = step(small.params, padded, cache, np.asarray(counts, np.int32))
            position = position + counts
            cache = rollback(result.cache, jnp.asarray(position))
            for b, n in enumerate(counts):
                out += [result.logits[b, :n], result.draft_logits[b, int(position[b] == n) : n]]
        return np.concatenate([np.asarray(a) for a in out if len(a)])

    simulated = run(small.model)
    for execution in (PUBLISHED_EXECUTION, COLUMNS_EXECUTION):
        # The same numbers enter the same arithmetic.
        np.testing.assert_array_equal(run(dataclasses.replace(small.model, execution=execution)), simulated)


def test_what_the_layout_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="published rows hold what simulate kv,indexer gives"):
        Execution("bfloat16", frozenset({"kv"}), entry_layout="published")
    with pytest.raises(ValueError, match="published holds bfloat16"):
        Execution("float32", frozenset({"kv", "indexer"}), entry_layout="published")
