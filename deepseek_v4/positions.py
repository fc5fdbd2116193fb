"""Where the tokens of one call are: each row at its own position, or rows of several documents (packing).

In packed rows windows, entries, RoPE and the MTP shift begin anew with every document. A document's entries lie in the
row's entries one behind the other, in the order of the tokens that complete them, so that what a token may see of them
is a range.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_v4.visibility import visible_entries


class Training(NamedTuple):
    """What a training pass wants to know beside its result.

    ``real`` bool [B, S] are the tokens that count (the rest is the empty tail of a row); ``indexer`` is how the indexer
    learns: "off", "dense" (attention over all visible entries) or "sparse" (over those selected).
    """

    real: jax.Array
    indexer: str = "off"


class Tokens(NamedTuple):
    """The tokens of one call: ids [B, S], position of the first of each row [B], how many are real [B].

    ``documents`` [B, S], if rows hold several documents, is the position of every token in its own; ``start`` is then
    zero. ``training`` is None in inference.
    """

    ids: jax.Array
    start: jax.Array
    lengths: jax.Array
    documents: jax.Array | None = None
    training: Training | None = None

    @property
    def positions(self) -> jax.Array:
        """The position of every token in its sequence or document: int32 [B, S]."""
        if self.documents is not None:
            return self.documents
        return self.start[:, None] + jnp.arange(self.ids.shape[1])

    def before(self) -> "Tokens":
        """The same tokens one position earlier, as a draft block sees them: the first of a sequence is not there."""
        training = self.training
        if training is not None:
            training = training._replace(real=training.real & (self.positions > 0))
        if self.documents is None:
            return self._replace(start=self.start - 1, training=training)
        return self._replace(documents=self.documents - 1, training=training)


def entry_range(tokens: Tokens, ratio: int) -> tuple[jax.Array | None, jax.Array]:
    """Which compressed entries each token may see, first .. count - 1: (first [B, S] or None for 0, count [B, S])."""
    if tokens.documents is not None:
        visible = visible_entries(tokens.documents, ratio)
        count = jnp.cumsum(completes(tokens.documents, ratio), axis=1, dtype=jnp.int32)
        return count - visible, count
    # Padding sees what the last real token sees: entries beyond that have not been written.
    last = (tokens.start + tokens.lengths)[:, None] - 1
    return None, visible_entries(jnp.minimum(tokens.positions, last), ratio)


def completes(documents: jax.Array, ratio: int) -> jax.Array:
    """Whether a token is the last of a window of its document: bool, in the shape of ``documents``."""
    return (documents >= 0) & (documents % ratio == ratio - 1)


def window_ends(documents: jax.Array, ratio: int) -> jax.Array:
    """Where the windows of packed rows end, in order: int32 [B, max(1, S // ratio)], any place where there is none."""
    batch, length = documents.shape
    windows = max(1, length // ratio)
    done = completes(documents, ratio)
    slot = jnp.where(done, jnp.cumsum(done, axis=1) - 1, windows)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), documents.shape)
    rows = jnp.arange(batch)[:, None]
    return jnp.zeros((batch, windows), jnp.int32).at[rows, slot].set(places, mode="drop")
