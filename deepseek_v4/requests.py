"""Input lines of the scripts: JSONL of token ids, text or chat messages, checked before anything runs.

A line may also say how its own answer is sampled and when it ends (``SETTINGS``); what it leaves open, the command
line says.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepseek_v4.chat import ChatError, encode_messages
from deepseek_v4.tokenizer import Tokenizer

_KEYS = {
    "token_ids": frozenset({"token_ids"}),
    "prompt": frozenset({"prompt"}),
    "messages": frozenset({"messages", "thinking_mode", "reasoning_effort"}),
}

SETTINGS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "max_new_tokens": (int,),
        "temperature": (int, float),
        "top_p": (int, float),
        "top_k": (int,),
        "min_p": (int, float),
        "seed": (int,),
        "stop": (list,),
        "stop_ids": (list,),
        "logprobs": (int,),
    }
)
"""What a line may say about its own answer, and the JSON types of each: fields of ``engine.Request``."""


class RequestError(ValueError):
    """An input line that cannot be run; the message says what was expected and found."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One non-blank line of an input file: ``index`` counts them from 0, ``number`` is its line in the file from 1."""

    index: int
    number: int
    text: str

    @property
    def digest(self) -> str:
        """A fingerprint of the line's text."""
        return hashlib.sha256(self.text.encode("utf-8", errors="surrogateescape")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is to continue: its token ids, and for chat messages the mode its answer is parsed in.

    ``settings`` are the line's own, by name (see ``SETTINGS``); their ranges are checked where they are used.
    """

    token_ids: tuple[int, ...]
    thinking_mode: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_lines(path: str | Path) -> list[Line]:
    """The non-blank lines of a UTF-8 file; raises ``RequestError`` if it cannot be read or has none.

    Bytes that are not UTF-8 are kept and fail the parsing of their own line only.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    lines: list[Line] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        text = raw.decode("utf-8", errors="surrogateescape").strip()
        if text:
            lines.append(Line(len(lines), number, text))
    if not lines:
        raise RequestError(f"{path}: no requests in it; expected one JSON object per line")
    return lines


def parse_line(text: str, vocab_size: int, tokenizer: Tokenizer | None = None, *, settings: bool = False) -> Prompt:
    """The prompt that one line describes; raises ``RequestError``.

    A line is ``{"token_ids": [...]}``, ``{"prompt": "..."}`` (raw text, with a BOS token only where the tokenizer's
    config asks for one) or ``{"messages": [...], "thinking_mode": "chat" | "thinking", "reasoning_effort": ...}``
    (``thinking_mode`` is "chat" if absent), with ``settings`` also any of ``SETTINGS``. Any other key is an error: a
    misspelt option must not pass unnoticed.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RequestError("not valid JSON: nested too deeply") from None
    if not isinstance(data, Mapping):
        raise RequestError(f"expected a JSON object, found {_kind(data)}")
    given = [key for key in _KEYS if key in data]
    if len(given) != 1:
        found = " and ".join(given) or f"the keys {sorted(data)}"
        raise RequestError(f"expected exactly one of token_ids, prompt, messages; found {found}")
    known = sorted(_KEYS[given[0]] | (set(SETTINGS) if settings else set()))
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise RequestError(f"unknown key {unknown[0]!r}; beside {given[0]!r} only {known} are known")
    own = {name: _setting(name, data[name], vocab_size) for name in SETTINGS if name in data}
    return dataclasses.replace(_prompt(data, given[0], vocab_size, tokenizer), settings=own)


def _prompt(data: Mapping[str, Any], given: str, vocab_size: int, tokenizer: Tokenizer | None) -> Prompt:
    if given == "token_ids":
        return Prompt(_token_ids(data["token_ids"], vocab_size))
    if tokenizer is None:
        raise RequestError(f"{given!r} needs the checkpoint's tokenizer.json, which is missing; give token_ids")
    if given == "prompt":
        return Prompt(text_prompt(data["prompt"], vocab_size, tokenizer))
    if not isinstance(data["messages"], list) or not data["messages"]:
        raise RequestError(f"messages: expected a non-empty list, found {_kind(data['messages'])}")
    thinking_mode = data.get("thinking_mode", "chat")
    try:
        encoded = encode_messages(
            data["messages"], thinking_mode=thinking_mode, reasoning_effort=data.get("reasoning_effort")
        )
    except ChatError as error:
        raise RequestError(f"messages: {error}") from None
    return Prompt(_token_ids(_encode(tokenizer, encoded), vocab_size), thinking_mode)


def _setting(name: str, value: Any, vocab_size: int) -> Any:
    kinds: Any = SETTINGS[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = {int: "an integer", float: "a number", list: "a list"}[kinds[-1]]
        raise RequestError(f"{name}: expected {expected}, found {_kind(value)}")
    if name == "stop_ids":
        return _token_ids(value, vocab_size, name) if value else ()
    if name == "stop":
        if not all(isinstance(text, str) and text for text in value):
            raise RequestError("stop: expected a list of strings that are not empty")
        return tuple(value)
    return value


def text_prompt(text: Any, vocab_size: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids of a raw text prompt; raises ``RequestError`` if it is empty or not a string."""
    if not isinstance(text, str):
        raise RequestError(f"prompt: expected a string, found {_kind(text)}")
    if not text:
        raise RequestError("prompt: empty; give at least one character")
    return _token_ids(_encode(tokenizer, text, raw=True), vocab_size)


def check_context(prompt_length: int, max_new_tokens: int, max_length: int) -> None:
    """Raises ``RequestError`` if a prompt and what is to follow it exceed the context of ``max_length`` tokens."""
    if prompt_length + max_new_tokens > max_length:
        raise RequestError(
            f"context exceeded: {prompt_length} prompt tokens + {max_new_tokens} new tokens = "
            f"{prompt_length + max_new_tokens}, the limit is {max_length}; "
            "shorten the prompt or ask for fewer new tokens"
        )


def _encode(tokenizer: Tokenizer, text: str, raw: bool = False) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"text is not valid Unicode: {error.reason} at character {error.start}") from None
    return tokenizer.encode_prompt(text) if raw else tokenizer.encode(text)


def _token_ids(value: Any, vocab_size: int, name: str = "token_ids") -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RequestError(f"{name}: expected a list of integers, found {_kind(value)}")
    if not value:
        raise RequestError(f"{name}: empty; the model needs at least one token (a BOS token, for instance)")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise RequestError(f"{name}[{position}]: expected an integer, found {_kind(token)}")
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}[{position}]: {token} is outside the vocabulary 0 .. {vocab_size - 1}")
    return tuple(value)


def _kind(value: Any) -> str:
    if value == [] or value == "":
        return "an empty one"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"{value!r}")
