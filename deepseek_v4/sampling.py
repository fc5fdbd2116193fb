"""From logits to the next token: greedy, temperature and nucleus sampling, every row on its own random stream."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Sampling(NamedTuple):
    """How each row of a batch samples; arrays [B].

    ``temperature`` float32, 0 for greedy; ``top_p`` float32 in (0, 1]; ``seed`` uint32 and ``stream`` uint32 name the
    random stream of a row (``stream`` is the index of its request, so equal prompts under one seed differ).
    """

    temperature: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    stream: jax.Array | np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, int, int]]) -> "Sampling":
        """From one (temperature, top_p, seed, stream) per row; raises ``ValueError`` for a value out of range."""
        for temperature, top_p, seed, stream in rows:
            check_sampling(temperature, top_p, seed)
            if not 0 <= stream < 2**32:
                raise ValueError(f"stream: expected 0 .. 2**32 - 1, found {stream}")
        kinds = (np.float32, np.float32, np.uint32, np.uint32)
        columns = zip(*rows, strict=True)
        return cls(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Raises ``ValueError`` naming the first parameter that is out of range."""
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number >= 0 (0 is greedy), found {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], found {top_p}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 .. 2**32 - 1, found {seed}")


def sample(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """The next token int32 [B] of every row, from logits float32 [B, V].

    ``step`` int32 [B] counts the tokens a row has sampled before. A row's token is a function of its logits, its
    ``Sampling`` and its step: neither the other rows nor the row's place in the batch take part. Greedy ties go to the
    lowest id. Nucleus sampling keeps the fewest most probable tokens whose probabilities sum to at least ``top_p``
    (ties to the lowest id), after temperature.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        noise = jax.vmap(lambda *row: _noise(*row, logits.shape[-1]))(sampling.seed, sampling.stream, step)
        drawn = lax.cond(jnp.any(sampling.top_p < 1), _draw_nucleus, _draw_all, scaled, noise, sampling.top_p)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def _noise(seed: jax.Array, stream: jax.Array, step: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [V] of one row at one step: the argmax of logits + noise is a sample of their softmax."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _draw_all(scaled: jax.Array, noise: jax.Array, top_p: jax.Array) -> jax.Array:
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)


def _draw_nucleus(scaled: jax.Array, noise: jax.Array, top_p: jax.Array) -> jax.Array:
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    probability = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The comparison alone would lose far tails to rounding when everything is wanted; the first token always stays.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept = kept.at[:, 0].set(True)
    candidates = jnp.where(kept, jnp.take_along_axis(scaled + noise, order, axis=-1), -jnp.inf)
    choice = jnp.argmax(candidates, axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
