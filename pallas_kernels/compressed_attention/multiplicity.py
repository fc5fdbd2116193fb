"""How often every query selects every entry: lists of indices as a matrix."""

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 128
_BITS = 32


def multiplicity(indices: jax.Array, total: int) -> jax.Array:
    """int16 [B, S, total]: how often an index 0 .. total - 1 is in a query's list [B, S, K]; negative ones are nowhere.

    Lists without repetition, all that selections make, are added up as bits, 32 entries to a word; a word tells by the
    number of its bits whether any index came twice, and only then are they counted one by one.
    """
    batch, length, _ = indices.shape
    groups = -(-total // (_LANES * _BITS))
    valid = indices >= 0
    lane, tile = indices % _LANES, indices // _LANES
    bit = jnp.where(valid, jnp.left_shift(jnp.uint32(1), (tile % _BITS).astype(jnp.uint32)), jnp.uint32(0))
    # Bit t of word (g, l) is entry (32 g + t) * 128 + l, so that words become a matrix without a move across lanes.
    mine = jnp.arange(groups * _LANES) == (tile // _BITS * _LANES + lane)[..., None]
    words = jnp.sum(jnp.where(mine, bit[..., None], jnp.uint32(0)), axis=2, dtype=jnp.uint32)
    words = words.reshape(batch, length, groups, _LANES)

    def unpacked(words: jax.Array) -> jax.Array:
        tiles = jnp.arange(min(_BITS, -(-total // _LANES)), dtype=jnp.uint32)[:, None]
        bits = jnp.right_shift(words[..., None, :], tiles) & 1
        return bits.astype(jnp.int16).reshape(batch, length, -1)[..., :total]

    def counted(words: jax.Array) -> jax.Array:
        def add(place: jax.Array, found: jax.Array) -> jax.Array:
            here = lax.dynamic_slice_in_dim(indices, place, 1, axis=2) == jnp.arange(total)
            return found + here.astype(jnp.int16)

        return lax.fori_loop(0, indices.shape[2], add, jnp.zeros((batch, length, total), jnp.int16))

    # A carry loses bits: equal bits add up to as many as there are indices only where no two met.
    repeated = jnp.sum(lax.population_count(words), dtype=jnp.uint32) != jnp.sum(valid, dtype=jnp.uint32)
    return lax.cond(repeated, counted, unpacked, words)
