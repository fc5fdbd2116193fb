"""From messages to the prompt text (the release ships no template; its Python encoder defines the format).

Three passes: `_merge` turns tool results and consecutive user messages into single user turns,
`_sort_results` puts tool results into the order of their calls, `_render` writes each turn. Which turn shows
its reasoning is decided in one place, `_Rules`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_v4.chat.errors import ChatFormatError, MessageTypeError, ToolArgumentsError, UnknownRoleError
from deepseek_v4.chat.tokens import (
    ASSISTANT,
    BOS,
    EFFORT_MAX_PREFIX,
    EOS,
    LATEST_REMINDER,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    invoke_tag,
    is_thinking,
    parameter_tag,
    response_format_section,
    tool_calls_block,
    tools_section,
)

Message = Mapping[str, Any]

_REASONING_EFFORTS = (None, "high", "max")

# Roles of earlier turns that survive when earlier reasoning is dropped. Rendering "direct_search_results" is
# an error, but it must not vanish silently before that.
_KEPT_ROLES = ("user", "system", "tool", "latest_reminder", "direct_search_results", "assistant")


@dataclass(frozen=True)
class _Block:
    """A piece of a user turn: what the user wrote, or (`is_result`) what the tool call `call_id` returned."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass
class _Turn:
    """One message after merging. `where` names its source in errors; only user turns have blocks."""

    role: str | None
    message: Message
    where: str
    task: str | None
    blocks: list[_Block] = field(default_factory=list)


@dataclass(frozen=True)
class _Rules:
    """What decides the thinking markers; `last_user` indexes the last user or developer turn (-1: none)."""

    thinking: bool
    drop_earlier_reasoning: bool
    last_user: int

    def asks_for_thinking(self, index: int) -> bool:
        """Whether the user or developer turn at `index` opens the assistant's thinking."""
        return self.thinking and (not self.drop_earlier_reasoning or index >= self.last_user)

    def shows_reasoning(self, index: int, previous: _Turn | None) -> bool:
        """Whether the assistant turn at `index` carries a thinking part; answers to a task never do."""
        if previous is not None and previous.task is not None:
            return False
        return self.thinking and (not self.drop_earlier_reasoning or index > self.last_user)


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """Encode a conversation in the DeepSeek-V4 prompt format, byte for byte like the released encoder.

    The input is never changed. What follows a turn depends on whether the assistant comes next. So the text
    of `context + messages` is that of `context` followed by `encode_messages(messages, context=context)` if
    no earlier reasoning is dropped, and either `messages` begins with an assistant turn or a reminder, or
    `context` ends with an assistant turn without a task. User and tool messages do not merge across
    `context`.

    Args:
        messages: OpenAI-style mappings with a "role" of system, developer, user, tool, assistant or
            latest_reminder. Known fields beside "content": "tools" and "response_format" (system, developer),
            "tool_call_id" (tool), "reasoning_content", "tool_calls" and "wo_eos" (assistant: leave the turn
            open), and "task" (one of action, query, authority, domain, title, read_url).
        thinking_mode: "thinking", or "chat", where every assistant turn begins with an empty thinking part.
        context: earlier messages whose encoding the caller already has; only what follows is returned.
        drop_thinking: in thinking mode, leave out the reasoning before the last user or developer message,
            and with it the earlier developer messages. Has no effect if any message offers tools.
        add_default_bos_token: begin with the BOS token; never done after a non-empty `context`.
        reasoning_effort: None, "high" (the same text as None), or "max" (thinking mode: a fixed instruction
            at the start of the conversation).

    Returns:
        The prompt. It ends where the model has to continue, the opening `<think>` included.

    Raises:
        ChatFormatError: unknown thinking_mode, reasoning_effort or task; empty developer message; a tool or a
            tool call without its required fields. It is an AssertionError.
        MessageTypeError: a field of the wrong type, such as None as user content. It is a TypeError.
        UnknownRoleError: a message that has to be rendered has another role. It is a NotImplementedError.
        ToolArgumentsError: tool-call arguments are JSON but not an object. It is an AttributeError.
    """
    parts = render_messages(messages, thinking_mode, context, drop_thinking, add_default_bos_token, reasoning_effort)
    return "".join(text for text, _ in parts)


