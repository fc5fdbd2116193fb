"""compressed_attention: every implementation against a float64 oracle, at the edges, and bit for bit in company."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import as_bytes, pack_words, simulate_kv, unpack_words
from deepseek_v4.stored_rows import KVRows, KVWords
from pallas_kernels.compressed_attention import compressed_attention, gpu, tpu, tpu_words
from pallas_kernels.compressed_attention.blocks import Blocks
from pallas_kernels.compressed_attention.tpu_common import Tiles
from pallas_kernels.gradients import with_twin_gradient

WINDOW = 8
HEADS, WIDTH, ROPE = 8, 32, 4
SCALE = WIDTH**-0.5

# Small enough that a few dozen entries take several turns of every loop.
SMALL = Tiles(decode_queries=4, query_block=16, heads=4, product_rows=32, entries=16, chunk=8, group=4)


TWO_KERNELS = ("tpu_interpret, small tiles", "gpu_interpret, small blocks")


def _small_tiles(cores):
    def call(q, window, sink, start, **rest):
        arguments = {"ring": None, "entries": None, "counts": None, "indices": None, "layer": 0} | rest
        interpret = pltpu.InterpretParams(num_cores_or_threads=cores)
        return tpu.compressed_attention(
            q, window, sink, start, **arguments, tiles=SMALL, cores=cores, interpret=interpret
        )

    return call


def _named(implementation):
    return lambda *args, **rest: compressed_attention(*args, **rest, implementation=implementation)


def _small_blocks(q, window, sink, start, **rest):
    arguments = {"ring": None, "entries": None, "counts": None, "indices": None, "layer": 0} | rest
    # Small enough that a few dozen entries take several turns of every loop.
    return gpu.compressed_attention(
        q, window, sink, start, **arguments, blocks=Blocks(heads=4, keys=4, split=8), interpret=True
    )


IMPLEMENTATIONS = {
    "xla": _named("xla"),
    "tpu_interpret": _named("tpu_interpret"),
    "tpu_interpret, small tiles": _small_tiles(1),
    "tpu_interpret, small tiles, two cores": _small_tiles(2),
    "gpu_interpret": _named("gpu_interpret"),
    "gpu_interpret, small blocks": _small_blocks,
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows that begin at ``starts`` with ``length`` queries each; T entries, K indices (0: all visible).

    Entries are kept as words of bfloat16, in the bytes of the release (``KVWords``, or the ring too in ``by_rows``,
    ``KVRows``), or else in ``dtype``.
    """

    starts: tuple[int, ...]
    length: int = 1
    total: int = 0
    selected: int = 0
    ring: int = 0
    dtype: str = "float32"
    words: bool = False
    released: bool = False
    by_rows: bool = False
    ratio: int = 4
    indices: str = "holes"


