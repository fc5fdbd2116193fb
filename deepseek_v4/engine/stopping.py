"""Stop strings: text is searched as it grows, so that a request ends with the token that completes one."""

from collections.abc import Sequence

from deepseek_v4.tokenizer import Tokenizer


class StopStrings:
    """Watches the text of one request for the first of ``strings`` that appears."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer):
        self._strings = tuple(strings)
        self._stream = tokenizer.stream()
        self._longest = max(len(text) for text in self._strings)
        self._tail = ""

    def push(self, token_ids: Sequence[int]) -> tuple[int, str] | None:
        """(how many of ``token_ids`` it took, the string) once the text holds a stop string, else None."""
        for count, token in enumerate(token_ids, start=1):
            text = self._tail + self._stream.push((token,))
            found = [(text.index(string), string) for string in self._strings if string in text]
            if found:
                return count, min(found)[1]
            self._tail = text[max(0, len(text) - self._longest + 1) :]
        return None


def cut_at_stop(text: str, stop: str) -> str:
    """``text`` up to the first ``stop`` in it."""
    return text.partition(stop)[0]
