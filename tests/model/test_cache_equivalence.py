"""Chunks of any split, ragged rows, single tokens, rollback: always the logits of one full pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SmallModel, small_config, small_model

from deepseek_v4 import rollback

ROWS, LENGTH, ROLLBACK = 3, 520, 9
SIZES = (1, 9, 136)  # the compiled chunk sizes; every step uses the smallest that holds its longest row
BOUNDARIES = (*range(1, 10), 127, 128, 129, 255, 256, 257, 511, 512, 513)

# float32 rounding of another order of summation over four layers; up to 3e-6 was measured.
ATOL = 2e-5


class World:
    """One model (CSA and HCA twice, MTP), one batch of tokens, its full pass, and the compiled steps."""

    def __init__(self) -> None:
        config = small_config((4, 128, 4, 128), num_hash_layers=0, hc_sinkhorn_iters=3, hidden_size=128, index_topk=8)
        self.small: SmallModel = small_model(config, seed=11)
        model = self.small.model
        self.tokens = np.random.default_rng(11).integers(0, config.vocab_size, (ROWS, LENGTH))
        full = compiled(lambda p, t: model.forward(p, t, draft=True))(self.small.params, jnp.asarray(self.tokens))
        self.logits, self.draft_logits = np.asarray(full.logits), np.asarray(full.draft_logits)
        self._step = compiled(lambda p, t, cache, lengths: model.forward(p, t, cache, lengths, draft=True))

    def empty(self):
        return self.small.model.init_cache(ROWS, LENGTH, ROLLBACK)

    def step(self, cache, rows: list[np.ndarray], padding: int = 7):
        """Runs rows[b] next on row b; the padding is a real token id, as it is in a server's batch."""
        size = next(s for s in SIZES if s >= max(len(row) for row in rows))
        tokens = np.full((ROWS, size), padding)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
        return self._step(self.small.params, jnp.asarray(tokens), cache, lengths)

    def advance(self, cache, counts: list[int], check: bool = True):
        """Runs the next counts[b] tokens of the batch and compares their logits with the full pass."""
        start = np.asarray(cache["position"])
        counts = [min(n, LENGTH - s) for n, s in zip(counts, start, strict=True)]
        out = self.step(cache, [self.tokens[b, s : s + n] for b, (s, n) in enumerate(zip(start, counts, strict=True))])
        for b, (s, n) in enumerate(zip(start, counts, strict=True)):
            if check:
                np.testing.assert_allclose(out.logits[b, :n], self.logits[b, s : s + n], rtol=0, atol=ATOL)
                drafted = slice(max(1 - s, 0), n)  # the draft of position 0 does not exist
                found, expected = out.draft_logits[b, drafted], self.draft_logits[b, s : s + n][drafted]
                np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
                ranked = np.sort(self.logits[b, s : s + n], axis=-1)
                clear = ranked[:, -1] - ranked[:, -2] > 2 * ATOL
                same = np.argmax(out.logits[b, :n], -1) == np.argmax(self.logits[b, s : s + n], -1)
                assert same[clear].all()
        np.testing.assert_array_equal(out.cache["position"], start + counts)
        return out.cache

    def advance_to(self, cache, positions: list[int], chunk: int = SIZES[-1]):
        """Chunk by chunk until every row is at its position."""
        while True:
            left = [p - int(s) for p, s in zip(positions, cache["position"], strict=True)]
            if not any(left):
                return cache
            cache = self.advance(cache, [min(n, chunk) for n in left])


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("first", range(0, len(BOUNDARIES), ROWS))
def test_prefill_to_every_boundary_then_decode(world: World, first: int) -> None:
    """Rows at different positions mod 4 and mod 128, prefilled to a boundary and decoded across the next one."""
    cache = world.advance_to(world.empty(), list(BOUNDARIES[first : first + ROWS]))
    for _ in range(6):
        cache = world.advance(cache, [1] * ROWS)
    world.advance(cache, [9, 0, 5])


def test_decode_from_the_first_token(world: World) -> None:
    """140 single tokens: every position mod 4 and mod 128 is once the one that completes a window, or does not."""
    cache = world.empty()
    for _ in range(140):
        cache = world.advance(cache, [1] * ROWS)


def test_rows_decode_beside_rows_that_prefill_and_rows_that_wait(world: World) -> None:
    cache = world.advance(world.empty(), [129, 3, 0])
    for counts in ([1, 136, 0], [1, 0, 127], [1, 1, 2], [1, 136, 136], [0, 1, 1], [136, 5, 1]):
        cache = world.advance(cache, counts)


@settings(max_examples=5, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_ragged_split_equals_the_full_pass(world: World, data: st.DataObject) -> None:
    piece = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 124, 125, 126, 127, 128, 129, 130, 132, 136])
    cache = world.empty()
    for _ in range(10):
        cache = world.advance(cache, data.draw(st.lists(piece, min_size=ROWS, max_size=ROWS).filter(any)))


