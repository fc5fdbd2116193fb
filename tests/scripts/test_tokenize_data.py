"""scripts/tokenize_data.py: the arrays it writes are the documents that training would have read itself."""

import json

import numpy as np
import pytest

from deepseek_v4.data import DataConfig, open_data
from deepseek_v4.default_model import CONFIG_DIRECTORY
from deepseek_v4.tokenizer import Tokenizer

TEXT = json.dumps({"text": "It is a truth universally acknowledged"})
CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})


@pytest.fixture(scope="module")
def tokenize(script):
    module = script("tokenize_data")
    return lambda source, output, *more: module.main(
        ["--checkpoint", str(CONFIG_DIRECTORY), "--input", str(source), "--output", str(output), *more]
    )


def data(path):
    config = DataConfig((str(path),), sequence_length=32, batch_size=2)
    return open_data(config, Tokenizer.from_file(CONFIG_DIRECTORY), 4096, 0, 1)


@pytest.mark.parametrize("lines", [[TEXT, CHAT, TEXT], [TEXT]], ids=["chat and text", "text"])
def test_arrays_are_the_same_data(tokenize, tmp_path, lines):
    source, output = tmp_path / "a.jsonl", tmp_path / "out" / "a.npy"
    output.parent.mkdir()
    np.save(output.with_name("a.targets.npy"), np.zeros(3, bool))  # of an earlier run
    source.write_text("\n".join(lines))
    assert tokenize(source, output) == 0
    assert {path.name for path in output.parent.iterdir()} == {"a.npy", "a.offsets.npy"} | (
        {"a.targets.npy"} if CHAT in lines else set()
    )
    assert isinstance(np.load(output, mmap_mode="r"), np.memmap)
    assert data(output).restore(data(source).state(7)) == 7
    assert data(output).statistics == data(source).statistics


def test_bad_lines(tokenize, tmp_path, capsys):
    source, output = tmp_path / "a.jsonl", tmp_path / "a.npy"
    source.write_text(f"{TEXT}\n{{}}\n{TEXT}\n")
    assert tokenize(source, output) == 1
    assert f"{source}:2: expected exactly one of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert tokenize(source, output, "--on-bad", "skip") == 0
    error = capsys.readouterr().err
    assert f"left out {source}:2: " in error
    assert "2 documents, 1 bad" in error
    assert tokenize(output, output) == 1
    assert "is tokenised already" in capsys.readouterr().err
