"""The output file: results as they come, interruptions at any byte, and files that belong to something else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.requests import Line
from deepseek_v4.results import ResultFile, ResultsError

SETTINGS = {"seed": 0, "temperature": 1.0}


def make_lines(count, text="line"):
    return [Line(i, i + 1, f"{text} {i}") for i in range(count)]


def record(index, reason="stop"):
    return {"index": index, "token_ids": [index, 1], "text": f"tëxt\u2028 {index}", "finish_reason": reason}


def read(path):
    return [json.loads(row) for row in path.read_bytes().split(b"\n")[:-1]]


def whole(count):
    return [record(i) for i in range(count)]


@settings(deadline=None)
@given(order=st.permutations(range(7)))
def test_results_are_written_as_they_come_and_sorted_at_the_end(tmp_path_factory, order):
    path = tmp_path_factory.mktemp("results") / "out.jsonl"
    with ResultFile(path, make_lines(7), SETTINGS) as results:
        for done, index in enumerate(order, start=1):
            results.add(record(index))
            assert read(path) == [record(i) for i in order[:done]]
    assert read(path) == whole(7)


@settings(deadline=None)
@given(order=st.permutations(range(6)), stop=st.integers(0, 6), torn=st.integers(0, 60), more=st.integers(0, 2))
def test_any_interruption_can_be_resumed(tmp_path_factory, order, stop, torn, more):
    path = tmp_path_factory.mktemp("results") / "out.jsonl"
    with ResultFile(path, make_lines(6), SETTINGS) as results:
        for index in order[:stop]:
            results.add(record(index))
    data = path.read_bytes()
    kept = data[: len(data) - torn]  # the file system lost the end
    path.write_bytes(kept)
    survived = {json.loads(row)["index"] for row in kept.split(b"\n")[:-1]}
    with ResultFile(path, make_lines(6 + more), SETTINGS) as results:
        assert results.finished == survived
        for index in reversed(range(6 + more)):
            if index not in survived:
                results.add(record(index))
    assert read(path) == whole(6 + more)


def test_a_file_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(ResultsError, match="nothing says which input"):
        ResultFile(path, make_lines(1), SETTINGS)
    assert path.read_text() == "precious"


@pytest.fixture
def begun(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, make_lines(3), SETTINGS) as results:
        results.add(record(0))
    return path


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        (make_lines(3, "other"), SETTINGS, "request 0 is a different line"),
        (make_lines(2), SETTINGS, "it had 3 requests, now 2"),
        (make_lines(3), SETTINGS | {"seed": 1}, "begun with seed 0, now it is 1"),
        (make_lines(3), {"seed": 0}, "begun with temperature 1.0, now it is None"),
    ],
)
def test_results_of_another_run_are_refused_and_kept(begun, lines, settings, said):
    before = begun.read_bytes()
    with pytest.raises(ResultsError) as caught:
        ResultFile(begun, lines, settings)
    assert said in str(caught.value)
    assert begun.read_bytes() == before


@pytest.mark.parametrize("row", ["nonsense", "{}", '{"index": 9, "finish_reason": "stop"}', json.dumps(record(0))])
def test_a_changed_file_is_refused(begun, row):
    with begun.open("a") as file:
        file.write(row + "\n")
    with pytest.raises(ResultsError, match=":2: "):
        ResultFile(begun, make_lines(3), SETTINGS)


def test_a_file_without_its_run_is_refused(begun):
    begun.with_name("out.jsonl.run.json").unlink()
    with pytest.raises(ResultsError, match="nothing says which input"):
        ResultFile(begun, make_lines(3), SETTINGS)


def test_resuming_before_anything_was_written_is_a_start(tmp_path):
    with ResultFile(tmp_path / "new" / "out.jsonl", make_lines(1), SETTINGS) as results:
        assert results.finished == set()


def test_failures_are_counted_over_all_runs(begun):
    with ResultFile(begun, make_lines(3), SETTINGS) as results:
        results.add(record(1, "error"))
        assert results.failed == 1
    with ResultFile(begun, make_lines(3), SETTINGS) as results:
        assert results.failed == 1
        with pytest.raises(ValueError, match="has a result already"):
            results.add(record(1))
