"""Text to token ids and back, through a checkpoint's own ``tokenizer.json``; streaming never splits a character."""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or does not fit the model."""


class Tokenizer:
    """A byte-level BPE tokenizer as the release ships it (checkpoint reference, section 5).

    Encoding adds nothing by itself: a BOS token is in the ids if it is in the text. ``add_bos`` is what
    ``tokenizer_config.json`` says about raw prompts (``add_bos_token``; false in the release).
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_token_id: int | None = None, add_bos: bool = False):
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.add_bos = add_bos

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` (a file, or the directory that holds it) and ``tokenizer_config.json`` beside it.

        Raises ``TokenizerError`` if the file is missing or unreadable, or if ``tokenizer_config.json`` asks for a BOS
        token without naming one that exists.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; text needs the tokenizer.json of the checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise TokenizerError(f"{path}: not a readable tokenizer: {error}") from None
        config_path = path.with_name("tokenizer_config.json")
        config = {}
        if config_path.is_file():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{config_path}: not valid JSON: {error}") from None
        bos = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        bos_id = backend.token_to_id(bos) if bos else None
        add_bos = bool(config.get("add_bos_token", False))
        if add_bos and bos_id is None:
            raise TokenizerError(f"{config_path}: add_bos_token is true but bos_token {bos!r} is not in {path.name}")
        return cls(backend, bos_id, add_bos)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, special tokens in it recognised, nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt: ``encode``, with the BOS token in front where the tokenizer asks for one."""
        ids = self.encode(text)
        if self.add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ``token_ids``, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.token_bytes(token_ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of ``token_ids``; ids beyond the vocabulary (models pad theirs) are U+FFFD."""
        return b"".join(self._bytes_of(token) for token in token_ids)

    def stream(self) -> "Detokenizer":
        """A new incremental decoder."""
        return Detokenizer(self)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            return "\ufffd".encode()
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token: its characters stand for themselves
            return token.encode("utf-8")


class Detokenizer:
    """Text of a token sequence as it grows: what it has returned so far is a prefix of the whole text, always.

    A token may end in the middle of a character; its first bytes wait for the rest, so no half character is shown.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that ``token_ids`` complete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for the bytes of an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in a byte-level BPE vocabulary, to the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
