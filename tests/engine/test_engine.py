"""The engine against full passes of the model, and its independence of batch, slot, order, pieces and mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_checkpoint import write_tiny_checkpoint

from deepseek_v4 import Execution, Model, Placement, Rules, make_mesh
from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.dispatch import Exchange
from deepseek_v4.engine import Engine, Pool, Request, cache_bytes, slots_within
from deepseek_v4.tokenizer import Tokenizer

SLOTS, LENGTH, CHUNKS, NEW = 4, 256, (64, 16), 12
QUICK = {"xla_backend_optimization_level": 0}  # the same arithmetic, compiled in a third of the time
WARM = {"temperature": 1.0, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def build(checkpoint, mesh=None, **options):
    placement = None if mesh is None else Placement(make_mesh(mesh), **options)
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32", placement=placement))
    return model, checkpoint.load(model)


@pytest.fixture(scope="module")
def tiny(checkpoint):
    return build(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.from_file(checkpoint.tokenizer_path)


def make_engine(tiny, slots=SLOTS, **options):
    return Engine(*tiny, [Pool(slots, LENGTH)], **({"chunks": CHUNKS, "compiler_options": QUICK} | options))


@pytest.fixture(scope="module")
def engine(tiny):
    return make_engine(tiny)


def make_requests(count=7, **options):
    """Ragged prompts: one token, around the compression ratios and the window, whole pieces, several pieces."""
    lengths = (1, 5, 63, 64, 127, 129, 200)[:count]
    rng = np.random.default_rng(4)
    prompts = [tuple(int(t) for t in rng.integers(3, 4000, length)) for length in lengths]
    return [Request(p, NEW, stream=stream, **options) for stream, p in enumerate(prompts)]


def collect(engine, requests, **options):
    """(tokens, finish_reason) of each request."""
    tokens, reasons = [[] for _ in requests], [None] * len(requests)
    for update in engine.run(requests, **options):
        assert reasons[update.request_id] is None, "an update after the end"
        tokens[update.request_id].extend(update.token_ids)
        reasons[update.request_id] = update.finish_reason
    assert None not in reasons
    return list(zip(map(tuple, tokens), reasons, strict=True))


@pytest.fixture(scope="module")
def greedy(engine):
    """What each request gives alone, one at a time."""
    return [collect(engine, [request])[0] for request in make_requests()]


@pytest.fixture(scope="module")
def sampled(engine):
    return [collect(engine, [request])[0] for request in make_requests(**WARM)]


def test_greedy_tokens_are_the_argmax_of_one_full_pass(tiny, greedy):
    model, params = tiny
    requests = make_requests()
    tokens = np.zeros((len(requests), LENGTH), np.int32)
    for row, (request, (new, _)) in enumerate(zip(requests, greedy, strict=True)):
        sequence = request.token_ids + new
        tokens[row, : len(sequence)] = sequence
    logits = np.asarray(jax.jit(lambda p, t: model.forward(p, t).logits)(params, tokens))
    for row, (request, (new, reason)) in enumerate(zip(requests, greedy, strict=True)):
        first = len(request.token_ids) - 1
        at = logits[row, first : first + len(new)]
        # The winner of the full pass may differ only where two logits are equal to float32 rounding.
        np.testing.assert_allclose(at[np.arange(len(new)), list(new)], at.max(axis=-1), rtol=0, atol=2e-6)
        assert (reason, len(new)) == ("length", NEW)
    assert len({new for new, _ in greedy}) == len(greedy)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1, 0), (1, 1, 1, 1, 6)])
@pytest.mark.parametrize("ahead", [1, 9])
def test_tokens_do_not_depend_on_batch_slot_or_order(engine, greedy, sampled, order, ahead):
    cold, warm = make_requests(), make_requests(**WARM)
    for hot in ((), range(7), (0, 2, 5)):
        mixed = [warm[i] if i in hot else cold[i] for i in order]
        expected = [sampled[i] if i in hot else greedy[i] for i in order]
        assert collect(engine, mixed, ahead=ahead) == expected


def test_requests_join_and_leave_at_any_step(engine, greedy):
    requests = [dataclasses.replace(r, max_new_tokens=i + 2) for i, r in enumerate(make_requests())]
    requests = [*requests, *reversed(requests)]
    rng = np.random.default_rng(0)
    waiting, ids, tokens = list(enumerate(requests)), {}, {}
    while waiting or not engine.idle:
        if waiting and rng.random() < 0.5:
            place, request = waiting.pop(0)
            ids[engine.submit(request)] = place
        for update in engine.step():
            tokens.setdefault(ids[update.request_id], []).extend(update.token_ids)
    for place, request in enumerate(requests):
        expected = greedy[place if place < 7 else 13 - place][0]
        assert tuple(tokens[place]) == expected[: request.max_new_tokens]


def test_logits_are_the_same_bits_in_every_slot_and_company(tiny):
    """The decode program's own logits: seen as log-probabilities, whose bits differ if any logit's do."""
    engine = make_engine(tiny, top_logprobs=3, chunks=(64,), compiler_options=None)
    requests = make_requests(logprobs=3)

    def scores(requests, place):
        return [s for u in engine.run(requests) if u.request_id == place for s in u.logprobs]

    alone = [scores([request], 0) for request in requests]
    assert all(len(rows) == NEW for rows in alone)
    for shift in (1, 2, 3):  # another slot, other neighbours
        order = [(i + shift) % 7 for i in range(7)]
        for place, index in enumerate(order):
            assert scores([requests[i] for i in order], place) == alone[index]


def test_logprobs_are_those_of_a_full_pass(tiny):
    model, params = tiny
    engine = make_engine(tiny, top_logprobs=3, chunks=(64,), compiler_options=None)
    first, second = make_requests(2, temperature=2.0, logprobs=3)
    second = dataclasses.replace(second, logprobs=None)
    tokens, scores = [], []
    for update in engine.run([first, second]):
        if update.request_id == 0:
            tokens += update.token_ids
            scores += update.logprobs
        else:
            assert update.logprobs is None
    whole = np.asarray([first.token_ids + tuple(tokens)], np.int32)
    logits = np.asarray(jax.jit(lambda p, t: model.forward(p, t).logits)(params, whole), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        row = logprobs[len(first.token_ids) - 1 + i]
        assert score.logprob == pytest.approx(row[token], abs=1e-5)  # float32 rounding
        assert [t for t, _ in score.top] == list(np.argsort(-row)[:3])
        np.testing.assert_allclose([p for _, p in score.top], np.sort(row)[::-1][:3], rtol=0, atol=1e-5)


def test_the_pieces_change_no_token(tiny, greedy):
    assert collect(make_engine(tiny, chunks=(200, 7)), make_requests()) == greedy


def test_a_token_budget_changes_no_token_and_bounds_a_step(tiny, greedy):
    engine = make_engine(tiny, token_budget=70)
    for request in make_requests():
        engine.submit(request)
    before = 0
    while not engine.idle:
        calls = engine.statistics.prefill_calls
        engine.step()
        if engine.statistics.prefill_calls - calls > 1:
            assert engine.statistics.prompt_tokens - before <= 70
        before = engine.statistics.prompt_tokens
    assert collect(engine, make_requests()) == greedy


def test_pools_take_what_fits_them(tiny, greedy):
    engine = Engine(*tiny, [Pool(4, 256), Pool(2, 128)], chunks=(64,), compiler_options=QUICK)
    assert [pool.max_length for pool in engine.pools] == [128, 256]
    assert collect(engine, make_requests()) == greedy
    assert engine.cache_bytes == 3 * cache_bytes(engine.model, 128, 0) + 5 * cache_bytes(engine.model, 256, 0)
    caches = [state["cache"] for pool in engine._pools for state in (pool.slots, pool.staging)]
    held = sum(array.nbytes for array in jax.tree.leaves(caches))
    assert held == engine.cache_bytes


def test_slots_within_a_budget_are_exact(tiny):
    model, _ = tiny
    row = cache_bytes(model, 256, 0)
    for slots in (1, 2, 5):
        assert slots_within(model, (slots + 1) * row, 256, 0) == slots
        assert slots_within(model, (slots + 1) * row - 1, 256, 0) == slots - 1
    assert slots_within(model, row - 1, 256, 0) == 0


@pytest.mark.parametrize("rules", [Rules(), Rules.expert_parallel()], ids=["repeated", "travelling"])
def test_a_mesh_changes_nothing(checkpoint, greedy, sampled, rules):
    exchange = Exchange("dispatch", rows=64)  # several rounds for a piece of a prompt
    engine = make_engine(
        build(checkpoint, "data=2,expert=2,tensor=2", rules=rules, exchange=exchange), slots=3, chunks=(64,)
    )
    assert engine.pools[0].slots == 4
    assert collect(engine, make_requests()) == greedy
    assert collect(engine, make_requests(**WARM)) == sampled


def test_stop_tokens_are_each_requests_own(engine, greedy):
    stop = greedy[2][0][4]
    requests = [dataclasses.replace(r, stop_ids=(stop,) if i % 2 == 0 else ()) for i, r in enumerate(make_requests())]
    for i, (result, whole) in enumerate(zip(collect(engine, requests), greedy, strict=True)):
        if i % 2 == 0 and stop in whole[0]:
            assert result == (whole[0][: whole[0].index(stop) + 1], "stop")
        else:
            assert result == whole


def test_stop_strings_end_with_the_token_that_completes_them(tiny, tokenizer, greedy):
    engine = make_engine(tiny, tokenizer=tokenizer)
    requests = make_requests()
    whole = tokenizer.decode(greedy[2][0])
    stop = whole[5:9]
    requests[2] = dataclasses.replace(requests[2], stop=("never there", stop))
    results = collect(engine, [*requests, *requests])
    tokens, reason = results[2]
    assert reason == "stop"
    assert stop in tokenizer.decode(tokens)
    assert stop not in tokenizer.decode(tokens[:-1])
    assert tokens == greedy[2][0][: len(tokens)]
    for i in (0, 1, 3, 4, 5, 6):
        assert results[i] == results[i + 7] == greedy[i]
    with pytest.raises(ValueError, match="need a tokenizer"):
        make_engine(tiny).submit(requests[2])


def test_every_request_has_its_own_limit(engine, greedy):
    requests = [dataclasses.replace(r, max_new_tokens=i + 1) for i, r in enumerate(make_requests())]
    assert collect(engine, requests) == [(greedy[i][0][: i + 1], "length") for i in range(7)]


@pytest.mark.parametrize("options", [{}, WARM])
def test_what_was_generated_before_is_continued(engine, greedy, sampled, options):
    expected = sampled if options else greedy
    requests = [
        dataclasses.replace(r, generated=expected[i][0][: 1 + i]) for i, r in enumerate(make_requests(**options))
    ]
    results = collect(engine, requests)
    assert [tokens for tokens, _ in results] == [whole[1 + i :] for i, (whole, _) in enumerate(expected)]


def test_nothing_is_compiled_while_serving(engine, tiny, greedy, sampled):
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        collect(engine, make_requests(5, temperature=0.7, top_k=9))
        collect(engine, make_requests(2))
        engine.cancel(engine.submit(make_requests(1)[0]))
        engine.step()
        other = make_engine(tiny)
        other.compile()
        collect(other, make_requests(3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_stopping_early_leaves_the_engine_usable(engine, greedy):
    run = engine.run(make_requests())
    next(run)
    run.close()
    assert engine.idle
    assert collect(engine, make_requests()) == greedy


def test_cancelling_ends_one_request_alone(engine, greedy):
    requests = make_requests()
    ids = [engine.submit(request) for request in requests]
    tokens, reasons = {i: [] for i in ids}, {}
    while not engine.idle:
        for update in engine.step():
            tokens[update.request_id] += update.token_ids
            if update.finish_reason:
                reasons[update.request_id] = update.finish_reason
        for index in (1, 6):
            if len(tokens[ids[index]]) >= 3:
                engine.cancel(ids[index])
    for index, i in enumerate(ids):
        assert reasons[i] == ("cancelled" if index in (1, 6) else "length")
        assert tuple(tokens[i]) == greedy[index][0][: len(tokens[i])]
        assert len(tokens[i]) == (3 if index in (1, 6) else NEW)


def test_logits_that_are_not_numbers_end_a_request_with_an_error(tiny, greedy):
    model, params = tiny
    broken = dict(params, shell=dict(params["shell"]))
    weight = params["shell"]["embed"]["weight"]
    broken["shell"]["embed"] = {"weight": weight.at[77].set(float("nan"))}
    engine = make_engine((model, broken))
    requests = [r for r in make_requests(3) if 77 not in r.token_ids]
    assert len(requests) == 3
    poisoned = dataclasses.replace(requests[1], token_ids=(77,))
    results = collect(engine, [requests[0], poisoned, requests[2]])
    assert results[1] == ((), "error")
    assert [results[0], results[2]] == [greedy[0], greedy[2]]


def test_a_request_that_cannot_run_stops_no_other(engine, greedy):
    requests = make_requests(3)
    too_long = Request((1,) * LENGTH, 1)
    wants_more = dataclasses.replace(requests[0], logprobs=1)
    updates = list(engine.run([requests[0], too_long, wants_more, requests[1]]))
    errors = {u.request_id: u.error for u in updates if u.finish_reason == "error"}
    assert set(errors) == {1, 2}
    assert "256 prompt tokens + 1 new tokens exceed" in errors[1]
    assert "top_logprobs=None" in errors[2]
    for place, index in ((0, 0), (3, 1)):
        assert tuple(t for u in updates if u.request_id == place for t in u.token_ids) == greedy[index][0]


def test_statistics_count_tokens_and_steps(tiny):
    engine = make_engine(tiny)
    requests = make_requests()
    collect(engine, requests)
    statistics = engine.statistics
    assert statistics.prompt_tokens == sum(len(r.token_ids) for r in requests)
    assert statistics.new_tokens == NEW * len(requests)
    assert statistics.requests == statistics.first_tokens == len(requests)
    assert statistics.row_steps == (NEW - 1) * len(requests)  # the first token comes with the prompt
    assert statistics.seconds >= statistics.host_seconds > 0
    assert statistics.decode_rate > statistics.sequence_rate > 0
    assert statistics.tokens_per_step == 1


def test_bad_sizes_and_requests_are_refused(tiny):
    with pytest.raises(ValueError, match="slots: expected at least 1"):
        make_engine(tiny, slots=0)
    with pytest.raises(ValueError, match="chunks: expected at least 1"):
        make_engine(tiny, chunks=(64, 0))
    for problem, options in (
        ("max_new_tokens: expected at least 1", {"max_new_tokens": 0}),
        ("token_ids: empty", {"token_ids": ()}),
        ("temperature", {"temperature": -1.0}),
        ("top_k", {"top_k": -1}),
        ("min_p", {"min_p": 1.0}),
        ("stop_ids: at most 7", {"stop_ids": tuple(range(8))}),
        ("stop: an empty string", {"stop": ("a", "")}),
        ("logprobs", {"logprobs": -1}),
        ("leave nothing to do", {"generated": (1,) * NEW}),
    ):
        with pytest.raises(ValueError, match=problem):
            dataclasses.replace(make_requests(1)[0], **options)
