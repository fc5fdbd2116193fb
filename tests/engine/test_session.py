"""A run over a file, killed anywhere: nothing done is done again or changed, what was in flight goes on."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.engine import Request, TokenLogprob, Update
from deepseek_v4.engine.session import Session, read_tasks
from deepseek_v4.engine.token_log import TokenLog

SETTINGS = {"seed": 0}
DEFAULTS = {"max_new_tokens": 9}
LINES = [
    {"token_ids": [3, 1, 4]},
    {"token_ids": [1, 5], "max_new_tokens": 1},
    {"token_ids": []},
    {"token_ids": [9, 2, 6], "logprobs": 1},
    {"token_ids": [5], "max_new_tokens": 5, "logprobs": 0},
    {"token_ids": [3, 5], "stop_ids": [77]},
]


class Killed(Exception):
    pass


class FakeEngine:
    """Answers as an engine does, in rounds of up to two tokens: token k of a request is a function of it and of k.

    ``left`` updates are given before the process dies. ``work`` counts the tokens that were generated.
    """

    def __init__(self, left=10**9):
        self.left = left
        self.work = 0
        self.asked = []

    def run(self, requests, interrupted=None):
        assert all(isinstance(request, Request) for request in requests)
        self.asked = requests
        waiting = {place: len(request.generated) for place, request in enumerate(requests)}
        while waiting:
            for place in list(waiting):
                request, count = requests[place], waiting[place]
                update = answer(request, place, count)
                if self.left == 0:
                    raise Killed
                self.left -= 1
                self.work += len(update.token_ids)
                waiting[place] = count + len(update.token_ids)
                if update.finish_reason:
                    del waiting[place]
                yield update


def answer(request, place, count):
    tokens = [sum(request.token_ids) * 100 + k for k in range(count, min(count + 2, request.max_new_tokens))]
    reason, stopped_by = ("length" if count + len(tokens) == request.max_new_tokens else None), None
    if request.stop_ids and count + len(tokens) >= 4:
        tokens[-1], reason, stopped_by = 77, "stop", 77
    scores = None
    if request.logprobs is not None:
        scores = tuple(TokenLogprob(-0.1 * t, ((t, -0.5),) * request.logprobs) for t in tokens)
    return Update(place, tuple(tokens), reason, scores, stopped_by)


def run(directory, engine, lines=LINES):
    source = directory / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read, tasks = read_tasks(source, 100, None, 64, DEFAULTS)
    session = Session(directory / "out.jsonl", read, tasks, SETTINGS, None)
    try:
        for _ in session.run(engine):
            pass
    except Killed:
        return None
    session.__exit__(None, None, None)
    return session


def rows(directory):
    """The results as (index, line), without the directory that errors name."""
    lines = (directory / "out.jsonl").read_text().replace(str(directory), "DIR").splitlines()
    return [(json.loads(line)["index"], line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert run(directory, FakeEngine()).failed == 1
    assert sorted(p.name for p in directory.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]
    return rows(directory)


def test_results_are_complete_and_in_order(whole):
    found = [json.loads(line) for _, line in whole]
    assert [row["index"] for row in found] == list(range(6))
    assert [row["finish_reason"] for row in found] == ["length", "length", "error", "length", "length", "stop"]
    assert "token_ids: empty" in found[2]["error"]
    assert [len(row["token_ids"]) for row in found] == [9, 1, 0, 9, 5, 4]
    assert found[3]["logprobs"][0] == {"logprob": -170.0, "top": [[1700, -0.5]]}
    assert found[4]["logprobs"][4] == {"logprob": pytest.approx(-50.4), "top": []}


@settings(deadline=None, max_examples=150)
@given(kills=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40), st.integers(0, 40)), max_size=4))
def test_any_kills_lead_to_the_same_results(tmp_path_factory, whole, kills):
    """Killed after so many updates, with so many bytes of results and log not having reached the disk."""
    directory = tmp_path_factory.mktemp("kills")
    for left, lost_results, lost_log in kills:
        ended = run(directory, FakeEngine(left))
        if ended is not None:
            break
        assert set(rows(directory)) <= set(whole)
        for name, lost in (("out.jsonl", lost_results), ("out.jsonl.tokens", lost_log)):
            data = (directory / name).read_bytes()
            (directory / name).write_bytes(data[: max(len(data) - lost, 0)])
    assert run(directory, FakeEngine()) is not None
    assert rows(directory) == whole
    assert not (directory / "out.jsonl.tokens").exists()


@pytest.mark.parametrize("left", range(0, 18, 3))
def test_nothing_that_was_logged_is_generated_again(tmp_path, whole, left, monkeypatch):
    monkeypatch.setattr(TokenLog.__init__, "__kwdefaults__", {"interval": 0.0})
    first, second = FakeEngine(left), FakeEngine()
    run(tmp_path, first)
    run(tmp_path, second)
    assert first.work + second.work == sum(len(json.loads(line)["token_ids"]) for _, line in whole)
    assert rows(tmp_path) == whole


def test_a_log_of_other_settings_or_other_lines_is_not_used(tmp_path):
    log = TokenLog(tmp_path / "log", {"seed": 0}, {0: "a", 1: "b"}, interval=0)
    log.add(0, Update(0, (1, 2)))
    log.add(1, Update(1, (3,)))
    log.flush()
    log.close()
    again = TokenLog(tmp_path / "log", {"seed": 0}, {0: "a", 1: "changed", 2: "new"})
    assert {i: p.token_ids for i, p in again.progress.items()} == {0: [1, 2]}
    again.close()
    assert TokenLog(tmp_path / "log", {"seed": 1}, {0: "a"}).progress == {}


def test_a_log_does_not_grow_with_restarts(tmp_path):
    for _ in range(3):
        log = TokenLog(tmp_path / "log", {}, {0: "a"}, interval=0)
        log.add(0, Update(0, (1,), logprobs=(TokenLogprob(-1.0, ((4, -0.5),)),)))
        log.close()
    log = TokenLog(tmp_path / "log", {}, {0: "a"})
    assert log.progress[0].token_ids == [1, 1, 1]
    assert log.progress[0].logprobs == [TokenLogprob(-1.0, ((4, -0.5),))] * 3
    assert len((tmp_path / "log").read_bytes().splitlines()) == 2


def test_requests_carry_what_was_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenLog.__init__, "__kwdefaults__", {"interval": 0.0})
    run(tmp_path, FakeEngine(6))
    later = FakeEngine()
    run(tmp_path, later)
    generated = {request.token_ids: request.generated for request in later.asked}
    assert generated[3, 1, 4] == (800, 801, 802, 803)
    assert all(dataclasses.replace(r, generated=()).generated == () for r in later.asked)
