"""Input lines: what each becomes, and what is said about each way of getting one wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.chat import encode_messages
from deepseek_v4.default_model import CONFIG_DIRECTORY
from deepseek_v4.requests import RequestError, check_context, parse_line, read_lines, text_prompt
from deepseek_v4.tokenizer import Tokenizer

VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CONFIG_DIRECTORY)


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_token_ids_are_taken_as_they_are(ids):
    prompt = parse_line(json.dumps({"token_ids": ids}), VOCAB)
    assert prompt.token_ids == tuple(ids)
    assert prompt.thinking_mode is None


def test_a_prompt_is_raw_text_after_bos(tokenizer):
    prompt = parse_line('{"prompt": "Emma <think>"}', VOCAB, tokenizer)
    assert prompt.token_ids == (0, *tokenizer.encode("Emma <think>"))


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("effort", [None, "high", "max"])
def test_messages_go_through_the_chat_encoder(tokenizer, mode, effort):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Emma?"}]
    line = json.dumps({"messages": messages, "thinking_mode": mode, "reasoning_effort": effort})
    prompt = parse_line(line, VOCAB, tokenizer)
    text = encode_messages(messages, thinking_mode=mode, reasoning_effort=effort)
    assert tokenizer.decode(prompt.token_ids) == text
    assert prompt.token_ids[0] == 0
    assert prompt.thinking_mode == mode


def test_thinking_mode_is_chat_if_absent(tokenizer):
    assert parse_line('{"messages": [{"role": "user", "content": "x"}]}', VOCAB, tokenizer).thinking_mode == "chat"


MESSAGES = '"messages": [{"role": "user", "content": "x"}]'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found a list"),
        ('"text"', "expected a JSON object, found a string"),
        ("{}", "expected exactly one of token_ids, prompt, messages"),
        ('{"tokens": [1]}', "found the keys ['tokens']"),
        ('{"prompt": "a", "token_ids": [1]}', "found token_ids and prompt"),
        ('{"token_ids": [1], "thinking_mode": "chat"}', "unknown key 'thinking_mode'"),
        ('{"token_ids": []}', "token_ids: empty"),
        ('{"token_ids": 5}', "token_ids: expected a list of integers, found 5"),
        ('{"token_ids": [0, 4096]}', "token_ids[1]: 4096 is outside the vocabulary 0 .. 4095"),
        ('{"token_ids": [-1]}', "token_ids[0]: -1 is outside the vocabulary"),
        ('{"token_ids": [1.0]}', "token_ids[0]: expected an integer, found 1.0"),
        ('{"token_ids": [true]}', "token_ids[0]: expected an integer, found a boolean"),
        ('{"prompt": ""}', "prompt: empty"),
        ('{"prompt": null}', "prompt: expected a string, found null"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ("{" + MESSAGES + ', "thinking": true}', "unknown key 'thinking'"),
        ("{" + MESSAGES + ', "thinking_mode": "deep"}', "thinking_mode"),
        ("{" + MESSAGES + ', "thinking_mode": ["chat"]}', "thinking_mode"),
        ("{" + MESSAGES + ', "reasoning_effort": "low"}', "reasoning effort"),
        ('{"messages": []}', "messages: expected a non-empty list, found an empty one"),
        ('{"messages": "hi"}', "messages: expected a non-empty list, found a string"),
        ('{"messages": [1]}', "messages[0]"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": null}]}', "content"),
    ],
)
def test_bad_lines_say_what_is_wrong(tokenizer, line, said):
    with pytest.raises(RequestError) as caught:
        parse_line(line, VOCAB, tokenizer)
    assert said.lower() in str(caught.value).lower()


def test_a_line_may_bring_its_own_settings():
    own = {"max_new_tokens": 3, "temperature": 1, "top_k": 5, "stop": ["a"], "stop_ids": [7], "logprobs": 0}
    line = json.dumps({"token_ids": [1], **own})
    assert parse_line(line, VOCAB, settings=True).settings == own | {"stop": ("a",), "stop_ids": (7,)}
    with pytest.raises(RequestError, match="unknown key 'logprobs'"):
        parse_line(line, VOCAB)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected an integer, found 1.5"),
        ({"temperature": "hot"}, "temperature: expected a number, found a string"),
        ({"top_k": True}, "top_k: expected an integer, found a boolean"),
        ({"stop": "a"}, "stop: expected a list, found a string"),
        ({"stop": [""]}, "stop: expected a list of strings that are not empty"),
        ({"stop_ids": [4096]}, "stop_ids[0]: 4096 is outside the vocabulary"),
        ({"seeds": 1}, "unknown key 'seeds'"),
    ],
)
def test_bad_settings_say_what_is_wrong(setting, said):
    with pytest.raises(RequestError) as caught:
        parse_line(json.dumps({"token_ids": [1], **setting}), VOCAB, settings=True)
    assert said in str(caught.value)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(RequestError, match=r"'prompt' needs the checkpoint's tokenizer.json"):
        parse_line('{"prompt": "x"}', VOCAB)


def test_tokens_of_a_larger_tokenizer_are_refused(tokenizer):
    with pytest.raises(RequestError, match=r"outside the vocabulary 0 \.\. 9"):
        text_prompt("Emma", 10, tokenizer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["token_ids", "prompt", "messages", "thinking_mode", "reasoning_effort", "role", "content"])


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(keys, json_values, max_size=3) | st.text())
def test_no_line_raises_anything_else(tokenizer, data):
    text = data if isinstance(data, str) else json.dumps(data)
    try:
        prompt = parse_line(text, VOCAB, tokenizer)
    except RequestError:
        return
    assert prompt.token_ids
    assert all(0 <= token < VOCAB for token in prompt.token_ids)


def test_lines_are_counted_from_one_and_requests_from_zero(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\xff"}\n{"c": "\xe2\x80\xa8"}')
    lines = read_lines(path)
    assert [(line.index, line.number) for line in lines] == [(0, 1), (1, 4), (2, 5)]
    assert lines[0].text == '{"a": 1}'
    assert len({line.digest for line in lines}) == 3


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_files_without_requests_are_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"in\.jsonl: no requests"):
        read_lines(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.jsonl: cannot be read"):
        read_lines(tmp_path / "absent.jsonl")


def test_context_counts_prompt_and_new_tokens():
    check_context(90, 10, 100)
    with pytest.raises(RequestError, match=r"91 prompt tokens \+ 10 new tokens = 101, the limit is 100"):
        check_context(91, 10, 100)
