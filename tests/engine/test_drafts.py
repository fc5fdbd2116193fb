"""Drafting with the MTP block: the same output, the same state, and the distribution it shall have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import small_config, small_model

from deepseek_v4 import Model, rollback
from deepseek_v4.engine import Engine, Pool, Request, check_drafts
from deepseek_v4.engine.speculation import Proposal, propose, verify
from deepseek_v4.engine.state import request_rows
from deepseek_v4.sampling import Sampling, tempered

NEW, LENGTH, DRAFTS = 24, 384, 3
QUICK = {"xla_backend_optimization_level": 0}  # the same arithmetic, compiled in a third of the time


@pytest.fixture(scope="module")
def small():
    config = small_config((4, 128), num_hash_layers=0, hc_sinkhorn_iters=2, hidden_size=128, index_topk=8)
    return small_model(config, seed=5)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def make_requests(**options):
    rng = np.random.default_rng(9)
    lengths = (1, 3, 4, 120, 127, 130, 250)
    return [
        Request(tuple(int(t) for t in rng.integers(3, 256, n)), NEW, stream=i, **options) for i, n in enumerate(lengths)
    ]


def collect(engine, requests):
    tokens = [[] for _ in requests]
    for update in engine.run(requests):
        tokens[update.request_id].extend(update.token_ids)
        assert update.finish_reason in (None, "length", "stop")
    return [tuple(row) for row in tokens]


@pytest.fixture(scope="module")
def plain(small):
    return Engine(small.model, small.params, [Pool(4, LENGTH)], chunks=(64,), compiler_options=QUICK)


@pytest.fixture(scope="module")
def drafting(small):
    return Engine(small.model, small.params, [Pool(4, LENGTH)], chunks=(64,), drafts=DRAFTS, compiler_options=QUICK)


def test_greedy_output_is_that_without_drafts(plain, drafting):
    """Prompts end around the 4- and 128-boundaries, 24 tokens cross them; rows of a batch accept each their own."""
    expected = collect(plain, make_requests())
    assert collect(drafting, make_requests()) == expected
    statistics = drafting.statistics
    assert statistics.proposed_drafts == DRAFTS * statistics.row_steps > 0
    assert 0 <= statistics.acceptance < 1
    assert statistics.tokens_per_step == 1 + DRAFTS * statistics.acceptance


def test_output_does_not_depend_on_the_batch(drafting):
    requests = make_requests()
    warm = make_requests(temperature=0.8, top_k=20, seed=3)
    mixed = [warm[i] if i % 2 else requests[i] for i in range(7)]
    alone = [collect(drafting, [request])[0] for request in mixed]
    assert collect(drafting, mixed) == alone
    assert collect(drafting, mixed[::-1]) == alone[::-1]


def test_stop_tokens_and_limits_cut_what_was_accepted(plain, drafting):
    whole = collect(plain, make_requests())
    requests = [
        dataclasses.replace(r, max_new_tokens=5 + i, stop_ids=(whole[i][2 + i],)) for i, r in enumerate(make_requests())
    ]
    assert collect(drafting, requests) == collect(plain, requests)


def test_a_continued_request_goes_on_the_same(drafting):
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        requests = make_requests(**options)
        whole = collect(drafting, requests)
        for split in (1, 7):
            later = [dataclasses.replace(r, generated=w[:split]) for r, w in zip(requests, whole, strict=True)]
            if not options:  # a sampled round ends where its drafts do; another cut draws other drafts
                assert collect(drafting, later) == [w[split:] for w in whole]


@pytest.fixture(scope="module")
def world(small):
    """Compiled pieces over three rows, and a full pass with MTP over what they run."""
    model = small.model
    tokens = np.random.default_rng(2).integers(3, 256, (3, LENGTH)).astype(np.int32)

    class World:
        full = quick(lambda p, t: model.forward(p, t, draft=True))(small.params, tokens)
        step = staticmethod(quick(lambda p, t, c, n: model.forward(p, t, c, n, draft=True)))
        drafts = staticmethod(quick(lambda p, c, rows: propose(model, p, c, rows, DRAFTS)))

        def advance(self, cache, rows):
            size = 64 if max(map(len, rows)) > DRAFTS + 1 else DRAFTS + 1
            padded = np.full((3, size), 7, np.int32)
            for row, new in zip(padded, rows, strict=True):
                row[: len(new)] = new
            return self.step(small.params, padded, cache, np.array([len(r) for r in rows], np.int32))

        def at(self, positions):
            cache = model.init_cache(3, LENGTH, DRAFTS)
            while True:
                start = np.asarray(cache["position"])
                rows = [tokens[b, s : min(s + 64, p)] for b, (s, p) in enumerate(zip(start, positions, strict=True))]
                if not any(len(row) for row in rows):
                    return cache
                cache = self.advance(cache, rows).cache

    World.tokens = tokens
    return World()


def row_of(cache, row):
    return jax.tree.map_with_path(
        lambda path, a: a[:, row : row + 1] if path[0].key in ("groups", "drafts") else a[row : row + 1], cache
    )


def readable(cache, position, config):
    """What a row at ``position`` may still read: the same after any history that led there."""
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(cache):
        name = path[-1].key
        if name == "position":
            continue
        if name == "streams":
            leaves.append(leaf[:, (position - 1) % leaf.shape[1]])
        elif name in ("entries", "index_entries"):
            ratio = LENGTH // leaf.shape[2]
            leaves.append(leaf[:, :, : position // ratio])
        else:
            ahead = 1 if path[0].key == "drafts" else 0
            rows = config.sliding_window - 1 if name == "window" else leaf.shape[2] - DRAFTS
            wanted = [p % leaf.shape[2] for p in range(max(0, position - ahead - rows), position - ahead)]
            leaves.append(leaf[:, :, wanted])
    return leaves


@pytest.mark.parametrize("start", [(2, 124, 125), (126, 127, 128), (253, 254, 255), (5, 6, 7)])
def test_state_after_partial_acceptance_is_as_if_nothing_had_been_drafted(small, world, start):
    """Every accepted length, across 4- and 128-boundaries: the very bits, in everything that can be read again."""
    tokens, model = world.tokens, small.model
    rows = request_rows([Request((1,), 9)] * 3, 1)
    for accepted in range(DRAFTS + 1):
        true = [tokens[b, s : s + accepted + 1] for b, s in enumerate(start)]
        tried = [
            np.concatenate([t, (tokens[b, s : s + DRAFTS] + 1) % 256])[: DRAFTS + 1]
            for b, (s, t) in enumerate(zip(start, true, strict=True))
        ]
        never = world.advance(world.at(start), true).cache
        cache = world.at(start)
        token = np.array([t[0] for t in true], np.int32)
        cache = world.drafts(small.params, cache, rows | {"token": token}).cache
        cache = world.advance(cache, tried).cache
        cache = rollback(cache, jnp.asarray(start) + accepted + 1)
        np.testing.assert_array_equal(cache["position"], never["position"])
        for b, s in enumerate(start):
            for kept, wanted in zip(
                readable(row_of(cache, b), s + accepted + 1, model.config),
                readable(row_of(never, b), s + accepted + 1, model.config),
                strict=True,
            ):
                np.testing.assert_array_equal(kept, wanted)


def test_the_first_proposal_is_the_models_own_draft(small, world):
    """The block alone, over the cache, says what the full pass says of the same token."""
    start = (3, 127, 200)
    cache = world.at(start)
    rows = request_rows([Request((1,), 9)] * 3, 1)
    rows["token"] = np.array([world.tokens[b, s] for b, s in enumerate(start)], np.int32)
    proposal = world.drafts(small.params, cache, rows)
    for b, s in enumerate(start):
        expected = np.asarray(world.full.draft_logits[b, s])
        found = np.asarray(proposal.log_probability[b, 0])
        # Other shapes sum in another order: float32 roundings of logits of size about 1.
        np.testing.assert_allclose(found - found.max(), expected - expected.max(), rtol=0, atol=2e-5)
        assert int(proposal.tokens[b, 0]) == int(np.argmax(expected))


@pytest.mark.parametrize("options", [(1.0, 1.0, 0, 0.0), (0.7, 0.8, 0, 0.0), (1.5, 1.0, 3, 0.0)])
def test_sampled_output_is_distributed_as_without_drafts(options):
    """Two proposals from other distributions than the model's: each kept or replaced token follows the model's."""
    count, vocab = 40000, 6
    rng = np.random.default_rng(1)
    target = rng.normal(size=(3, vocab)).astype(np.float32) * 1.5
    draft = (0.5 * target[:2] + rng.normal(size=(2, vocab))).astype(np.float32)
    sampling = Sampling.of([(*options, 5, stream) for stream in range(count)])
    steps = jnp.zeros(count, jnp.int32)

    @jax.jit
    def run():
        from deepseek_v4.sampling import DRAFT, noise, pick

        rows = [jnp.broadcast_to(d, (count, vocab)) for d in draft]
        weights = [tempered(row, sampling) for row in rows]
        drawn = [pick(w, noise(sampling, steps + i, DRAFT, vocab)) for i, w in enumerate(weights)]
        proposal = Proposal(jnp.stack(drawn, 1), jnp.stack(weights, 1), {})
        logits = jnp.broadcast_to(target, (count, 3, vocab))
        return verify(logits, proposal, sampling, steps)

    tokens, number = map(np.asarray, run())
    assert set(number) == {1, 2, 3}
    one = Sampling.of([(*options, 0, 0)])
    for place in range(3):
        # The logits do not depend on what came before here, so neither does any token of the output.
        expected = np.asarray(jax.nn.softmax(tempered(target[place][None], one)))[0].astype(np.float64)
        drawn = tokens[number > place, place]
        counts = np.bincount(drawn, minlength=vocab)
        assert not counts[expected == 0].any()
        wanted = expected[expected > 0] * len(drawn)
        statistic = np.sum((counts[expected > 0] - wanted) ** 2 / wanted)
        freedom = len(wanted) - 1
        # Five standard deviations of the chi-square statistic above its mean: one false alarm in about 10^5.
        assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


def test_equal_distributions_accept_everything_and_disjoint_ones_nothing():
    count = 100
    sampling = Sampling.of([(1.0, 1.0, 0, 0.0, 5, stream) for stream in range(count)])
    steps = jnp.zeros(count, jnp.int32)
    same = jnp.broadcast_to(jnp.asarray([0.0, 1.0, -1.0, -jnp.inf]), (count, 1, 4))
    drawn = jnp.asarray(np.arange(count)[:, None] % 3, jnp.int32)
    finite = jnp.where(jnp.isfinite(same), same, -1e30)
    tokens, number = verify(jnp.repeat(finite, 2, axis=1), Proposal(drawn, same, {}), sampling, steps)
    assert (np.asarray(number) == 2).all()
    np.testing.assert_array_equal(tokens[:, :1], drawn)
    other = jnp.broadcast_to(jnp.asarray([-1e30, -1e30, -1e30, 0.0]), (count, 2, 4))
    tokens, number = verify(other, Proposal(drawn, same, {}), sampling, steps)
    assert (np.asarray(number) == 1).all()
    assert (np.asarray(tokens[:, 0]) == 3).all()


def test_models_that_cannot_draft_say_so(small):
    config = small.config
    without = dataclasses.replace(config, drafter=None, num_nextn_predict_layers=0, compress_ratios=config.layer_ratios)
    with pytest.raises(ValueError, match="no MTP block to draft with"):
        check_drafts(Model(without), 2)
    dspark = dataclasses.replace(config, drafter="dspark", compress_ratios=(*config.layer_ratios, 0, 0, 0))
    with pytest.raises(ValueError, match="DSpark drafter, whose structure is not documented"):
        check_drafts(Model(dspark), 2)
    check_drafts(Model(without), 0)
    with pytest.raises(ValueError, match="expected 0 or more"):
        check_drafts(small.model, -1)
