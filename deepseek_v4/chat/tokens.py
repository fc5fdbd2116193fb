"""Special tokens and fixed texts of the prompt format.

The bytes are those of the released encoder; each special token below is one entry of the tokenizer, except
that a DSML tag is `<` or `</`, the one-token marker, then ordinary text.
"""

from typing import Final

from deepseek_v4.chat.errors import ChatFormatError

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
LATEST_REMINDER: Final = "<｜latest_reminder｜>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
DSML: Final = "｜DSML｜"

TASK_TOKENS: Final = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

TOOL_CALLS_START: Final = f"<{DSML}tool_calls>"
TOOL_CALLS_END: Final = f"</{DSML}tool_calls>"

EFFORT_MAX_PREFIX: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

_TOOLS_HEAD: Final = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"{TOOL_CALLS_START}" block like the following:

{TOOL_CALLS_START}
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
{TOOL_CALLS_END}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""

_TOOLS_TAIL: Final = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)

_RESPONSE_FORMAT_HEAD: Final = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def tools_section(schemas: list[str]) -> str:
    """The section that introduces tools to the model; `schemas` are the function schemas as JSON texts."""
    return _TOOLS_HEAD + "\n".join(schemas) + _TOOLS_TAIL


def response_format_section(schema: str) -> str:
    """The section that asks for replies of one shape; `schema` is JSON."""
    return _RESPONSE_FORMAT_HEAD + schema


def parameter_tag(name: str, value: str, is_string: bool) -> str:
    """One argument of a call. `value` is inserted unescaped: raw text if `is_string`, else JSON."""
    attribute = "true" if is_string else "false"
    return f'<{DSML}parameter name="{name}" string="{attribute}">{value}</{DSML}parameter>'


def invoke_tag(name: str, parameters: list[str]) -> str:
    """One call of `parameter_tag` texts; without any, an empty line stays between the tags."""
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>"


def tool_calls_block(invokes: list[str]) -> str:
    """All calls of one assistant turn, as they follow its content; `invokes` are made by `invoke_tag`."""
    return f"\n\n{TOOL_CALLS_START}\n" + "\n".join(invokes) + f"\n{TOOL_CALLS_END}"


def is_thinking(thinking_mode: str) -> bool:
    """Whether the mode is "thinking" rather than "chat".

    Raises ChatFormatError for any other value: taking it for "chat" would silently turn thinking off.
    """
    if thinking_mode == "thinking":
        return True
    if thinking_mode == "chat":
        return False
    raise ChatFormatError(f"Invalid thinking_mode `{thinking_mode}`: expected 'chat' or 'thinking'.")
