"""Reuse of shared beginnings: a hit gives what a miss gives, bit by bit, from memory and from disk; eviction."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import small_config, small_model

from deepseek_v4 import Execution
from deepseek_v4.engine import Engine, Pool, PrefixError, PrefixStore, Request
from deepseek_v4.engine.prefix import _programs

UNIT, LENGTH, NEW = 128, 640, 6
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def small():
    config = small_config((4, 128), num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=128, index_topk=8)
    return small_model(config, seed=5)


def make_engine(small, prefixes, drafts=0):
    return Engine(
        small.model,
        small.params,
        [Pool(2, LENGTH)],
        chunks=(UNIT, 32),
        drafts=drafts,
        top_logprobs=2,
        prefixes=prefixes,
        compiler_options=QUICK,
    )


def make_requests():
    """Beginnings of 0 to 4 units in common, ends on and around unit boundaries, one prompt that is another's start."""
    rng = np.random.default_rng(3)
    base = tuple(int(t) for t in rng.integers(3, 256, 600))
    prompts = [base[:n] for n in (128, 129, 255, 256, 257, 513, 600, 512)]
    prompts += [base[:n] + tuple(int(t) for t in rng.integers(3, 256, 40)) for n in (100, 128, 300, 560)]
    return [Request(p, NEW, stream=i, temperature=i % 2, logprobs=2) for i, p in enumerate(prompts)]


def results(engine, requests):
    """Tokens with their log-probabilities: any other bit in the logits would show."""
    found = [[] for _ in requests]
    for update in engine.run(requests):
        assert update.error is None
        found[update.request_id] += zip(update.token_ids, update.logprobs, strict=True)
    return found


@pytest.fixture(scope="module")
def misses(small):
    return results(make_engine(small, None), make_requests())


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_hit_is_a_miss_bit_by_bit(small, drafts, misses):
    if drafts:  # the draft block's ring and the last streams are restored as well
        misses = results(make_engine(small, None, drafts), make_requests())
    engine = make_engine(small, PrefixStore(UNIT, 1 << 30), drafts)
    assert results(engine, make_requests()) == misses
    first = engine.statistics.reused_tokens
    assert 0 < first < sum(len(r.token_ids) for r in make_requests())
    assert results(engine, make_requests()[::-1]) == misses[::-1]
    # Now everything is known up to the last whole unit before a prompt's last token.
    expected = sum((len(r.token_ids) - 1) // UNIT * UNIT for r in make_requests() if len(r.token_ids) != 140)
    diverging = make_requests()[8]  # its first unit is its own
    assert engine.statistics.reused_tokens - first == expected + (len(diverging.token_ids) - 1) // UNIT * UNIT


def test_units_of_keys_in_columns_are_taken_and_put_back(small):
    """Units that are no whole tile of columns, and one that the cache ends in."""
    execution = Execution("bfloat16", frozenset({"kv", "indexer"}), entry_layout="columns")
    model = dataclasses.replace(small.model, execution=execution)
    programs = _programs(model)
    rng = np.random.default_rng(0)

    def state():
        cache = jax.tree.map(
            lambda a: a if a.dtype == np.int32 else rng.integers(0, 120, a.shape).astype(a.dtype),
            model.init_cache(2, LENGTH),
        )
        return {"cache": cache, "rows": {}}

    def keys(state):
        (found,) = [m["index_entries"] for group in state["cache"]["groups"] for m in group if "index_entries" in m]
        return [np.asarray(a) for a in found]

    source, target = state(), state()
    old, new = keys(target), keys(source)
    capacity = new[0].shape[-1]
    for first, unit in ((256, 128), (512, 1024)):
        taken = programs.take_entries(source, 0, first, unit=unit)
        target = programs.put_entries(target, 1, first, taken)
        at, end = first // 4, min((first + unit) // 4, capacity)
        for a, b in zip(old, new, strict=True):
            a[:, 1, :, at:end] = b[:, 0, :, at:end]
        for found, expected in zip(keys(target), old, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_snapshots_may_be_rarer_than_units(small, misses):
    store = PrefixStore(UNIT, 1 << 30, snapshot_every=3)
    engine = make_engine(small, store)
    assert results(engine, make_requests()) == misses
    assert results(engine, make_requests()) == misses
    every = PrefixStore(UNIT, 1 << 30)
    results(make_engine(small, every), make_requests())
    assert store.nbytes < every.nbytes


def test_bytes_are_bounded_and_the_oldest_go_first(small):
    requests = make_requests()[3:10]
    whole = PrefixStore(UNIT, 1 << 30)
    expected = results(make_engine(small, whole), requests)
    one = whole.nbytes // len(whole._units)
    store = PrefixStore(UNIT, 3 * one)
    engine = make_engine(small, store)
    for _ in range(2):
        assert results(engine, requests) == expected
        assert store.nbytes <= 3 * one
        assert store.nbytes == sum(unit.nbytes for unit in store._units.values())
        for unit in store._units.values():
            assert unit.parent is None or unit.parent in store._units
    nothing = PrefixStore(UNIT, 0)
    assert results(make_engine(small, nothing), requests) == expected
    assert nothing.nbytes == nothing.hits == 0


def test_later_runs_find_it_on_disk(small, misses, tmp_path):
    def store(**options):
        return PrefixStore(UNIT, 1 << 30, directory=tmp_path / "p", **({"fingerprint": "weights 1"} | options))

    assert results(make_engine(small, store()), make_requests()) == misses
    again = make_engine(small, store())
    assert results(again, make_requests()) == misses
    assert again.statistics.reused_tokens > 2000
    units = sorted((tmp_path / "p").glob("*.unit"))
    for path in units[::2]:  # a torn file is as good as none
        path.write_bytes(path.read_bytes()[:-50])
    torn = make_engine(small, store())
    assert results(torn, make_requests()) == misses
    assert torn.statistics.reused_tokens < again.statistics.reused_tokens
    with pytest.raises(PrefixError, match="this directory keeps"):
        make_engine(small, store(fingerprint="weights 2"))
    size = sum(path.stat().st_size for path in (tmp_path / "p").glob("*.unit"))
    bounded = store(max_disk_bytes=size // 2)
    other = [dataclasses.replace(r, token_ids=(7, *r.token_ids)) for r in make_requests()[5:7]]
    results(make_engine(small, bounded), other)
    assert sum(path.stat().st_size for path in (tmp_path / "p").glob("*.unit")) <= size // 2


def test_nothing_is_compiled_for_a_hit(small):
    engine = make_engine(small, PrefixStore(UNIT, 1 << 30))
    engine.compile()
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        results(engine, make_requests()[-2:])
        results(engine, make_requests()[-2:])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert engine.statistics.reused_tokens
    assert not compiled


def test_stores_that_do_not_fit_are_refused(small, tmp_path):
    with pytest.raises(PrefixError, match="multiples of 128"):
        PrefixStore(100, 0)
    with pytest.raises(PrefixError, match="snapshot_every"):
        PrefixStore(128, 0, snapshot_every=0)
    with pytest.raises(PrefixError, match="which weights"):
        PrefixStore(128, 0, directory=tmp_path)
    with pytest.raises(PrefixError, match="keeps 256 tokens at a time, the engine reads 128"):
        make_engine(small, PrefixStore(256, 0))
