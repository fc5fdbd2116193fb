"""What training minimises beside what the layers report: cross-entropy of the next token, by the model and its draft.

Sources: DeepSeek-V4 report 2.4 and 4.2; architecture section 8 for the draft.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_v4.execution import Execution
from deepseek_v4.vocabulary import scores


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

    ``weight`` may be cut as it is stored; see ``vocabulary.scores`` for what is in memory at a time.
    """
    log_sum, picked, greedy = scores(hidden, weight, following, execution)
    return CrossEntropy(
        jnp.sum(jnp.where(wanted, log_sum - picked, 0.0)),
        jnp.sum(jnp.where(wanted, jnp.square(log_sum), 0.0)),
        jnp.sum(wanted & (greedy == following), dtype=jnp.float32),
        greedy,
    )