def render_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> list[tuple[str, bool]]:
    """The text of `encode_messages` (same arguments and errors) in parts: [(text, written by the assistant)].

    The assistant's parts are what a model has to write: reasoning where it is shown, content, tool calls and
    EOS. What precedes a turn (`<｜Assistant｜>`, then `<think>` or `</think>`) belongs to the prompt.
    """
    thinking = is_thinking(thinking_mode)
    if reasoning_effort not in _REASONING_EFFORTS:
        raise ChatFormatError(
            f"Invalid reasoning effort: {reasoning_effort!r}. Expected None, 'high' or 'max'; "
            "to switch thinking off use thinking_mode='chat'."
        )

    earlier = _merge(context or (), "context")
    turns = earlier + _merge(messages, "messages")
    _sort_results(turns)
    first = len(earlier)

    offers_tools = any(turn.role != "user" and turn.message.get("tools") for turn in turns)
    drop = thinking and drop_thinking and not offers_tools
    if drop:
        last_user = _last_user(turns)
        keep = [index >= last_user or turn.role in _KEPT_ROLES for index, turn in enumerate(turns)]
        first = sum(keep[:first])
        turns = [turn for turn, kept in zip(turns, keep, strict=True) if kept]
    rules = _Rules(thinking, drop, _last_user(turns))

    parts = [(BOS, False)] if add_default_bos_token and not context else []
    for index in range(first, len(turns)):
        if index == 0 and thinking and reasoning_effort == "max":
            parts.append((EFFORT_MAX_PREFIX, False))
        parts.append((_render(turns, index, rules), turns[index].role == "assistant"))
        parts.append((_suffix(turns, index, rules), False))
    return parts


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


# --- merging and ordering -----------------------------------------------------------------------------------


def _merge(messages: Iterable[Message], source: str) -> list[_Turn]:
    """Turn messages into turns: tool results and user texts that follow one another become one user turn.

    A user turn with a task takes no further user text. Of a user message only content and task survive, and
    of one that is appended only its content.
    """
    if isinstance(messages, (str, Mapping)):
        raise MessageTypeError(f"{source} must be a sequence of messages, found {type(messages).__name__}.")
    turns: list[_Turn] = []
    for number, message in enumerate(messages):
        where = f"{source}[{number}]"
        if not isinstance(message, Mapping):
            raise MessageTypeError(f"{where} must be a mapping with a 'role', found {type(message).__name__}.")
        role, task = message.get("role"), _task(message, where)
        previous = turns[-1] if turns and turns[-1].role == "user" else None
        if role == "tool":
            if previous is None:
                previous = _Turn("user", message, where, task=None)
                turns.append(previous)
            previous.blocks.append(_result_block(message, where))
        elif role == "user":
            if previous is None or previous.task is not None:
                previous = _Turn("user", message, where, task)
                turns.append(previous)
            previous.blocks.append(_text_block(message, where, len(previous.blocks)))
        else:
            turns.append(_Turn(role, message, where, task))
    return turns


def _task(message: Message, where: str) -> str | None:
    task = message.get("task")
    # A list and not the dict itself: membership must not fail on an unhashable value.
    if task is not None and task not in list(TASK_TOKENS):
        raise ChatFormatError(f"Invalid task: {task!r}. {where} must have one of {list(TASK_TOKENS)} or none.")
    return task


def _text_block(message: Message, where: str, index: int) -> _Block:
    content = message.get("content", "")
    if not isinstance(content, str):
        raise MessageTypeError(
            f"sequence item {index}: expected str instance, {type(content).__name__} found "
            f"(the content of {where}, role 'user'); give the text as one string."
        )
    return _Block(content)