def test_a_row_of_length_zero_keeps_its_cache_bit_by_bit(world: World) -> None:
    cache = world.advance(world.empty(), [133, 131, 8])
    after = world.advance(cache, [5, 0, 9])

    def row(tree, b):
        moved = {**tree, "groups": jax.tree.map(lambda a: a[:, b], tree["groups"])}
        moved["drafts"] = jax.tree.map(lambda a: a[:, b], tree["drafts"])
        moved["streams"], moved["position"] = tree["streams"][b], tree["position"][b]
        return jax.tree.leaves(moved)

    for before, now in zip(row(cache, 1), row(after, 1), strict=True):
        np.testing.assert_array_equal(before, now)
    assert any((before != now).any() for before, now in zip(row(cache, 0), row(after, 0), strict=True))


def test_garbage_in_unused_cache_rows_is_never_read(world: World) -> None:
    """0 * NaN is NaN: whatever was not written must be masked as a value, not only as a score."""
    clean = world.empty()
    dirty = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan) if a.dtype != jnp.int32 else a, clean)
    for counts in ([136, 3, 0], [1, 9, 0], [136, 1, 1], [0, 9, 5], [3, 136, 2], [1, 1, 1]):
        dirty = world.advance(dirty, counts)


@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(
    positions=st.lists(st.sampled_from(BOUNDARIES), min_size=ROWS, max_size=ROWS),
    drafted=st.lists(st.integers(0, ROLLBACK), min_size=ROWS, max_size=ROWS).filter(any),
    accepted=st.lists(st.integers(0, ROLLBACK), min_size=ROWS, max_size=ROWS),
    one_by_one=st.booleans(),
)
def test_rollback_is_as_if_the_rest_had_never_been_run(world: World, positions, drafted, accepted, one_by_one) -> None:
    """Every row drafts some true and then wrong tokens and keeps any prefix of the true ones."""
    cache = world.advance_to(world.empty(), positions)
    drafted = [min(n, LENGTH - p) for n, p in zip(drafted, positions, strict=True)]
    accepted = [min(a, n) for a, n in zip(accepted, drafted, strict=True)]
    rows = []
    for b, (p, n, a) in enumerate(zip(positions, drafted, accepted, strict=True)):
        true = world.tokens[b, p : p + n]
        rows.append(np.where(np.arange(n) < a, true, (true + 1) % 256))
    if one_by_one:
        for i in range(max(drafted)):
            cache = world.step(cache, [row[i : i + 1] for row in rows]).cache
    elif any(drafted):
        cache = world.step(cache, rows).cache
    kept = jnp.asarray([p + a for p, a in zip(positions, accepted, strict=True)], jnp.int32)
    cache = rollback(cache, kept)
    cache = world.advance(cache, [1, 9, 4])
    cache = world.advance(cache, [9, 1, 9])
    world.advance(cache, [1, 5, 136])


def test_repeated_rollbacks_within_the_bound(world: World) -> None:
    """Speculation in a loop: nine drafted, some kept, over the boundaries at 128 and 256."""
    cache = world.advance_to(world.empty(), [120, 246, 505])
    rng = np.random.default_rng(0)
    for _ in range(4):
        start = np.asarray(cache["position"])
        wrong = [(world.tokens[b, s : s + 9] + 1 + rng.integers(0, 9)) % 256 for b, s in enumerate(start)]
        cache = rollback(world.step(cache, wrong).cache, jnp.asarray(start, jnp.int32))
        keep = [int(n) for n in rng.integers(0, 5, ROWS)]
        if any(keep):
            cache = world.advance(cache, keep)


def test_only_the_last_logits_are_those_of_the_last_real_token() -> None:
    small = small_model(small_config((0,), mtp=False, num_hash_layers=1, hc_sinkhorn_iters=1, hidden_size=32), seed=1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 9)))
    lengths = jnp.asarray([4, 9])
    model = small.model
    both = compiled(
        lambda p, t, n: (model.forward(p, t, lengths=n).logits, model.forward(p, t, lengths=n, last_only=True).logits)
    )
    every, last = both(small.params, tokens, lengths)
    assert last.shape == (2, 1, small.config.vocab_size)
    np.testing.assert_allclose(last[:, 0], every[jnp.arange(2), lengths - 1], rtol=0, atol=1e-6)


def test_drafting_without_an_mtp_block_is_an_error() -> None:
    small = small_model(small_config((0,), mtp=False, num_hash_layers=0), seed=1)
    with pytest.raises(ValueError, match="no MTP block"):
        small.model.forward(small.params, jnp.zeros((1, 2), jnp.int32), draft=True)


def test_a_model_is_a_static_value() -> None:
    small = small_config((4, 128), num_hash_layers=0)
    model = small_model(small).model
    assert hash(model) == hash(dataclasses.replace(model))
    assert model == dataclasses.replace(model)
