"""From logits to the next token: greedy, temperature, top-k, nucleus and min-p, every row on its own random stream.

The filters work on the tempered distribution, in this order, each on what the one before has left: ``top_k`` keeps the
most probable tokens, ``top_p`` the fewest of them whose share reaches it, ``min_p`` those at least that fraction as
probable as the most probable one. Ties go to the lowest id; the most probable token always stays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What a random number is for; drafting needs several at one step (see ``engine.speculation``).
PLAIN, DRAFT, ACCEPT, RESIDUAL = range(4)


class Sampling(NamedTuple):
    """How each row of a batch samples; arrays [B].

    ``temperature`` float32, 0 for greedy; ``top_p`` float32 in (0, 1]; ``top_k`` int32, 0 for all; ``min_p`` float32
    in [0, 1); ``seed`` and ``stream`` uint32 name the random stream of a row (``stream`` is the index of its request,
    so equal prompts under one seed differ).
    """

    temperature: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    stream: jax.Array | np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, int, float, int, int]]) -> "Sampling":
        """From one (temperature, top_p, top_k, min_p, seed, stream) per row; raises ``ValueError`` as below."""
        for row in rows:
            check_sampling(*row)
        kinds = (np.float32, np.float32, np.int32, np.float32, np.uint32, np.uint32)
        columns = zip(*rows, strict=True)
        return cls(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def check_sampling(
    temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int = 0, stream: int = 0
) -> None:
    """Raises ``ValueError`` naming the first parameter that is out of range."""
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number >= 0 (0 is greedy), found {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], found {top_p}")
    if not 0 <= top_k < 2**31:
        raise ValueError(f"top_k: expected 0 .. 2**31 - 1 (0 is all), found {top_k}")
    if not 0 <= min_p < 1:
        raise ValueError(f"min_p: expected a number in [0, 1), found {min_p}")
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}: expected 0 .. 2**32 - 1, found {value}")


def sample(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """The next token int32 [B] of every row, from finite logits float32 [B, V].

    ``step`` int32 [B] counts the tokens a row has sampled before. A row's token is a function of its logits, its
    ``Sampling`` and its step: neither the other rows nor the row's place in the batch take part. Greedy ties go to the
    lowest id.
    """

    def draw():
        drawn = pick(tempered(logits, sampling), noise(sampling, step, PLAIN, logits.shape[-1]))
        return jnp.where(sampling.temperature > 0, drawn, greedy(logits))

    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy(logits))


def greedy(logits: jax.Array) -> jax.Array:
    """The token int32 [B] of the largest logit."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def tempered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Unnormalised log-probabilities [B, V] of what rows draw from: tempered, the largest 0, filtered tokens -inf.

    Greedy rows count as temperature 1 here and are left unfiltered.
    """
    warm = sampling.temperature > 0
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(warm, sampling.temperature, 1.0)[:, None]
    size = logits.shape[-1]
    filters = (sampling.top_p < 1) | ((sampling.top_k > 0) & (sampling.top_k < size)) | (sampling.min_p > 0)
    some = jnp.logical_and(warm, filters)
    return lax.cond(jnp.any(some), lambda: _filtered(scaled, sampling, some), lambda: scaled)


def _filtered(scaled: jax.Array, sampling: Sampling, some: jax.Array) -> jax.Array:
    size = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    limit = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)[:, None]
    candidate = jnp.arange(size) < limit
    probability = jax.nn.softmax(jnp.where(candidate, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = sampling.top_p[:, None]
    # The comparison alone would lose far tails to rounding when everything is wanted.
    kept = candidate & ((before < top_p) | (top_p >= 1)) & (jnp.exp(ordered) >= sampling.min_p[:, None])
    count = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1)
    # Kept are the first ``count`` in the order; among those equal to the last of them, the lowest ids.
    last = jnp.take_along_axis(ordered, count - 1, axis=-1)
    above, equal = scaled > last, scaled == last
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    stays = above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    return jnp.where(stays | ~some[:, None], scaled, -jnp.inf)


def pick(log_probability: jax.Array, gumbel: jax.Array) -> jax.Array:
    """A draw int32 [B] from unnormalised log-probabilities [B, V], by Gumbel noise [B, V]."""
    return jnp.argmax(log_probability + gumbel, axis=-1).astype(jnp.int32)


def noise(sampling: Sampling, step: jax.Array, purpose: int, size: int) -> jax.Array:
    """Gumbel noise [B, size] for one purpose at step [B] of each row's stream."""
    return jax.vmap(lambda seed, stream, at: jax.random.gumbel(_key(seed, stream, at, purpose), (size,), jnp.float32))(
        sampling.seed, sampling.stream, step
    )


def uniform(sampling: Sampling, step: jax.Array, purpose: int) -> jax.Array:
    """A number [B] in [0, 1) for one purpose at step [B] of each row's stream."""
    return jax.vmap(lambda seed, stream, at: jax.random.uniform(_key(seed, stream, at, purpose)))(
        sampling.seed, sampling.stream, step
    )


def _key(seed: jax.Array, stream: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
    return key if purpose == PLAIN else jax.random.fold_in(key, purpose)
