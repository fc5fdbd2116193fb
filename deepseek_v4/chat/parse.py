"""From the text of a completion back to an assistant message.

There is one grammar for tool calls, `_tool_calls`, which yields each call as soon as it is finished. The
strict parser takes all of them or raises; the lenient one keeps what came before the first defect.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from deepseek_v4.chat.errors import ChatError, ChatFormatError, MessageTypeError, ToolCallFormatError
from deepseek_v4.chat.tokens import BOS, DSML, EOS, THINK_END, THINK_START, TOOL_CALLS_END, is_thinking

# What each kind of text ends at. The ">" of most tags is left out: what follows a tag is checked with it.
_BLOCK_TAG = f"<{DSML}tool_calls"
_BLOCK_START = f"\n\n{_BLOCK_TAG}"
_INVOKE_START = f"<{DSML}invoke"
_INVOKE_END = f"</{DSML}invoke"
_PARAMETER_START = f"<{DSML}parameter"
_PARAMETER_END = f"/{DSML}parameter"
_AFTER_TAG = ">\n"

_INVOKE_NAME = re.compile(r' name="(.*)">\n{1,2}', re.DOTALL)
_PARAMETER_HEAD = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)

# Tokens that structure a turn and so cannot be part of its text.
_RESERVED = (BOS, EOS, THINK_START, THINK_END, DSML)
_DSML_TAGS = (f"<{DSML}", f"</{DSML}")


def parse_message_from_completion_text(text: str, thinking_mode: str, strict: bool = True) -> dict[str, Any]:
    """Parse what the model wrote after a prompt of `encode_messages` into an assistant message.

    The opening `<think>` belongs to the prompt, so in thinking mode `text` begins with the reasoning.

    Strict (the default) accepts reasoning up to `</think>` (thinking mode only), content, then EOS or a
    tool-call block; after the block EOS is optional, and nothing may follow it. A string parameter becomes a
    JSON string; the text of any other is spliced into the arguments unchecked.

    Lenient (`strict=False`) never raises because of `text`. Text that the strict parser accepts gives the
    same message. Of any other:

    * The first EOS ends the message, unless it stands inside a tool call; what follows is ignored.
    * Reasoning (thinking mode) goes up to the first `</think>`. If there is none, everything is reasoning:
      the content is empty and there are no calls, as a call that was only thought about must not be executed.
    * Content goes up to the first DSML tag, without the empty line before it. If the text just stops, an
      unfinished marker at its end is removed too, if it can be recognised: from "\\n\\n<" or "<｜" on.
      Otherwise content without EOS is complete as it is.
    * Calls are read if that first tag opens a tool-call block, and kept up to the first one that is
      unfinished (no `</｜DSML｜invoke`) or malformed. The rest of the text is ignored, as is text after
      the block.
    * Reasoning is cut at a DSML tag like content. BOS, `<think>`, `</think>` and DSML markers that remain in
      content or reasoning are removed, so that neither ever holds one of them.

    Args:
        text: the completion, EOS included if the model wrote it.
        thinking_mode: "chat" or "thinking", as given to `encode_messages`.
        strict: whether to raise on malformed or truncated text.

    Returns:
        {"role": "assistant", "content": str, "reasoning_content": str, "tool_calls": [{"type": "function",
        "function": {"name": str, "arguments": JSON text}}, ...]}. Calls carry no ids.

    Raises:
        ChatFormatError: an unknown `thinking_mode`; if strict, a structural defect: no `</think>`, no EOS,
            text after the end, or a reserved token in content or reasoning. It is an AssertionError.
        ToolCallFormatError: if strict, a defect inside a tool-call block. It is a ValueError.
        MessageTypeError: `text` is not a string. It is a TypeError.
    """
    thinking = is_thinking(thinking_mode)
    if not isinstance(text, str):
        raise MessageTypeError(f"The completion must be a string, found {type(text).__name__}.")
    if strict:
        return _parse(text, thinking)
    try:
        return _parse(text, thinking)
    except ChatError:
        return _recover(text, thinking)


class _Reader:
    """A position in a text."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def until(self, *stops: str) -> tuple[str, str | None]:
        """The text up to the first of `stops`, and which one (None: up to the end); moves behind it.

        Of stops that begin at the same place the one named first wins.
        """
        found = re.compile("|".join(map(re.escape, stops))).search(self.text, self.position)
        start, end = found.span() if found else (len(self.text), len(self.text))
        read = self.text[self.position : start]
        self.position = end
        return read, found.group() if found else None

    def at_end(self) -> bool:
        return self.position == len(self.text)


