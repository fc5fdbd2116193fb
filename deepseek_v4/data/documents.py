"""One document: its tokens, and which of them the model is to learn to write.

* Text: BOS in front where the tokenizer's config asks for one (``add_bos_token``, as for raw prompts) and EOS at the
  end, both by default and by choice; every token is a target.
* Chat: the text of ``deepseek_v4.chat``, which has its own BOS and EOS tokens. Targets are the tokens of assistant
  turns as a model writes them: reasoning where the encoder shows it, content, tool calls, EOS.
* Token ids: as they are, every one a target.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepseek_v4.chat import ChatError, render_messages
from deepseek_v4.tokenizer import Tokenizer


class DocumentError(ValueError):
    """A document that cannot be trained on; the message says what was expected and found."""


@dataclasses.dataclass(frozen=True)
class Document:
    """``tokens`` int32 [n], n >= 1, and ``targets`` bool [n]."""

    tokens: np.ndarray
    targets: np.ndarray


class DocumentEncoder:
    """Makes documents of texts, conversations and token ids; ``bos`` None means as the tokenizer's config says."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        bos_token_id: int,
        eos_token_id: int,
        bos: bool | None = None,
        eos: bool = True,
        thinking_mode: str = "chat",
    ):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._bos = [bos_token_id] if (tokenizer is not None and tokenizer.add_bos if bos is None else bos) else []
        self._eos = [eos_token_id] if eos else []
        self._thinking_mode = thinking_mode
        self._bytes: dict[int, int] = {}

    def line(self, text: str, kinds: tuple[str, ...]) -> Document:
        """The document of a JSONL line: an object with exactly one of ``kinds`` (text, messages, token_ids).

        Beside ``messages`` a line may have ``thinking_mode``, ``reasoning_effort`` and ``tools``; any other key is
        taken for a remark about the document and ignored. Raises ``DocumentError``.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DocumentError(f"not valid JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
            raise DocumentError(f"not valid JSON: {error}") from None
        if not isinstance(data, Mapping):
            raise DocumentError(f"expected a JSON object, found {_shown(data)}")
        given = [kind for kind in kinds if kind in data]
        if len(given) != 1:
            found = " and ".join(given) or f"the keys {sorted(data)}"
            expected = kinds[0] if len(kinds) == 1 else f"exactly one of {', '.join(kinds)}"
            raise DocumentError(f"expected {expected}; found {found}")
        match given[0]:
            case "text":
                return self.text(data["text"])
            case "messages":
                return self.chat(data)
            case _:
                return self.token_ids(data["token_ids"])

    def text(self, text: Any) -> Document:
        """The document of a text; raises ``DocumentError`` if it is blank or no string."""
        if not isinstance(text, str):
            raise DocumentError(f"text: expected a string, found {_shown(text)}")
        if not text.strip():
            raise DocumentError("text: empty")
        tokens = self._encode(text)
        tokens = tokens if tokens[:1] == self._bos else self._bos + tokens
        return self._document(tokens if tokens[-1:] == self._eos else tokens + self._eos, None)

    def chat(self, line: Mapping[str, Any]) -> Document:
        """The document of ``line["messages"]``, with the tools in ``line`` offered by its first message.

        A token is a target if all of its bytes lie in an assistant turn: only without a special token between two
        turns can one lie in both. Raises ``DocumentError`` if the chat encoder refuses the messages, or if there is
        no assistant turn.
        """
        messages = line["messages"]
        if not isinstance(messages, list) or not messages:
            raise DocumentError(f"messages: expected a non-empty list, found {_shown(messages)}")
        if line.get("tools"):
            messages = _with_tools(messages, line["tools"])
        try:
            parts = render_messages(
                messages,
                thinking_mode=line.get("thinking_mode", self._thinking_mode),
                reasoning_effort=line.get("reasoning_effort"),
            )
        except ChatError as error:
            raise DocumentError(f"messages: {error}") from None
        text = "".join(part for part, _ in parts)
        tokens = self._encode(text)
        lengths = np.array([len(part.encode("utf-8")) for part, _ in parts])
        written = np.repeat([by_assistant for _, by_assistant in parts], lengths)
        ends = np.cumsum([self._length(token) for token in tokens])
        if ends[-1] != len(written):
            raise DocumentError("messages: the tokens do not spell the text; the tokenizer must keep every byte")
        ours = np.concatenate([[0], np.cumsum(written)])
        starts = np.concatenate([[0], ends[:-1]])
        targets = ours[ends] - ours[starts] == ends - starts
        if not targets.any():
            raise DocumentError("messages: no assistant turn in them, so nothing to learn")
        return self._document(tokens, targets)

    def token_ids(self, value: Any) -> Document:
        """The document of a list of token ids; raises ``DocumentError``."""
        if not isinstance(value, list) or not value:
            raise DocumentError(f"token_ids: expected a non-empty list, found {_shown(value)}")
        for position, token in enumerate(value):
            if type(token) is not int:
                raise DocumentError(f"token_ids[{position}]: expected an integer, found {_shown(token)}")
        return self._document(value, None)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise DocumentError("text and messages need the checkpoint's tokenizer.json, which is missing")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DocumentError(f"not valid Unicode: {error.reason} at character {error.start}") from None
        return self._tokenizer.encode(text)

    def _length(self, token: int) -> int:
        if token not in self._bytes:
            assert self._tokenizer is not None
            self._bytes[token] = len(self._tokenizer.token_bytes([token]))
        return self._bytes[token]

    def _document(self, tokens: list[int], targets: np.ndarray | None) -> Document:
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            at, token = next((at, token) for at, token in enumerate(tokens) if not 0 <= token < self._vocab_size)
            raise DocumentError(f"token {at}: {token} is outside the vocabulary 0 .. {self._vocab_size - 1}")
        return Document(np.array(tokens, np.int32), np.ones(len(tokens), bool) if targets is None else targets)


def _with_tools(messages: list[Any], tools: Any) -> list[Any]:
    """``messages`` with ``tools`` offered by the first, before which a system message is put if it is of the user."""
    first = messages[0]
    if not isinstance(first, Mapping):
        return messages  # the encoder says what is wrong with it
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if first.get("tools"):
        raise DocumentError("tools: given both beside the messages and in the first of them; give them once")
    return [{**first, "tools": tools}, *messages[1:]]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