def _result_block(message: Message, where: str) -> _Block:
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        content = "\n\n".join(_result_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise MessageTypeError(
            f"{where} (role 'tool'): content must be a string or a list of parts, found "
            f"{type(content).__name__}; encode structured results as JSON text."
        )
    call_id = message.get("tool_call_id") or ""
    if not isinstance(call_id, str):
        raise MessageTypeError(f"{where}: tool_call_id must be a string, found {type(call_id).__name__}.")
    return _Block(content, is_result=True, call_id=call_id)


def _result_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise MessageTypeError(f"{where} must be a mapping with a 'type', found {type(part).__name__}.")
    if part.get("type") != "text":
        return f"[Unsupported {part.get('type')}]"
    text = part.get("text", "")
    if not isinstance(text, str):
        raise MessageTypeError(f"{where}: text must be a string, found {type(text).__name__}.")
    return text


def _sort_results(turns: Sequence[_Turn]) -> None:
    """Put the tool results of each user turn into the order of the calls of the assistant turn before it.

    Results keep to the slots that results occupy; a result with an unknown id sorts like the first call.
    """
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            ids = [_call_id(call) for call in _calls(turn)]
            order = {call_id: position for position, call_id in enumerate(ids) if call_id}
        elif turn.role == "user" and order:
            slots = [i for i, block in enumerate(turn.blocks) if block.is_result]
            results = sorted((turn.blocks[i] for i in slots), key=lambda block: order.get(block.call_id, 0))
            for slot, block in zip(slots, results, strict=True):
                turn.blocks[slot] = block


def _calls(turn: _Turn) -> list[Mapping[str, Any]]:
    """The tool calls of an assistant turn, each with a "function" that has a name and arguments."""
    calls = turn.message["tool_calls"]
    if not isinstance(calls, (list, tuple)):
        raise MessageTypeError(f"{turn.where}.tool_calls must be a list, found {type(calls).__name__}.")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
            raise ChatFormatError(
                f"Invalid tool call {turn.where}.tool_calls[{index}]: expected "
                "{'function': {'name': ..., 'arguments': ...}}, found " + _shown(call)
            )
        if not isinstance(function["name"], str):
            raise MessageTypeError(
                f"{turn.where}.tool_calls[{index}]: the function name must be a string, "
                f"found {type(function['name']).__name__}."
            )
    return list(calls)


def _call_id(call: Mapping[str, Any]) -> str:
    return call.get("id") or call["function"].get("id") or ""


# --- rendering ----------------------------------------------------------------------------------------------


def _render(turns: Sequence[_Turn], index: int, rules: _Rules) -> str:
    """The turn itself, without what `_suffix` puts between it and the next."""
    turn = turns[index]
    match turn.role:
        case "system":
            return _optional_text(turn, "content") + _appendices(turn)
        case "developer":
            content = _optional_text(turn, "content")
            if not content:
                raise ChatFormatError(
                    f"Invalid message for role `developer`: the content of {turn.where} must not be empty."
                )
            return USER + content + _appendices(turn)
        case "user":
            return USER + "\n\n".join(
                f"<tool_result>{block.text}</tool_result>" if block.is_result else block.text for block in turn.blocks
            )
        case "latest_reminder":
            if turn.message.get("content") is None:
                raise MessageTypeError(f"{turn.where} (role 'latest_reminder'): content is missing.")
            return LATEST_REMINDER + _optional_text(turn, "content")
        case "assistant":
            previous = turns[index - 1] if index else None
            reasoning = ""
            if rules.shows_reasoning(index, previous):
                reasoning = _optional_text(turn, "reasoning_content") + THINK_END
            calls = tool_calls_block(_invokes(turn)) if turn.message.get("tool_calls") else ""
            end = "" if turn.message.get("wo_eos") else EOS
            return reasoning + _optional_text(turn, "content") + calls + end
        case _:
            raise UnknownRoleError(
                f"Unknown role: {turn.role} ({turn.where}); expected system, developer, user, tool, "
                "assistant or latest_reminder."
            )


def _suffix(turns: Sequence[_Turn], index: int, rules: _Rules) -> str:
    """What asks for the assistant's turn, if that (or nothing, or a reminder before it) comes next."""
    turn = turns[index]
    if index + 1 < len(turns) and turns[index + 1].role not in ("assistant", "latest_reminder"):
        return ""
    if turn.task == "action":
        return ASSISTANT + (THINK_START if rules.thinking else THINK_END) + TASK_TOKENS["action"]
    if turn.task is not None:
        return TASK_TOKENS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK_START if rules.asks_for_thinking(index) else THINK_END)
    return ""


def _optional_text(turn: _Turn, name: str) -> str:
    """A text field of which None means empty."""
    value = turn.message.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MessageTypeError(
            f"{turn.where} (role '{turn.role}'): {name} must be a string, found {type(value).__name__}."
        )
    return value


def _appendices(turn: _Turn) -> str:
    """The tools and response-format sections after the text of a system or developer message."""
    text = ""
    tools = turn.message.get("tools")
    if tools:
        if not isinstance(tools, (list, tuple)):
            raise MessageTypeError(f"{turn.where}.tools must be a list, found {type(tools).__name__}.")
        for index, tool in enumerate(tools):
            if not isinstance(tool, Mapping) or "function" not in tool:
                raise ChatFormatError(
                    f"Invalid tool {turn.where}.tools[{index}]: expected "
                    "{'type': 'function', 'function': {...}}, found " + _shown(tool)
                )
        text += "\n\n" + tools_section([_json(tool["function"], f"{turn.where}.tools") for tool in tools])
    response_format = turn.message.get("response_format")
    if response_format:
        text += "\n\n" + response_format_section(_json(response_format, f"{turn.where}.response_format"))
    return text


def _invokes(turn: _Turn) -> list[str]:
    return [
        invoke_tag(call["function"]["name"], _parameters(call["function"]["arguments"], turn.where))
        for call in _calls(turn)
    ]


def _parameters(arguments: Any, where: str) -> list[str]:
    """The parameter tags of one call; arguments that are no JSON text become one named "arguments"."""
    if not isinstance(arguments, str):
        return [parameter_tag("arguments", _json(arguments, where), is_string=False)]
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):  # no JSON, an integer too long for int(), or nested too deeply
        return [parameter_tag("arguments", arguments, is_string=True)]
    if not isinstance(values, dict):
        raise ToolArgumentsError(
            f"{where}: tool-call arguments must be a JSON object, found {_shown(arguments)}; wrap the value "
            "in an object whose keys are the parameter names."
        )
    return [
        parameter_tag(name, value if isinstance(value, str) else _json(value, where), isinstance(value, str))
        for name, value in values.items()
    ]


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise MessageTypeError(f"{where}: not a JSON value: {error}") from error


def _shown(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
