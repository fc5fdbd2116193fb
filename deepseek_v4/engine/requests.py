"""What an engine is asked for and what it answers."""

import dataclasses

from deepseek_v4.sampling import check_sampling

MAX_STOP_IDS = 8
"""Stop tokens of one request at most, the model's end-of-sentence token among them."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    ``stop_ids`` end it beside the model's own end-of-sentence token, ``stop`` strings as soon as the text holds one
    (they need a tokenizer in the engine). ``logprobs`` asks for the log-probability of every new token and of that many
    of the most probable ones; None for neither. ``stream`` names its random numbers together with ``seed`` (see
    ``sampling``). ``generated`` are new tokens that an earlier run produced already: they are read like the prompt, not
    sampled again, and count towards ``max_new_tokens``. Raises ``ValueError`` naming what is out of range.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stream: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    generated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.seed, self.stream)
        if not self.token_ids:
            raise ValueError("token_ids: empty; a model continues at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")
        if len(self.generated) >= self.max_new_tokens:
            raise ValueError(
                f"generated: {len(self.generated)} tokens leave nothing to do of max_new_tokens {self.max_new_tokens}"
            )
        if len(self.stop_ids) >= MAX_STOP_IDS:
            raise ValueError(f"stop_ids: at most {MAX_STOP_IDS - 1} tokens, found {len(self.stop_ids)}")
        if any(not text for text in self.stop):
            raise ValueError("stop: an empty string would stop before the first token; leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs: expected 0 or more, found {self.logprobs}")

    @property
    def total(self) -> int:
        """Tokens of context it may come to need."""
        return len(self.token_ids) + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a new token under the model itself, before temperature and filters.

    ``top`` are (token, log-probability) of the most probable tokens, as many as were asked for, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """New tokens of a request, and why it ended if it did.

    ``finish_reason`` is None while it goes on, "stop" after a stop token (which is the last of ``token_ids``) or a stop
    string (which ``stopped_by`` then is; the last token completes it), "length" after ``max_new_tokens``, "cancelled",
    or "error" with what went wrong in ``error``. ``logprobs`` has one entry per token, or is None.
    """

    request_id: int
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    stopped_by: str | int | None = None
    error: str | None = None