def _message(content: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _parse(text: str, thinking: bool) -> dict[str, Any]:
    reader = _Reader(text)
    reasoning = ""
    if thinking:
        reasoning, stop = reader.until(THINK_END, _BLOCK_START)
        if stop != THINK_END:
            found = "a tool-call block" if stop else "the end of the text"
            raise ChatFormatError(f"Invalid thinking format: missing {THINK_END}, found {found} first.")
    content, stop = reader.until(_BLOCK_START, EOS)
    if stop is None:
        raise ChatFormatError("Invalid format: missing EOS token; use strict=False for truncated text.")
    calls: list[dict[str, Any]] = []
    if stop == _BLOCK_START:
        calls = list(_tool_calls(reader))
        after, _ = reader.until(EOS)
        if after:
            raise ChatFormatError(f"Unexpected content after tool calls: {_shown(after)}")
    if not reader.at_end():
        raise ChatFormatError(f"Unexpected content at end: {_shown(text[reader.position :])}")
    for name, value in (("content", content), ("reasoning_content", reasoning)):
        for token in _RESERVED:
            if token in value:
                raise ChatFormatError(f"Unexpected special token '{token}' in {name}: {_shown(value)}")
    return _message(content, reasoning, calls)


def _recover(text: str, thinking: bool) -> dict[str, Any]:
    reader = _Reader(text)
    reasoning = ""
    if thinking:
        reasoning, stop = reader.until(THINK_END, EOS)
        reasoning = _plain(reasoning, unfinished=stop is None)
        if stop != THINK_END:
            return _message("", reasoning, [])
    content, stop = reader.until(_BLOCK_TAG, *_DSML_TAGS, EOS)
    if stop not in (None, EOS):
        content = content.removesuffix("\n\n")
    calls = list(_finished_calls(reader)) if stop == _BLOCK_TAG else []
    return _message(_plain(content, unfinished=stop is None), reasoning, calls)


# --- tool calls ---------------------------------------------------------------------------------------------


def _tool_calls(reader: _Reader) -> Iterator[dict[str, Any]]:
    """Read a block from behind its `<｜DSML｜tool_calls` to behind its closing tag, one call at a time."""
    while True:
        between, stop = reader.until(_INVOKE_START, TOOL_CALLS_END)
        if between != _AFTER_TAG:
            raise ToolCallFormatError(f"Tool call format error: expected {_AFTER_TAG!r} but got {_shown(between)}")
        if stop is None:
            raise ToolCallFormatError(f"Tool call format error: the text ends without {TOOL_CALLS_END}")
        if stop == TOOL_CALLS_END:
            return
        yield _tool_call(reader)


def _finished_calls(reader: _Reader) -> Iterator[dict[str, Any]]:
    """The calls of `_tool_calls` before the first defect."""
    try:
        yield from _tool_calls(reader)
    except ToolCallFormatError:
        return


def _tool_call(reader: _Reader) -> dict[str, Any]:
    """Read one call from behind its `<｜DSML｜invoke` to behind its `</｜DSML｜invoke`."""
    header, stop = reader.until(_PARAMETER_START, _INVOKE_END)
    match = _INVOKE_NAME.fullmatch(header)
    # A tag inside the name would mean that another invoke was never closed.
    if match is None or DSML in match[1]:
        raise ToolCallFormatError(f"Tool name format error: {_shown(header)}")
    name = match[1]
    arguments: dict[str, str] = {}
    while stop == _PARAMETER_START:
        parameter, _ = reader.until(_PARAMETER_END)
        key, value = _parameter(parameter)
        if key in arguments:
            raise ToolCallFormatError(f"Duplicate parameter name: {key!r} in a call of {name!r}")
        arguments[key] = value
        between, stop = reader.until(_PARAMETER_START, _INVOKE_END)
        if between != _AFTER_TAG:
            raise ToolCallFormatError(f"Parameter format error: expected {_AFTER_TAG!r} but got {_shown(between)}")
    if stop is None:
        raise ToolCallFormatError(f"Tool call format error: the call of {name!r} ends without {_INVOKE_END}>")
    members = ", ".join(f"{_json(key)}: {value}" for key, value in arguments.items())
    return {"type": "function", "function": {"name": name, "arguments": "{" + members + "}"}}


def _parameter(text: str) -> tuple[str, str]:
    """Name and JSON value of a parameter, given the text between its tags with the "<" of the closing one."""
    head = _PARAMETER_HEAD.match(text)
    if head is None or not text.endswith("<", head.end()):
        raise ToolCallFormatError(f"Parameter format error: {_shown(text)}")
    value = text[head.end() : -1]
    return head[1], _json(value) if head[2] == "true" else value


# --- recovery -----------------------------------------------------------------------------------------------


def _plain(text: str, unfinished: bool) -> str:
    """`text` up to its first DSML tag without reserved tokens, and if `unfinished` without a partial one."""
    text, tag = _Reader(text).until(*_DSML_TAGS)
    if tag:
        text = text.removesuffix("\n\n")
    text = _without_reserved(text)
    return _without_partial_marker(text) if unfinished and tag is None else text


def _without_reserved(text: str) -> str:
    """Remove reserved tokens, those that only come about by removing another included, in one pass."""
    if not any(token in text for token in _RESERVED):
        return text
    longest = max(map(len, _RESERVED))
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character in ">｜":  # the characters that reserved tokens end with
            tail = "".join(kept[-longest:])
            for token in _RESERVED:
                if tail.endswith(token):
                    del kept[-len(token) :]
                    break
    return "".join(kept)


def _without_partial_marker(text: str) -> str:
    """Remove the beginning of a marker that the end of the text cut off, from "\\n\\n<" or "<｜" on."""
    for marker, shortest in ((_BLOCK_START, 3), (_DSML_TAGS[0], 2), (_DSML_TAGS[1], 3), (EOS, 2), (BOS, 2)):
        for length in range(len(marker) - 1, shortest - 1, -1):
            if text.endswith(marker[:length]):
                return text[:-length]
    return text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shown(text: str, limit: int = 200) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
