"""``compress``, every implementation against a float64 loop over windows."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.cache import ring_write
from deepseek_v4.layer_spec import RopeSpec
from pallas_kernels.compress import compress, tpu
from pallas_kernels.compress.cost import compress_cost, kernel_bytes
from pallas_kernels.registry import operations
from pallas_kernels.targets import chip

IMPLEMENTATIONS = ("xla", "tpu_interpret", "gpu_interpret")
ROPE = RopeSpec(10000.0, 16, None)
EPS = 1e-6
WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Kind:
    ratio: int
    overlap: bool

    @property
    def pool_rows(self):
        return self.ratio * (2 if self.overlap else 1)

    @property
    def channels(self):
        return WIDTH * (2 if self.overlap else 1)


CSA, HCA = Kind(4, True), Kind(128, False)


def sequences(kind, batch, total, seed=0):
    """kv and score of whole sequences [B, total, channels], and the norm's weight."""
    rng = np.random.default_rng(seed)
    kv = rng.normal(size=(batch, total, kind.channels)).astype(np.float32)
    score = 2 * rng.normal(size=(batch, total, kind.channels)).astype(np.float32)
    return kv, score, jnp.asarray(rng.uniform(0.5, 1.5, WIDTH), jnp.float32)


def oracle(kind, kv, score, weight, window):
    """Entry ``window`` of one sequence [total, channels], in float64."""
    kv, score = kv.astype(np.float64), score.astype(np.float64)
    own = slice(window * kind.ratio, (window + 1) * kind.ratio)
    low = WIDTH if kind.overlap else 0
    values, scores = [*kv[own, low:]], [*score[own, low:]]
    if kind.overlap and window:
        before = slice((window - 1) * kind.ratio, window * kind.ratio)
        values += [*kv[before, :WIDTH]]
        scores += [*score[before, :WIDTH]]
    weights = np.exp(np.array(scores) - np.max(scores, axis=0))
    entry = np.sum(weights * np.array(values), axis=0) / np.sum(weights, axis=0)
    entry = entry / np.sqrt(np.mean(entry**2) + EPS) * np.asarray(weight, np.float64)
    # Angles are float32 by definition.
    powers = (ROPE.theta ** (np.arange(0, ROPE.dims, 2) / ROPE.dims)).astype(np.float32)
    angles = np.float32(window * kind.ratio) * (np.float32(1) / powers)
    pairs = entry[-ROPE.dims :].reshape(-1, 2) @ [1, 1j]
    turned = pairs * np.exp(1j * angles.astype(np.float64))
    return np.concatenate([entry[: -ROPE.dims], np.stack([turned.real, turned.imag], -1).reshape(-1)])


def rings(kind, kv, score, start, rollback=1):
    """Rings of two layers as the calls before would leave layer 1; everything else, and rows never written, is NaN."""
    size = kind.pool_rows - 1 + rollback
    found = []
    for rows in (kv, score):
        ring = jnp.full((2, rows.shape[0], size, rows.shape[2]), jnp.nan, jnp.float32)
        lengths = jnp.asarray(start, jnp.int32)
        found.append(ring_write(ring, 1, jnp.zeros_like(lengths), lengths, jnp.asarray(rows)))
    return found


@functools.cache
def compiled(kind, implementation, dtype="float32"):
    return jax.jit(
        functools.partial(
            compress,
            ratio=kind.ratio,
            overlap=kind.overlap,
            rope=ROPE,
            norm_eps=EPS,
            dtype=jnp.dtype(dtype),
            implementation=implementation,
        )
    )


