"""What training minimises beside what the layers report: cross-entropy of the next token, by the model and its draft.

Sources: DeepSeek-V4 report 2.4 and 4.2; architecture section 8 for the draft.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.execution import Execution, dot_precision

_LOGITS = 1 << 24
"""Logits of one device that are in memory at a time (64 MiB in float32)."""


class CrossEntropy(NamedTuple):
    """Sums over the targets of a call, float32: ``loss`` in nats, ``z`` (squared log-sum-exp), ``correct`` guesses.

    ``greedy`` int32 [B, S] is the most probable token everywhere.
    """

    loss: jax.Array
    z: jax.Array
    correct: jax.Array
    greedy: jax.Array


def labels(tokens: jax.Array, positions: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token after each, [B, S], and where it is to be learnt: where it belongs to the same document.

    ``positions`` [B, S] are those in the document; ``targets`` bool [B, S] says which tokens are to be predicted.
    """
    following = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.roll(targets & (positions > 0), -1, axis=1)
    return following, wanted.at[:, -1].set(False)


def cross_entropy(
    hidden: jax.Array, weight: jax.Array, following: jax.Array, wanted: jax.Array, execution: Execution
) -> CrossEntropy:
    """Cross-entropy of ``following`` [B, S] under logits hidden [B, S, d] times weight [vocab, d], where ``wanted``.

    A part of the sequence at a time, also in the backward pass, which computes the logits again: logits of more tokens
    than one part never exist together. Operands have the dtype of ``hidden``, sums are float32.
    """
    batch, length, _ = hidden.shape
    placement = execution.placement
    shards = 1 if placement is None else placement.size("batch") * placement.size("vocab")
    part = max(1, min(length, _LOGITS * shards // (batch * weight.shape[0])))
    parts = -(-length // part)

    def run(inputs):
        hidden, following, wanted = inputs
        logits = jnp.einsum(
            "bsd,vd->bsv",
            hidden,
            weight.astype(hidden.dtype),
            precision=dot_precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = execution.constrain(logits, ("batch", None, "vocab"))
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (
            jnp.sum(jnp.where(wanted, log_sum - picked, 0.0)),
            jnp.sum(jnp.where(wanted, jnp.square(log_sum), 0.0)),
            jnp.sum(wanted & (greedy == following), dtype=jnp.float32),
            greedy,
        )

    if parts == 1:
        return CrossEntropy(*run((hidden, following, wanted)))
    run = jax.checkpoint(run, prevent_cse=False)

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, parts * part - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, parts, part, *a.shape[2:]), 1, 0)

    loss, z, correct, greedy = lax.map(run, (cut(hidden), cut(following), cut(wanted)))
    greedy = jnp.moveaxis(greedy, 0, 1).reshape(batch, -1)[:, :length]
    return CrossEntropy(jnp.sum(loss), jnp.sum(z), jnp.sum(correct), greedy)
