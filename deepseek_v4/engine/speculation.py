"""Drafting with the MTP block: proposals, and which of them are kept, so that nothing about the output changes.

A greedy row keeps a proposal that is the model's own choice. A sampled row keeps proposal x with probability
min(1, p(x) / q(x)), p being what the model and q what the draft would draw from (temperature and filters included), and
draws from max(p - q, 0) in place of the first that is refused: tokens are distributed as without drafts (Leviathan et
al. 2023, Chen et al. 2023). Every number is drawn from the stream of the row and the place of the token in its output,
so that neither other rows nor earlier rounds take part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.model import Cache, Model, Params
from deepseek_v4.sampling import ACCEPT, DRAFT, RESIDUAL, Sampling, greedy, noise, pick, tempered, uniform


class Proposal(NamedTuple):
    """``tokens`` int32 [B, k], the ``log_probability`` [B, k, V] they were drawn from (unnormalised), the cache."""

    tokens: jax.Array
    log_probability: jax.Array
    cache: Cache


def propose(model: Model, params: Params, cache: Cache, rows, count: int) -> Proposal:
    """``count`` tokens to follow ``rows["token"]``, each drawn by the MTP block from its own streams of the one before.

    The block writes into its own cache where the model's next call over these tokens will write again.
    """
    start = cache["position"]
    running = (~rows["done"]).astype(jnp.int32)
    sampling = rows["sampling"]

    def step(carry, index):
        token, streams, cache = carry
        logits, streams, cache = model.draft_step(params, token, streams, start + index, running, cache)
        logits = model.execution.constrain(logits, ("batch", None))
        logits = jnp.where(jnp.isfinite(logits) & (running > 0)[:, None], logits, 0.0)
        weights = tempered(logits, sampling)

        def draw():
            drawn = pick(weights, noise(sampling, rows["count"] + index, DRAFT, logits.shape[-1]))
            return jnp.where(sampling.temperature > 0, drawn, greedy(logits))

        token = lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy(logits))
        return (token, streams, cache), (token, weights)

    carry = (rows["token"], model.last_streams(cache), cache)
    (_, _, cache), (tokens, weights) = lax.scan(step, carry, jnp.arange(count))
    return Proposal(tokens.T, jnp.moveaxis(weights, 0, 1), cache)


def verify(logits: jax.Array, proposal: Proposal, sampling: Sampling, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B, k + 1] and how many of them [B] follow: proposals that are kept, then one of the model's own.

    logits float32 [B, k + 1, V], finite, of the last token and of every proposal; count [B], the tokens sampled before.
    """
    proposed = proposal.tokens
    drafts = proposed.shape[1]
    choices = greedy(logits)
    warm = sampling.temperature > 0

    def of_greedy():
        return choices[:, :drafts] == proposed, choices

    def of_sampled():
        target = jax.vmap(lambda at: tempered(at, sampling), in_axes=1, out_axes=1)(logits)
        p = jax.nn.softmax(target, axis=-1)
        q = jax.nn.softmax(proposal.log_probability, axis=-1)
        p_of, q_of = (jnp.take_along_axis(x, proposed[..., None], axis=-1)[..., 0] for x in (p[:, :drafts], q))
        u = jnp.stack([uniform(sampling, count + i, ACCEPT) for i in range(drafts)], axis=1)
        keep = jnp.where(warm[:, None], u * q_of < p_of, of_greedy()[0])
        kept = _leading(keep)
        at = kept[:, None, None]
        p_at = jnp.take_along_axis(p, at, axis=1)[:, 0]
        q_at = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
        rest = jnp.maximum(p_at - q_at, 0.0)
        # Nothing left can only be rounding, of distributions that are equal.
        rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p_at)
        own = pick(jnp.log(rest), noise(sampling, count + kept, RESIDUAL, logits.shape[-1]))
        own = jnp.where(warm[:, None], own[:, None], choices)
        return keep, own

    keep, own = lax.cond(jnp.any(warm), of_sampled, of_greedy)
    kept = _leading(keep)
    index = jnp.arange(drafts + 1)
    padded = jnp.pad(proposed, ((0, 0), (0, 1)))
    return jnp.where(index < kept[:, None], padded, own).astype(jnp.int32), kept + 1


def _leading(keep: jax.Array) -> jax.Array:
    """How many of keep [B, k] hold before the first that does not: int32 [B]."""
    return jnp.sum(jnp.cumprod(keep.astype(jnp.int32), axis=1), axis=1)
