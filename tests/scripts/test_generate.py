"""scripts/generate.py from files to files: formats, devices, bad input, interruptions."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deepseek_v4.chat import encode_messages, parse_message_from_completion_text
from deepseek_v4.engine import Engine
from deepseek_v4.engine.session import Session
from deepseek_v4.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
NEW = 10

MESSAGES = [{"role": "user", "content": "Who is Emma Woodhouse, and whom does she marry in the end?"}]
REQUESTS = [
    {"prompt": "It is a truth universally acknowledged, that a single man"},
    {"token_ids": [0, *(7 * i % 4000 + 3 for i in range(150))]},
    {"messages": MESSAGES, "thinking_mode": "chat"},
    {"token_ids": [0]},
    {"messages": MESSAGES, "thinking_mode": "thinking", "reasoning_effort": "max"},
    {"prompt": "日本 🙂"},
]


@pytest.fixture(scope="module")
def generate(script):
    return script("generate")


@pytest.fixture(scope="module")
def tokenizer(hf_checkpoint):
    return Tokenizer.from_file(hf_checkpoint)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def flags(checkpoint, source, output, /, **changes):
    """A command line whose shapes, and so compiled programs, are the same for every test (and in test_generation)."""
    options = {
        "checkpoint": checkpoint,
        "input": source,
        "output": output,
        "max_new_tokens": NEW,
        "dtype": "float32",
        "prefill_chunk": 64,
        "batch_size": 4,
        "mesh": "data=2,expert=2,tensor=2",
    } | changes
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [] if value is None else [flag, str(value)]
    return arguments


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("in") / "prompts.jsonl", REQUESTS)


@pytest.fixture(scope="module")
def finished(generate, orbax_checkpoint, source, tmp_path_factory):
    """The results of REQUESTS from the Orbax checkpoint on eight devices."""
    output = tmp_path_factory.mktemp("out") / "out.jsonl"
    assert generate.main(flags(orbax_checkpoint, source, output)) == 0
    return output


def test_results_have_the_documented_form(finished, tokenizer):
    rows = read(finished)
    assert [row["index"] for row in rows] == list(range(len(REQUESTS)))
    for row, request in zip(rows, REQUESTS, strict=True):
        ids = row["token_ids"]
        if row["finish_reason"] == "stop":
            assert ids.index(1) == len(ids) - 1 < NEW
            assert row["text"] == tokenizer.decode(ids[:-1])
        else:
            assert row["finish_reason"] == "length"
            assert 1 not in ids
            assert len(ids) == NEW
            assert row["text"] == tokenizer.decode(ids)
        keys = {"index", "token_ids", "text", "finish_reason"}
        assert set(row) == keys | ({"message"} if "messages" in request else set())
        if "messages" in request:
            mode = request["thinking_mode"]
            assert row["message"] == parse_message_from_completion_text(tokenizer.decode(ids), mode, strict=False)


def test_one_device_from_the_hugging_face_directory_gives_the_same_bytes(hf_checkpoint, source, finished, tmp_path):
    arguments = flags(hf_checkpoint, source, tmp_path / "out.jsonl", mesh=None, simulate_devices=1)
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "one device" in done.stderr
    assert "per chip" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == finished.read_bytes()


def test_bad_lines_fail_alone(generate, orbax_checkpoint, finished, tmp_path, capsys):
    bad = ["{", {"prompt": ""}, {"token_ids": [0, 4096]}, {"token_ids": [0] * 4090}, {"messages": [{"role": "x"}]}]
    said = ["not valid JSON", "prompt: empty", "4096 is outside", "the limit is 4096", "messages:"]
    rows = [row for pair in zip(REQUESTS, [*bad, "\n"], strict=True) for row in pair]
    source = write(tmp_path / "mixed.jsonl", rows)
    assert generate.main(flags(orbax_checkpoint, source, tmp_path / "out.jsonl")) == 1
    results = read(tmp_path / "out.jsonl")
    assert [row["index"] for row in results] == list(range(11))
    for expected, row in zip(read(finished), results[::2], strict=True):
        assert row == expected | {"index": row["index"]}
    errors = capsys.readouterr().err
    for number, text, row in zip(range(2, 12, 2), said, results[1::2], strict=True):
        assert (row["finish_reason"], row["token_ids"]) == ("error", [])
        assert f"mixed.jsonl:{number}: " in row["error"]
        assert text in row["error"]
        assert row["error"] in errors


def test_strict_input_refuses_to_start(generate, orbax_checkpoint, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [REQUESTS[0], "{", {"prompt": ""}])
    assert generate.main(flags(orbax_checkpoint, source, tmp_path / "out.jsonl", strict_input=True)) == 1
    assert not (tmp_path / "out.jsonl").exists()
    errors = capsys.readouterr().err
    assert "in.jsonl:2: " in errors
    assert "in.jsonl:3: " in errors


def test_an_interrupted_run_is_continued_by_the_same_command(
    generate, orbax_checkpoint, source, finished, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out.jsonl"
    whole = Session.take

    def interrupted(self, index, update):
        whole(self, index, update)
        if update.finish_reason is not None and len(read(output)) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "take", interrupted)
    assert generate.main(flags(orbax_checkpoint, source, output)) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    expected = read(finished)
    before = read(output)
    assert 2 <= len(before) < len(expected)
    assert all(row == expected[row["index"]] for row in before)
    monkeypatch.undo()

    assert generate.main(flags(orbax_checkpoint, source, output, seed=1)) == 1
    assert "begun with seed 0" in capsys.readouterr().err
    assert read(output) == before

    output.write_bytes(output.read_bytes()[:-9])  # as if killed in the middle of a write
    assert generate.main(flags(orbax_checkpoint, source, output)) == 0
    assert output.read_bytes() == finished.read_bytes()
    assert f"{len(before) - 1} of 6 requests were finished earlier" in capsys.readouterr().err
    assert generate.main(flags(orbax_checkpoint, source, output)) == 0  # nothing left to do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_lines_may_say_how_they_are_answered(generate, orbax_checkpoint, finished, tokenizer, tmp_path):
    expected = read(finished)
    word = tokenizer.decode(expected[0]["token_ids"][:4])[-3:]
    rows = [
        REQUESTS[0] | {"max_new_tokens": 3},
        REQUESTS[1] | {"temperature": 1.0, "seed": 5, "top_k": 20, "min_p": 0.01},
        REQUESTS[0] | {"stop": [word]},
        REQUESTS[0] | {"top_p": 7},
        REQUESTS[2] | {"stop_ids": expected[2]["token_ids"][5:6]},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    assert generate.main(flags(orbax_checkpoint, source, tmp_path / "out.jsonl")) == 1
    short, sampled, stopped, wrong, by_id = read(tmp_path / "out.jsonl")
    assert short["token_ids"] == expected[0]["token_ids"][:3]
    assert sampled["token_ids"] != expected[1]["token_ids"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == expected[0]["text"].partition(word)[0]
    assert "in.jsonl:4: top_p: expected a number in (0, 1]" in wrong["error"]
    assert by_id["finish_reason"] == "stop"
    assert by_id["token_ids"] == expected[2]["token_ids"][: len(by_id["token_ids"])]


def test_a_prompt_is_streamed(generate, orbax_checkpoint, finished, tokenizer, capsys):
    prompt = REQUESTS[0]["prompt"]
    options = {"input": None, "output": None, "prompt": prompt}
    assert generate.main(flags(orbax_checkpoint, None, None, **options)) == 0
    captured = capsys.readouterr()
    assert captured.out == prompt + read(finished)[0]["text"] + "\n"
    assert "tokens/s per chip" in captured.err
    assert "tokens/s per sequence" in captured.err


def test_a_prompt_can_be_a_chat_message(generate, orbax_checkpoint, finished, capsys):
    options = {"input": None, "output": None, "prompt": MESSAGES[0]["content"], "prompt_mode": "chat"}
    assert generate.main(flags(orbax_checkpoint, None, None, **options)) == 0
    assert capsys.readouterr().out == read(finished)[2]["text"] + "\n"
    assert encode_messages(MESSAGES, thinking_mode="chat").count("Emma") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": None, "output": None}, "give either --prompt or --input"),
        ({"prompt": "x"}, "give either --prompt or --input"),
        ({"output": None}, "--input and --output go together"),
        ({"input": "absent.jsonl"}, "absent.jsonl: cannot be read"),
        ({"checkpoint": "absent"}, "absent: no such directory"),
        ({"mesh": "data=3"}, "mesh data=3,expert=1,tensor=1 needs 3 devices, found 8"),
        ({"mesh": "tensor=8"}, "does not fit this model"),
        ({"expert_precision": "fp8"}, "no rows travel to experts without expert-parallel"),
        ({"mesh": "rows=8"}, "bad part 'rows=8'"),
        ({"simulate": "kv,everything"}, "unknown 'everything'"),
        ({"temperature": -1}, "temperature: expected"),
        ({"top_p": 0}, "top_p: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"max_new_tokens": 0}, "--max-new-tokens: expected at least 1"),
        ({"batch_size": 0}, "--batch-size: expected at least 1"),
    ],
)
def test_bad_flags_are_explained(generate, orbax_checkpoint, source, tmp_path, capsys, changes, said):
    output = tmp_path / "out.jsonl"
    assert generate.main(flags(orbax_checkpoint, source, output, **changes)) == 1
    assert said in capsys.readouterr().err
    assert not output.exists()


def test_memory_that_runs_out_is_explained_with_numbers_that_fit(
    generate, orbax_checkpoint, source, tmp_path, monkeypatch, capsys
):
    def exhausted(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(Engine, "compile", exhausted)
    monkeypatch.setattr(generate, "device_limit", lambda: 2**30)
    assert generate.main(flags(orbax_checkpoint, source, tmp_path / "out.jsonl")) == 1
    said = capsys.readouterr().err
    assert "out of device memory: per device, parameters take" in said
    assert "there would be room for" in said
    monkeypatch.setattr(generate, "device_limit", lambda: 1000)
    assert generate.main(flags(orbax_checkpoint, source, tmp_path / "out.jsonl")) == 1
    assert "not one sequence would fit" in capsys.readouterr().err


def test_max_length_is_the_context(generate, orbax_checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"token_ids": [0] * 91}])
    output = tmp_path / "out.jsonl"
    assert generate.main(flags(orbax_checkpoint, source, output, max_length=100)) == 1
    assert "91 prompt tokens + 10 new tokens = 101, the limit is 100" in read(output)[0]["error"]