def call(kind, implementation, kv, score, weight, start, lengths, length, dtype="float32", rollback=1):
    """One call of ``length`` rows at ``start`` of each sequence; rows beyond ``lengths`` are garbage."""
    start, lengths = np.asarray(start), np.asarray(lengths)
    new = [np.full((kv.shape[0], length, kind.channels), 1e4, np.float32) for _ in range(2)]
    for rows, whole in zip(new, (kv, score), strict=True):
        for b in range(len(start)):
            rows[b, : lengths[b]] = whole[b, start[b] : start[b] + lengths[b]]
    kv_ring, score_ring = rings(kind, kv, score, start, rollback)
    arguments = (jnp.asarray(new[0]), jnp.asarray(new[1]), weight, jnp.asarray(start), jnp.asarray(lengths))
    run = compiled(kind, implementation, dtype)
    return np.asarray(run(*arguments, kv_ring=kv_ring, score_ring=score_ring, layer=1), np.float64)


def check(kind, found, kv, score, weight, start, lengths, rtol=0.0, atol=5e-6):
    """float32 sums of up to 128 terms of order one, normed: a few times 2^-24; or one rounding to bfloat16."""
    assert np.all(np.isfinite(found))
    for b in range(len(start)):
        first = start[b] // kind.ratio
        for window in range(first, (start[b] + lengths[b]) // kind.ratio):
            expected = oracle(kind, kv[b], score[b], weight, window)
            np.testing.assert_allclose(found[b, window - first], expected, rtol=rtol, atol=atol)


# Single tokens in every phase, the first windows, drafts, chunks with partial windows, padding and empty rows.
@pytest.mark.parametrize(
    ("kind", "start", "lengths", "length"),
    [
        (CSA, [3, 7, 8, 9, 10, 11], [1, 1, 1, 1, 1, 1], 1),
        (HCA, [127, 128, 255, 300], [1, 1, 1, 1], 1),
        (CSA, [0, 1, 5, 17], [5, 3, 0, 4], 5),
        (HCA, [0, 125, 250], [4, 4, 3], 4),
        (CSA, [0, 6, 21], [77, 80, 33], 80),
        (HCA, [0, 70], [300, 290], 300),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_float64(implementation, kind, start, lengths, length):
    kv, score, weight = sequences(kind, len(start), 400)
    found = call(kind, implementation, kv, score, weight, start, lengths, length, rollback=4)
    check(kind, found, kv, score, weight, start, lengths)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_entries_are_rounded_where_the_reference_rounds(implementation):
    kv, score, weight = sequences(CSA, 2, 64, seed=1)
    found = call(CSA, implementation, kv, score, weight, [3, 8], [40, 40], 40, "bfloat16")
    # Before the norm, after it and after the rotation of order-one values: three roundings of 2^-9 each.
    check(CSA, found, kv, score, weight, [3, 8], [40, 40], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("kind", [CSA, HCA])
def test_blocks_of_rows_and_groups_of_sequences_change_nothing(kind):
    """A chunk of several blocks, the last one partial, and sequences that share a step: bit for bit."""
    kv, score, weight = sequences(kind, 4, 700, seed=2)
    start, lengths, length = [5, 130, 0, 64], [600, 500, 17, 0], 600
    kv_ring, score_ring = (np.asarray(ring) for ring in rings(kind, kv, score, start))
    padded = [np.pad(whole, ((0, 0), (0, length), (0, 0))) for whole in (kv, score)]
    rows = [np.stack([p[b, s : s + length] for b, s in enumerate(start)]) for p in padded]
    constants = {"ratio": kind.ratio, "overlap": kind.overlap, "rope": ROPE, "norm_eps": EPS, "dtype": jnp.float32}

    def run(which, tiles):
        which = np.array(which)
        call = jax.jit(functools.partial(tpu.compress, tiles=tiles, interpret=True, layer=1, **constants))
        arguments = {
            "kv": rows[0][which],
            "score": rows[1][which],
            "norm_weight": weight,
            "start": np.array(start)[which],
            "lengths": np.array(lengths)[which],
            "kv_ring": kv_ring[:, which],
            "score_ring": score_ring[:, which],
        }
        return np.asarray(call(**jax.block_until_ready(jax.tree.map(jnp.asarray, arguments))))

    whole = run([0, 1, 2, 3], tpu.Tiles(rows=1024, group=1))
    check(kind, whole, kv, score, weight, start, lengths)
    np.testing.assert_array_equal(run([0, 1, 2, 3], tpu.Tiles(rows=128)), whole)
    np.testing.assert_array_equal(run([0, 1, 2, 3], tpu.Tiles(rows=2048, group=2, ahead=1)), whole)
    np.testing.assert_array_equal(run([3, 1], tpu.Tiles(rows=2048)), whole[[3, 1]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_split_into_calls_gives_the_same_entries(implementation):
    kv, score, weight = sequences(CSA, 1, 48, seed=3)
    whole = call(CSA, implementation, kv, score, weight, [0], [48], 48)[0]
    for cuts in ((0, 5, 48), (0, 3, 4, 8, 21, 48)):
        for start, end in itertools.pairwise(cuts):
            found = call(CSA, implementation, kv, score, weight, [start], [end - start], 48)[0]
            first, complete = start // 4, end // 4 - start // 4
            expected = whole[first : first + complete]
            if implementation == "xla":
                np.testing.assert_allclose(found[:complete], expected, atol=2e-6)
            else:
                np.testing.assert_array_equal(found[:complete], expected)


def test_without_rings_a_sequence_begins():
    kv, score, weight = sequences(CSA, 2, 40, seed=4)
    arguments = (jnp.asarray(kv), jnp.asarray(score), weight, jnp.zeros(2, jnp.int32), jnp.asarray([40, 13]))
    for implementation in IMPLEMENTATIONS:
        found = np.asarray(compiled(CSA, implementation)(*arguments), np.float64)
        check(CSA, found, kv, score, weight, [0, 0], [40, 13])


def test_gradients_are_the_twins():
    kv, score, weight = sequences(CSA, 2, 24, seed=5)
    start, lengths = jnp.zeros(2, jnp.int32), jnp.asarray([24, 24])

    def gradient(implementation):
        def value(kv, score, weight):
            out = compiled(CSA, implementation)(kv, score, weight, start, lengths)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

        return jax.grad(value, argnums=(0, 1, 2))(jnp.asarray(kv), jnp.asarray(score), weight)

    for ours, theirs in zip(gradient("tpu_interpret"), gradient("xla"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_served_is_said():
    kv = jnp.zeros((1, 4, 2 * 96))
    ask = functools.partial(tpu.unserved, chip("v6e"), kv_ring=None, ratio=4, overlap=True, rope=ROPE, dtype="float32")
    assert "whole tiles of 128" in ask(kv)
    assert "expected float32" in ask(jnp.zeros((1, 4, 256), jnp.bfloat16))
    assert ask(jnp.zeros((1, 4, 256))) is None
    assert "no multiple of 8" in ask(jnp.zeros((1, 4, 128)), ratio=20, overlap=False)
    ring = jnp.zeros((2, 1, 11, 256))
    assert "rings of 11 rows" in ask(jnp.zeros((1, 4, 256)), kv_ring=ring)
    assert ask(jnp.zeros((1, 4, 256)), kv_ring=ring, compiled=False) is None
    assert "at most 16384" in ask(jnp.zeros((1, 0, 256)))


def test_counted_bytes_are_hand_sums():
    cases = {case.name: case for case in operations()["compress"].cases()}
    entry = 512 * 2
    decode = cases["flash-pro/hca/decode/64"].cost
    assert (decode.bytes_read, decode.bytes_written) == (128 * 512 * 8 + 4 * 512, entry)
    csa = cases["flash-pro/csa/decode/64"].cost
    assert (csa.bytes_read, csa.bytes_written) == (16 * 8 * 512 * 8 + 4 * 512, 16 * entry)
    chunk = cases["flash-pro/csa/prefill/2048"].cost
    assert chunk.bytes_read == 2048 * 1024 * 8 + 4 * 512
    assert chunk == compress_cost(completed=512, pool_rows=8, width=512)
    # Within 10 % of the least for a chunk: the ring, sines and cosines beside it.
    moved = kernel_bytes(batch=1, length=2048, channels=1024, width=512, ratio=4, ring_rows=8)
    assert 1 < moved / chunk.bytes_moved < 1.1
