"""Scores given token sequences: the logits at every position, the log-probability of every token that follows."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.engine.scheduling import round_up
from deepseek_v4.model import Cache, Model, Params


class Scores(NamedTuple):
    """One sequence of S tokens: logits float32 [S, vocab]; logprobs float32 [S - 1], of token t + 1 given 0 .. t.

    ``mtp_logits`` float32 [S - 1, vocab], if asked for: row t is the draft block's output at draft position t, which
    sees tokens 0 .. t + 1 and predicts token t + 2.
    """

    logits: np.ndarray
    logprobs: np.ndarray
    mtp_logits: np.ndarray | None


def score(
    model: Model,
    params: Params,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    prefill_chunk: int = 512,
    mtp: bool = False,
) -> Iterator[Scores]:
    """Yields the scores of every sequence, in order.

    Sequences run in batches of ``batch_size`` rows (rounded up to what the mesh's data axis divides), in chunks of
    ``prefill_chunk`` tokens; neither changes the result beyond float32 rounding, and one program is compiled for all.
    Raises ``ValueError`` for an empty sequence, or for ``mtp`` with a model that has no MTP block.
    """
    if mtp and not model.drafts:
        raise ValueError("this checkpoint has no MTP block that can run; score it without mtp")
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequence {index}: empty; a sequence has at least one token")
    placement = model.execution.placement
    batch = round_up(min(batch_size, max(1, len(sequences))), 1 if placement is None else placement.size("batch"))
    longest = max((len(sequence) for sequence in sequences), default=1)
    chunk = min(prefill_chunk, longest)
    max_length = round_up(longest, chunk)
    for first in range(0, len(sequences), batch):
        yield from _score_batch(model, params, sequences[first : first + batch], batch, chunk, max_length, mtp)


def _score_batch(model: Model, params: Params, rows, batch: int, chunk: int, max_length: int, mtp: bool):
    lengths = np.array([len(row) for row in rows] + [0] * (batch - len(rows)))
    padded = np.zeros((batch, max_length + 1), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    cache = model.init_cache(batch, max_length)
    pieces: list[list[Any]] = [[] for _ in rows]
    for start in range(0, int(lengths.max()), chunk):
        tokens = padded[:, start : start + chunk]
        targets = padded[:, start + 1 : start + 1 + chunk]
        taken = np.clip(lengths - start, 0, chunk).astype(np.int32)
        *arrays, cache = score_chunk(model, params, cache, tokens, targets, taken, mtp)
        arrays = jax.device_get([array for array in arrays if array is not None])
        for index, parts in enumerate(pieces):
            if taken[index]:
                parts.append([np.array(array[index, : taken[index]]) for array in arrays])
    for parts in pieces:
        logits, logprobs, *draft = (np.concatenate(column) for column in zip(*parts, strict=True))
        # The draft output at a token belongs to the position before it; the last token has no successor to score.
        yield Scores(logits, logprobs[:-1], draft[0][1:] if mtp else None)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def score_chunk(model: Model, params: Params, cache: Cache, tokens, targets, lengths, mtp: bool):
    """Runs one chunk: tokens [B, C] with ``targets`` [B, C] after them, of which ``lengths`` [B] are real.

    Returns logits [B, C, vocab], log-probabilities of the targets [B, C], draft logits or None, and the cache.
    """
    output = model.forward(params, tokens, cache, lengths, draft=mtp)
    logits = output.logits
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logits, logprobs, output.draft_logits, output.cache
