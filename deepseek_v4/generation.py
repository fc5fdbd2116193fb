"""Continuations of a few prompts in one call; whatever runs for long, or reads as it goes, uses the engine itself."""

from collections.abc import Sequence
from typing import Any

from deepseek_v4.engine import Engine, Pool, Request, chunk_sizes
from deepseek_v4.model import Model, Params


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    slots: int = 8,
    prefill_chunk: int = 512,
    **settings: Any,
) -> list[tuple[int, ...]]:
    """The new tokens of every prompt, in order; ``settings`` are those of ``engine.Request``, greedy by default.

    The cache is sized for the longest prompt. Raises ``ValueError`` for settings out of range, and if the model gave a
    logit that is not a finite number.
    """
    requests = [Request(tuple(p), max_new_tokens, **{"stream": i, **settings}) for i, p in enumerate(prompts)]
    if not requests:
        return []
    pool = Pool(min(slots, len(requests)), max(request.total for request in requests))
    engine = Engine(model, params, [pool], chunks=chunk_sizes(prefill_chunk), top_logprobs=settings.get("logprobs"))
    tokens: list[list[int]] = [[] for _ in requests]
    for update in engine.run(requests):
        if update.finish_reason == "error":
            raise ValueError(f"prompt {update.request_id}: {update.error}")
        tokens[update.request_id].extend(update.token_ids)
    return [tuple(new) for new in tokens]
