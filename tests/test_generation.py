"""Generation against full passes of the model, and its independence of batch, chunk and mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_checkpoint import write_tiny_checkpoint

from deepseek_v4 import Execution, Model, Placement, make_mesh
from deepseek_v4.checkpoint import open_checkpoint
from deepseek_v4.generation import Generator, Request
from deepseek_v4.scoring import score

BATCH, LENGTH, CHUNK, NEW = 4, 256, 64, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def build(checkpoint, mesh=None):
    placement = None if mesh is None else Placement(make_mesh(mesh))
    model = Model(checkpoint.config, checkpoint.storage, Execution("float32", placement=placement))
    return model, checkpoint.load(model)


@pytest.fixture(scope="module")
def tiny(checkpoint):
    return build(checkpoint)


@pytest.fixture(scope="module")
def generator(tiny):
    return Generator(*tiny, batch_size=BATCH, max_length=LENGTH, prefill_chunk=CHUNK)


def make_requests(count=7, temperature=0.0, top_p=1.0, seed=0):
    """Ragged prompts: one token, around the compression ratios and the window, whole chunks, several chunks."""
    lengths = (1, 5, 63, 64, 127, 129, 200)[:count]
    rng = np.random.default_rng(4)
    prompts = [tuple(int(t) for t in rng.integers(3, 4000, length)) for length in lengths]
    return [Request(p, NEW, temperature, top_p, seed, stream) for stream, p in enumerate(prompts)]


def collect(generator, requests):
    """(tokens, finish_reason) of each request."""
    tokens, reasons = [[] for _ in requests], [None] * len(requests)
    for step in generator.run(requests):
        assert reasons[step.index] is None, "a step after the end"
        tokens[step.index].extend(step.token_ids)
        reasons[step.index] = step.finish_reason
    assert None not in reasons
    return list(zip(map(tuple, tokens), reasons, strict=True))


@pytest.fixture(scope="module")
def greedy(generator):
    return collect(generator, make_requests())


@pytest.fixture(scope="module")
def sampled(generator):
    return collect(generator, make_requests(temperature=1.0, top_p=0.9, seed=7))


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
        chosen = at[np.arange(len(new)), list(new)]
        np.testing.assert_allclose(chosen, at.max(axis=-1), rtol=0, atol=2e-6)
        assert np.mean(at.argmax(axis=-1) == np.array(new)) == 1
        assert (reason, len(new)) == ("length", NEW)
    assert len({new for new, _ in greedy}) == len(greedy)


@pytest.mark.parametrize("order", [(6, 5, 4, 3, 2, 1, 0), (2, 0, 6), (4,), (1, 1, 1, 1)])
def test_tokens_do_not_depend_on_the_batch(generator, greedy, sampled, order):
    for expected, options in ((greedy, {}), (sampled, {"temperature": 1.0, "top_p": 0.9, "seed": 7})):
        requests = make_requests(**options)
        assert collect(generator, [requests[i] for i in order]) == [expected[i] for i in order]


def test_greedy_and_sampled_rows_share_a_batch(generator, greedy, sampled):
    cold, hot = make_requests(), make_requests(temperature=1.0, top_p=0.9, seed=7)
    mixed = [hot[i] if i % 2 else cold[i] for i in range(7)]
    assert collect(generator, mixed) == [sampled[i] if i % 2 else greedy[i] for i in range(7)]


def test_sampling_uses_seed_and_stream(generator, sampled):
    other_seed = collect(generator, make_requests(temperature=1.0, top_p=0.9, seed=8))
    assert all(a != b for a, b in zip(sampled, other_seed, strict=True))
    request = make_requests(temperature=1.0)[1]
    rows = collect(generator, [dataclasses.replace(request, stream=stream) for stream in range(4)])
    assert len(set(rows)) == 4


def test_each_row_stops_at_its_own_stop_token(tiny, greedy):
    stop = greedy[2][0][4]
    generator = Generator(*tiny, batch_size=BATCH, max_length=LENGTH, prefill_chunk=CHUNK, stop_ids=(stop,))
    for (tokens, reason), (whole, _) in zip(collect(generator, make_requests()), greedy, strict=True):
        if stop in whole:
            assert (tokens, reason) == (whole[: whole.index(stop) + 1], "stop")
        else:
            assert (tokens, reason) == (whole, "length")


def test_every_row_has_its_own_limit(generator, greedy):
    requests = [dataclasses.replace(r, max_new_tokens=i + 1) for i, r in enumerate(make_requests())]
    assert collect(generator, requests) == [(greedy[i][0][: i + 1], "length") for i in range(7)]


def test_a_chunk_size_changes_nothing(tiny, greedy):
    generator = Generator(*tiny, batch_size=BATCH, max_length=LENGTH, prefill_chunk=50)
    assert collect(generator, make_requests()) == greedy


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2"])
def test_a_mesh_changes_nothing(checkpoint, greedy, sampled, mesh):
    generator = Generator(*build(checkpoint, mesh), batch_size=3, max_length=LENGTH, prefill_chunk=CHUNK)
    assert generator.batch_size == 4
    assert collect(generator, make_requests()) == greedy
    assert collect(generator, make_requests(temperature=1.0, top_p=0.9, seed=7)) == sampled


def test_nothing_is_compiled_after_the_start(generator, tiny, greedy, sampled):
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        collect(generator, make_requests(5, temperature=0.7))
        collect(generator, make_requests(2))
        Generator(*tiny, batch_size=BATCH, max_length=LENGTH - 100, prefill_chunk=CHUNK).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_stopping_early_leaves_the_generator_usable(generator, greedy):
    run = generator.run(make_requests())
    next(run)
    run.close()
    assert collect(generator, make_requests()) == greedy


def test_logits_that_are_not_numbers_end_a_row_with_an_error(tiny):
    model, params = tiny
    broken = dict(params, shell=dict(params["shell"]))
    weight = params["shell"]["embed"]["weight"]
    broken["shell"]["embed"] = {"weight": weight.at[77].set(float("nan"))}
    generator = Generator(model, broken, batch_size=BATCH, max_length=LENGTH, prefill_chunk=CHUNK)
    requests = make_requests(3)
    poisoned = dataclasses.replace(requests[1], token_ids=(77,))
    results = collect(generator, [requests[0], poisoned, requests[2]])
    assert results[1] == ((), "error")
    healthy = collect(Generator(*tiny, batch_size=BATCH, max_length=LENGTH, prefill_chunk=CHUNK), requests)
    assert [results[0], results[2]] == [healthy[0], healthy[2]]


def test_statistics_count_tokens_and_steps(tiny):
    generator = Generator(*tiny, batch_size=BATCH, max_length=LENGTH, prefill_chunk=CHUNK)
    requests = make_requests()
    collect(generator, requests)
    statistics = generator.statistics
    assert statistics.prompt_tokens == sum(len(r.token_ids) for r in requests)
    assert statistics.new_tokens == NEW * len(requests)
    assert statistics.decode_steps == 2 * (NEW - 1)  # two batches; the first token comes with the prompt
    assert statistics.decode_rate > statistics.sequence_rate > 0


def test_bad_sizes_and_requests_are_refused(tiny, generator):
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        Generator(*tiny, batch_size=0, max_length=8)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
        Request((1,), 0)
    with pytest.raises(ValueError, match="token_ids: empty"):
        Request((), 1)
    with pytest.raises(ValueError, match="temperature"):
        Request((1,), 1, temperature=-1.0)
    too_long = Request((1,) * LENGTH, 1)
    with pytest.raises(ValueError, match="request 1: 256 prompt tokens"):
        list(generator.run([make_requests(1)[0], too_long]))


# --- scoring ---------------------------------------------------------------------------------------------------------

SEQUENCES = [request.token_ids for request in make_requests()]


@pytest.fixture(scope="module")
def scores(tiny):
    return list(score(*tiny, SEQUENCES, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True))


def assert_equal_scores(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            # Other shapes sum in another order: a few float32 roundings of logits of size about 1.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_scores_are_those_of_a_full_pass(tiny, scores):
    model, params = tiny
    padded = np.zeros((len(SEQUENCES), LENGTH), np.int32)
    for row, sequence in enumerate(SEQUENCES):
        padded[row, : len(sequence)] = sequence
    output = jax.jit(lambda p, t: model.forward(p, t, draft=True)[:2])(params, padded)
    logits, draft = (np.asarray(x, np.float64) for x in output)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, (sequence, got) in enumerate(zip(SEQUENCES, scores, strict=True)):
        size = len(sequence)
        assert got.logits.shape == (size, model.config.vocab_size)
        assert got.logprobs.shape == (size - 1,)
        assert got.mtp_logits.shape == (size - 1, model.config.vocab_size)
        assert {array.dtype for array in got} == {np.dtype(np.float32)}
        np.testing.assert_allclose(got.logits, logits[row, :size], rtol=0, atol=1e-5)
        expected = logprobs[row, np.arange(size - 1), list(sequence[1:])]
        np.testing.assert_allclose(got.logprobs, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.mtp_logits, draft[row, 1:size], rtol=0, atol=1e-5)


def test_a_draft_row_sees_the_next_token_and_no_later_one(tiny, scores):
    changed = list(SEQUENCES)
    longest = list(changed[-1])
    longest[150] = (longest[150] + 1) % 4000
    changed[-1] = tuple(longest)
    other = list(score(*tiny, changed, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True))[-1]
    same = scores[-1]
    np.testing.assert_array_equal(other.mtp_logits[:149], same.mtp_logits[:149])
    np.testing.assert_array_equal(other.logits[:150], same.logits[:150])
    assert np.all(np.any(other.mtp_logits[149:153] != same.mtp_logits[149:153], axis=-1))


@pytest.mark.parametrize(("chunk", "batch"), [(512, 7), (33, 4)])
def test_scores_do_not_depend_on_chunk_and_batch(tiny, scores, chunk, batch):
    got = score(*tiny, SEQUENCES, batch_size=batch, prefill_chunk=chunk, mtp=True)
    assert_equal_scores(list(got), scores)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=4,tensor=2"])
def test_scores_do_not_depend_on_the_mesh(checkpoint, scores, mesh):
    got = score(*build(checkpoint, mesh), SEQUENCES, batch_size=BATCH, prefill_chunk=CHUNK, mtp=True)
    assert_equal_scores(list(got), scores)


def test_scoring_refuses_what_it_cannot_do(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="sequence 1: empty"):
        list(score(model, params, [(1,), ()]))
    no_draft = dataclasses.replace(
        model.config, drafter=None, num_nextn_predict_layers=0, compress_ratios=model.config.layer_ratios
    )
    with pytest.raises(ValueError, match="no MTP block"):
        list(score(Model(no_draft), {}, [(1,)], mtp=True))