def make(problem: Problem, seed: int = 0):
    """(args, kwargs) of the op: NaN wherever a reader has no business."""
    p = problem
    rng = np.random.default_rng(seed)
    batch = len(p.starts)
    q = rng.normal(size=(batch, p.length, HEADS, WIDTH)) * 2
    sink = rng.normal(size=HEADS)
    kwargs = {"window_size": WINDOW, "scale": SCALE, "layer": jnp.int32(1)}
    if p.ring:
        window = rng.normal(size=(batch, p.length, WIDTH))
        ring = np.full((2, batch, p.ring, WIDTH), np.nan)
        for b, start in enumerate(p.starts):
            for position in range(max(0, start - p.ring), start):
                ring[:, b, position % p.ring] = rng.normal(size=(2, WIDTH))
        ring = jnp.asarray(ring, p.dtype)
        kwargs["ring"] = in_released_rows(ring) if p.by_rows else ring
    else:
        window = rng.normal(size=(batch, WINDOW - 1 + p.length, WIDTH))
    for b, start in enumerate(p.starts):
        first = start if p.ring else start - (WINDOW - 1)
        window[b, : max(0, -first)] = np.nan
    if p.total:
        positions = np.array(p.starts)[:, None] + np.arange(p.length)
        counts = np.clip((positions + 1) // p.ratio, 0, p.total)
        entries = rng.normal(size=(2, batch, p.total, WIDTH))
        for b in range(batch):
            entries[:, b, counts[b].max() :] = np.nan
        entries = jnp.asarray(entries, p.dtype)
        form = in_released_rows if p.by_rows else in_released_bytes if p.released else lambda rows: rows
        kwargs["entries"] = pack_words(entries) if p.words else form(entries)
        kwargs["counts"] = jnp.asarray(counts, jnp.int32)
        if p.selected:
            indices = np.full((batch, p.length, p.selected), -1)
            for b in range(batch):
                for s in range(p.length):
                    number = min(counts[b, s], p.selected)
                    if p.indices == "none" or number == 0:
                        continue
                    places = rng.permutation(p.selected)[:number] if p.indices == "holes" else np.arange(number)
                    chosen = rng.permutation(counts[b, s])[:number]
                    if p.indices == "repeated":
                        chosen = rng.integers(0, counts[b, s], number)
                    indices[b, s, places] = chosen
            kwargs["indices"] = jnp.asarray(indices, jnp.int32)
    args = (
        jnp.asarray(q, p.dtype),
        jnp.asarray(window, p.dtype),
        jnp.asarray(sink, jnp.float32),
        jnp.asarray(p.starts, jnp.int32),
    )
    return args, kwargs


def in_released_bytes(entries):
    """As ``KVWords``, rounded as the release rounds; what is no number becomes bytes that are none."""
    sharing = WIDTH // (2 * ROPE)
    form = KVWords(jnp.zeros((sharing, WIDTH // 4), jnp.uint32), jnp.zeros((1, WIDTH // 4), jnp.uint32))
    return form.pack(simulate_kv(entries, ROPE))


def in_released_rows(rows):
    """As ``KVRows``, rounded and with bytes that are no number as there."""
    shapes = (((WIDTH - ROPE,), jnp.float8_e4m3fn), ((ROPE,), jnp.bfloat16), ((4,), jnp.float8_e8m0fnu))
    return KVRows(*(jnp.zeros(shape, dtype) for shape, dtype in shapes)).pack(simulate_kv(rows, ROPE))


def oracle(args, kwargs):
    """The op by its definition, one query and head at a time, in float64."""
    q, window, sink, start = (np.asarray(a, np.float64) for a in args)
    entries = kwargs.get("entries")
    if isinstance(entries, KVRows | KVWords):
        entries = entries.unpack(jnp.bfloat16)
    if entries is not None:
        entries = unpack_words(entries) if entries.dtype == jnp.uint32 else entries
        entries = np.asarray(entries, np.float64)[int(kwargs["layer"])]
    ring = kwargs.get("ring")
    ring = ring.unpack(jnp.bfloat16) if isinstance(ring, KVRows) else ring
    ring = None if ring is None else np.asarray(ring, np.float64)[int(kwargs["layer"])]
    out = np.zeros(q.shape)
    batch, length, heads, _ = q.shape
    for b in range(batch):
        for s in range(length):
            t = int(start[b]) + s
            keys = []
            for position in range(max(0, t - WINDOW + 1), t + 1):
                if ring is None:
                    keys.append(window[b, position - int(start[b]) + WINDOW - 1])
                elif position >= start[b]:
                    keys.append(window[b, position - int(start[b])])
                else:
                    keys.append(ring[b, position % ring.shape[1]])
            if entries is not None:
                if "indices" in kwargs:
                    chosen = [i for i in np.asarray(kwargs["indices"])[b, s] if i >= 0]
                else:
                    chosen = range(int(kwargs["counts"][b, s]))
                keys += [entries[b, i] for i in chosen]
            if not keys:
                continue
            keys = np.stack(keys)
            for h in range(heads):
                weights = np.exp(keys @ q[b, s, h] * kwargs["scale"])
                out[b, s, h] = weights @ keys / (weights.sum() + np.exp(sink[h]))
    return out


# float32: the oracle's sums of at most 60 keys of unit size differ by tens of units of 2^-24 of the result's size.
# bfloat16: weights and outputs are rounded to 8 bits, and outputs here are below 4: twice 4 * 2^-9, and the weights'
# errors average out.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}

PROBLEMS = {
    "window only, ring": Problem((0, 5, 40), ring=9),
    "window only, whole, several queries": Problem((0, 3, 40), length=3),
    "nothing to see but the sink": Problem((-3, -1), length=2),
    "all visible, one query": Problem((0, 3, 100), total=37, ring=7),
    "all visible, few queries": Problem((0, 5, 100), length=3, total=37, ring=11),
    "all visible, no entry yet": Problem((0, 1), total=5, ring=8),
    "all visible, one row of cache": Problem((2, 9), total=1),
    "all visible, words": Problem((0, 2, 100), length=2, total=37, dtype="bfloat16", words=True, ring=8),
    "all visible, plain bfloat16": Problem((7, 90), total=23, dtype="bfloat16"),
    "all visible, chunk": Problem((0, 100), length=21, total=37, ring=9),
    "all visible, chunk, whole window": Problem((3, 61), length=35, total=30),
    "selected": Problem((0, 5, 100), length=2, total=37, selected=12, ring=8),
    "selected, words": Problem((1, 60, 100), total=37, selected=20, dtype="bfloat16", words=True, ring=8),
    "selected, more indices than entries": Problem((0, 17), total=5, selected=19),
    "selected, repeated": Problem((30, 90), total=29, selected=9, indices="repeated"),
    "selected, all padding": Problem((30, 90), total=29, selected=9, indices="none"),
    "selected, chunk": Problem((100,), length=35, total=37, selected=6, ring=9),
    "window only, chunk": Problem((5,), length=40, ring=8),
    "released bytes": Problem((1, 60, 100), total=40, selected=20, dtype="bfloat16", released=True, ring=8),
    "released bytes, several queries": Problem(
        (0, 5, 100), length=2, total=40, selected=12, dtype="bfloat16", released=True, ring=8
    ),
    "released bytes, more indices than entries": Problem(
        (0, 17), total=8, selected=19, dtype="bfloat16", released=True
    ),
    "released bytes, repeated": Problem(
        (30, 90), total=32, selected=9, indices="repeated", dtype="bfloat16", released=True
    ),
    "released bytes, all padding": Problem(
        (30, 90), total=32, selected=9, indices="none", dtype="bfloat16", released=True
    ),
    "released bytes, chunk": Problem((100,), length=35, total=40, selected=6, dtype="bfloat16", released=True, ring=9),
}

# What GPUs keep; TPU kernels do not serve it.
BY_ROWS: dict[str, Any] = {"dtype": "bfloat16", "by_rows": True}
PROBLEMS_BY_ROWS = {
    "released rows, window only": Problem((0, 5, 40), ring=9, **BY_ROWS),
    "released rows, all visible": Problem((0, 5, 100), length=2, total=37, ring=11, **BY_ROWS),
    "released rows, all visible, chunk": Problem((0, 100), length=21, total=37, ring=9, **BY_ROWS),
    "released rows, selected": Problem((0, 60, 100), length=2, total=37, selected=12, ring=8, **BY_ROWS),
    "released rows, selected, whole window": Problem((30, 90), total=29, selected=9, indices="repeated", **BY_ROWS),
    "released rows, all padding": Problem((0, 90), total=29, selected=9, indices="none", ring=9, **BY_ROWS),
}
PROBLEMS |= PROBLEMS_BY_ROWS


# The interpreter takes seconds per call: what depends on neither tile sizes nor cores is not run for each of them.
CHUNKS = ("all visible, chunk", "all visible, chunk, whole window", "selected, chunk", "window only, chunk")
ON_GPUS = tuple(name for name, problem in PROBLEMS.items() if not problem.released)
ON_TPUS = tuple(name for name, problem in PROBLEMS.items() if not problem.by_rows)
RUNS = {
    "xla": (*ON_TPUS, "released rows, selected"),
    "tpu_interpret": ("window only, ring", "all visible, words", "selected, words", *CHUNKS[:1], "selected, chunk"),
    "tpu_interpret, small tiles": ON_TPUS,
    "tpu_interpret, small tiles, two cores": CHUNKS[1:],
    # Interpreting is slow: what the sizes of blocks do not touch runs with the small ones alone.
    "gpu_interpret": ("window only, ring", "all visible, words", "selected, words", "selected, all padding"),
    "gpu_interpret, small blocks": ON_GPUS,
}


@pytest.mark.parametrize(("implementation", "name"), [(i, name) for i, names in RUNS.items() for name in names])
def test_against_oracle(implementation, name):
    problem = PROBLEMS[name]
    args, kwargs = make(problem)
    got = IMPLEMENTATIONS[implementation](*args, **kwargs)
    assert got.dtype == args[0].dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), oracle(args, kwargs), atol=TOLERANCE[problem.dtype], rtol=0)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *((kernel, name) for kernel in TWO_KERNELS for name in ("all visible, few queries", "selected")),
        (TWO_KERNELS[0], "released bytes, several queries"),
        (TWO_KERNELS[1], "released rows, selected"),
    ],
)
def test_a_row_is_the_same_in_any_company(implementation, name):
    """Alone, in another slot, with a larger cache and more padding: the same bits."""
    call = IMPLEMENTATIONS[implementation]
    args, kwargs = make(PROBLEMS[name])
    together = np.asarray(call(*args, **kwargs))
    order = np.array([2, 0, 1])
    for rows in (order, order[:1]):
        q, window, sink, start = args
        ring = jax.tree.map(functools.partial(_of_rows, rows), kwargs["ring"])
        moved = dict(kwargs, ring=ring, counts=kwargs["counts"][rows])
        moved["entries"] = jax.tree.map(functools.partial(_with_spare, rows), kwargs["entries"])
        if "indices" in kwargs:
            moved["indices"] = jnp.pad(kwargs["indices"][rows], [(0, 0), (0, 0), (0, 9)], constant_values=-1)
        got = call(q[rows], window[rows], sink, start[rows], **moved)
        np.testing.assert_array_equal(np.asarray(got), together[rows])


def _of_rows(rows, cached):
    """Those rows of the batch, of a cache's arrays of single bytes as the bytes that they are."""
    return as_bytes(cached)[:, rows].view(cached.dtype)


def _with_spare(rows, entries):
    """Those rows of the batch, with more rows of cache; all ones are no number in words and single bytes either."""
    stored = as_bytes(entries)[:, rows]
    spare = entries.shape[2] if entries.dtype == jnp.uint32 else 27
    filler = np.array(-1).astype(stored.dtype) if jnp.issubdtype(stored.dtype, jnp.integer) else jnp.nan
    return jnp.pad(stored, [(0, 0), (0, 0), (0, spare), (0, 0)], constant_values=filler).view(entries.dtype)


def test_the_form_of_entries_does_not_show_in_the_result():
    """Released bytes and bfloat16 of the same numbers: the same bits, from kernel and twin alike."""
    args, kwargs = make(PROBLEMS["released bytes"])
    for implementation in ("tpu_interpret, small tiles", "xla"):
        call = IMPLEMENTATIONS[implementation]
        numbers = kwargs | {"entries": pack_words(kwargs["entries"].unpack(jnp.bfloat16))}
        np.testing.assert_array_equal(call(*args, **kwargs), call(*args, **numbers))


@pytest.mark.filterwarnings("ignore:invalid value")  # of NaNs, which some bytes are
@pytest.mark.parametrize(("width", "rope"), [(512, 64), (64, 16), (256, 16)])
def test_released_bytes_decode_exactly(width, rope):
    """Codes and scales of all bytes, RoPE dims of all bits; as by ml_dtypes in NumPy."""
    rng = np.random.default_rng(0)
    sharing, count, size, content = width // (2 * rope), 128, width // 4, width - rope
    stored = rng.integers(0, 256, (count, width), dtype=np.uint8)
    stored[:, :2] = np.arange(2 * count).reshape(count, 2)
    # Smaller ones lead below float32's normal numbers, which accelerators flush to zero.
    stored[:, content : content + -(-content // 64)] = rng.integers(16, 256, (count, -(-content // 64)))
    shifts = np.array([0, 8, 16, 24], np.uint32)
    words = np.bitwise_or.reduce(stored.reshape(count, 4, size).astype(np.uint32) << shifts[:, None], axis=1)
    shared = rng.integers(0, 1 << 32, (count // sharing, size), dtype=np.uint32)

    codes = stored[:, :content].view(jnp.float8_e4m3fn).astype(np.float64)
    scales = stored[:, content : content + -(-content // 64)].view(jnp.float8_e8m0fnu).astype(np.float64)
    halves = np.concatenate([shared & 0xFFFF, shared >> 16], axis=1).astype(np.uint16)
    own = halves.reshape(count, rope).view(jnp.bfloat16).astype(np.float64)
    expected = np.concatenate([codes * np.repeat(scales, 64, axis=1)[:, :content], own], axis=1)

    def numbers(rows):
        """What bfloat16 holds of them: it ends at 2^128, and subnormals may be zero."""
        rows = np.asarray(rows, np.float64 if rows.dtype == np.float64 else np.float32).astype(np.float64)
        rows = np.where(np.abs(rows) >= 2.0**128, np.sign(rows) * np.inf, rows)
        return np.where(np.abs(rows) < 2.0**-126, 0, rows)

    def kernel(words, shared, indices, out):
        plan = types.SimpleNamespace(rope_dims=rope, dtype=jnp.dtype(jnp.bfloat16))
        out[...] = tpu_words.keys_of_words(plan, words[...], shared[...], indices[...], jnp.int32(100))

    chosen = rng.integers(0, count, (1, count))
    found = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((count, width), jnp.bfloat16), interpret=pltpu.InterpretParams()
    )(words[chosen[0]], shared[chosen[0] // sharing], jnp.asarray(chosen, jnp.int32))
    np.testing.assert_array_equal(numbers(found[:100]), numbers(expected[chosen[0, :100]]))
    np.testing.assert_array_equal(numbers(found[100:]), 0)
    taken = KVWords(jnp.asarray(words)[None], jnp.asarray(shared)[None]).take(jnp.asarray(chosen))
    np.testing.assert_array_equal(numbers(taken.unpack(jnp.bfloat16)[0]), numbers(expected[chosen[0]]))


def test_gradients_are_those_of_the_definition():
    """Of the twin against finite differences of the oracle; of a kernel without a gradient the same bits."""
    problem = Problem((2, 30), length=2, total=9, selected=4, indices="repeated")
    args, kwargs = make(problem)
    args = (args[0], jnp.nan_to_num(args[1]), *args[2:])
    entries = jnp.nan_to_num(kwargs.pop("entries"))
    rng = np.random.default_rng(5)
    direction = [rng.normal(size=a.shape) for a in (*args[:3], entries)]
    cotangent = rng.normal(size=args[0].shape)

    def loss(call):
        def value(q, window, sink, entries):
            return jnp.sum(call(q, window, sink, args[3], entries=entries, **kwargs) * cotangent)

        return jax.grad(value, argnums=(0, 1, 2, 3))(*args[:3], entries)

    twin = loss(IMPLEMENTATIONS["xla"])

    def at(step):
        moved = [np.asarray(a, np.float64) + step * d for a, d in zip((*args[:3], entries), direction, strict=True)]
        return np.sum(oracle((*moved[:3], args[3]), {**kwargs, "entries": Float64(moved[3])}) * cotangent)

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    along = sum(float(np.sum(np.asarray(g, np.float64) * d)) for g, d in zip(twin, direction, strict=True))
    # A central difference of step 1e-5 is good to about 1e-9; the rest is the twin's float32.
    assert along == pytest.approx(slope, rel=1e-4)
    for ours, theirs in zip(loss(IMPLEMENTATIONS["gpu_interpret"]), twin, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Float64(np.ndarray):
    """Entries that stay float64 on their way through the oracle."""

    def __new__(cls, values):
        return np.asarray(values).view(cls)


def test_gradient_leaves_integers_and_words_alone():
    args, kwargs = make(PROBLEMS["all visible, words"])

    def value(q):
        call = with_twin_gradient(_small_tiles(1), _named("xla"))
        return jnp.sum(call(q=q, window=args[1], sink=args[2], start=args[3], **kwargs).astype(jnp.float32))

    assert np.all(np.isfinite(np.asarray(jax.grad(value)(args[0]), np.float32)))


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    args, kwargs = make(PROBLEMS["selected"])
    with pytest.raises(ValueError, match="'tpu': head_dim 32 is not a multiple of 256"):
        compressed_attention(*args, **kwargs, implementation="tpu")
    with pytest.raises(ValueError, match=r"no implementation 'fast'; available: .*xla"):
        compressed_attention(*args, **kwargs, implementation="fast")
    args, kwargs = make(PROBLEMS["released bytes"])
    with pytest.raises(ValueError, match="'gpu_interpret': entries in the released bytes"):
        compressed_attention(*args, **kwargs, implementation="gpu_interpret")
    with pytest.raises(ValueError, match="entries in words of released bytes that are not selected"):
        compressed_attention(*args, **kwargs | {"indices": None}, implementation="tpu_interpret")
