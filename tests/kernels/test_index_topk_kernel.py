"""The kernels of index_topk, interpreted, against a float64 oracle: ties, collisions, bits in company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from small_models import compiled

from deepseek_v4.formats import simulate_fp4
from deepseek_v4.stored_rows import KeyColumns, KeyRows
from pallas_kernels.index_topk import gpu, gpu_plan, index_topk, merge, tpu, xla
from pallas_kernels.registry import operations

HEADS, WIDTH = 3, 8
KERNELS = pytest.mark.parametrize("kernel", ["tpu_interpret", "gpu_interpret"])


def _arrays(rng, batch, length, entries, *, integers):
    draw = (lambda *shape: rng.integers(-1, 2, shape)) if integers else (lambda *shape: rng.normal(size=shape))
    q, weights, keys = draw(batch, length, HEADS, WIDTH), draw(batch, length, HEADS), draw(2, batch, entries, WIDTH)
    keys[0] = np.nan if not integers else 0
    return q.astype(np.float32), weights.astype(np.float32), keys.astype(np.float32)


def _scores(q, weights, keys):
    """float64 [B, S, T] of layer 1."""
    products = np.einsum("bqhd,bkd->bqhk", q.astype(np.float64), keys[1].astype(np.float64))
    return np.einsum("bqh,bqhk->bqk", weights.astype(np.float64), np.maximum(products, 0))


def _best(scores, counts, k):
    """Descending score, ties to the lowest index, -1 where fewer are visible."""
    out = np.full((*counts.shape, min(k, scores.shape[-1])), -1)
    for at in np.ndindex(counts.shape):
        order = np.argsort(-scores[at][: counts[at]], kind="stable")[:k]
        out[at][: len(order)] = order
    return out


def _found(kernel, q, weights, keys, counts, k):
    arguments = {"q": q, "weights": weights, "keys": keys, "counts": np.asarray(counts, np.int32)}
    arguments = {name: jnp.asarray(a) for name, a in arguments.items()}
    return np.asarray(index_topk(**arguments, layer=1, k=k, implementation=kernel))


@KERNELS
@pytest.mark.parametrize(
    ("batch", "length", "entries", "k"),
    [
        (1, 3, 37, 40),  # fewer than asked for
        (2, 2, 2500, 512),  # a part of a last chunk
        (1, 2, 9000, 1024),  # more chunks than layers in a pass
    ],
)
def test_exact_and_stable_under_many_ties(kernel, batch, length, entries, k):
    """Small integers are exact in float32, and tie all the time, at the k-th place too."""
    rng = np.random.default_rng(entries)
    q, weights, keys = _arrays(rng, batch, length, entries, integers=True)
    counts = rng.integers(0, entries + 1, (batch, length))
    counts[0, 0] = entries
    counts[-1, -1] = 0 if batch > 1 else 5
    found = _found(kernel, q, weights, keys, counts, k)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), counts, k))


@KERNELS
def test_all_that_is_selected_may_lie_in_one_place_of_every_chunk(kernel):
    """The packing's worst case: one lane of one row of 12 chunks, behind and between ties at zero."""
    entries, stride = 12 * 1024, 1024
    keys = np.zeros((2, 1, entries, WIDTH), np.float32)
    keys[1, 0, 77::stride, 0] = np.arange(12)[::-1] % 5 + 1
    keys[1, 0, 300, 0] = -1
    q = np.zeros((1, 1, HEADS, WIDTH), np.float32)
    q[..., 0] = 1
    weights = np.ones((1, 1, HEADS), np.float32)
    found = _found(kernel, q, weights, keys, [[entries]], 32)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), np.array([[entries]]), 32))


@KERNELS
@pytest.mark.parametrize("tied", [False, True])
def test_candidates_of_many_chunks_and_too_many_of_them(kernel, tied):
    """Candidates are picked before they are searched, unless too many tie; float32 holds the integers' sums exactly."""
    entries, rng = 18 * 1024 - 40, np.random.default_rng(6)
    q, weights, keys = (rng.integers(-50, 51, shape) for shape in ((1, 3, 3, 8), (1, 3, 3), (2, 1, entries, 8)))
    if tied:
        q[0, 1] = 0
    q, weights, keys = (a.astype(np.float32) for a in (q, weights, keys))
    counts = np.array([[entries, 17 * 1024 + 5, 700]])
    found = _found(kernel, q, weights, keys, counts, 512)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), counts, 512))


@pytest.fixture(scope="module", params=["tpu_interpret", "gpu_interpret"])
def random_case(request):
    rng = np.random.default_rng(3)
    q, weights, keys = _arrays(rng, 2, 5, 4100, integers=False)
    counts = np.array([[4100, 4000, 513, 2048, 1], [512, 0, 3000, 1025, 4099]])
    keys[1, 1, 4099:] = np.nan
    return q, weights, keys, counts, _found(request.param, q, weights, keys, counts, 512), request.param


def test_random_scores_are_selected_as_float64_would(random_case):
    q, weights, keys, counts, found, _ = random_case
    scores = _scores(q, weights, keys)
    np.testing.assert_array_equal(found, _best(scores, counts, 512))


def test_bits_do_not_depend_on_company(random_case):
    """One query alone, chunks of queries, other blocks, groups and two cores select what all of them together do."""
    q, weights, keys, counts, found, kernel = random_case
    arguments = {"q": q, "weights": weights, "keys": keys, "counts": np.asarray(counts, np.int32)}
    arguments = {name: jnp.asarray(a) for name, a in arguments.items()}
    one = {name: a if name == "keys" else a[1:, 2:3] for name, a in arguments.items()}
    if kernel == "gpu_interpret":
        ways = ({"budget": 1}, {"parts": gpu_plan.Parts(1024, 4)})
        ways = tuple(way | {"interpret": True} for way in ways)
        call = gpu.ranked_topk
    else:
        cores = [pltpu.InterpretParams(num_cores_or_threads=n) for n in (1, 2)]
        ways = {"interpret": cores[0]}, {"tiles": tpu.Tiles(queries=2, slots=2), "cores": 2, "interpret": cores[1]}
        call = tpu.ranked_topk
    _, alone = call(**one, layer=1, k=512, first_row=jnp.int32(1), **ways[0])
    np.testing.assert_array_equal(alone, found[1:, 2:3])
    scores, dealt = call(**arguments, layer=1, k=512, **ways[1])
    np.testing.assert_array_equal(dealt, found)
    expected = np.take_along_axis(_scores(q, weights, keys), np.maximum(found, 0), axis=-1)
    # float32 sums of 24 products of order one.
    np.testing.assert_allclose(scores, np.where(found >= 0, expected, -np.inf), rtol=0, atol=2e-5)


def test_groups_of_queries_and_longer_tournaments_change_nothing():
    """Chunks of prompts in several groups of blocks, the last of which are computed twice; six rounds."""
    rng = np.random.default_rng(8)
    q, weights, keys = _arrays(rng, 2, 11, 3000, integers=True)
    counts = rng.integers(0, 3001, (2, 11))
    p = gpu_plan.Plan(2, 11, 3000, 60, gpu_plan.Parts(128, 4), 900_000, True)
    assert (p.queries, p.blocks, p.group, [parts for _, parts in p.rounds]) == (8, 4, 3, [24, 12, 6, 3, 2, 1])
    arguments = {"q": q, "weights": weights, "keys": keys, "counts": np.asarray(counts, np.int32)}
    arguments = {name: jnp.asarray(a) for name, a in arguments.items()}
    _, found = gpu.ranked_topk(**arguments, layer=1, k=60, parts=p.parts, budget=p.budget, interpret=True)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), counts, 60))


@KERNELS
def test_bfloat16_keys_select_as_float64_would(kernel):
    rng = np.random.default_rng(5)
    q, weights, keys = _arrays(rng, 1, 1, 1500, integers=False)
    q, keys = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (q, keys))
    arguments = (jnp.asarray(q, jnp.bfloat16), jnp.asarray(weights), jnp.asarray(keys, jnp.bfloat16))
    found = index_topk(*arguments, jnp.array([[1500]]), layer=1, k=100, implementation=kernel)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), np.array([[1500]]), 100))


def _columns(keys):
    words = (keys.shape[-1] // 8, -(-keys.shape[-1] // 128))
    return KeyColumns(*(jnp.zeros((count, 1), jnp.uint32) for count in words)).pack(jnp.asarray(keys))


@KERNELS
@pytest.mark.parametrize("width", [32, 128, 160])  # halves of a group, the released width, groups across halves
def test_fp4_columns_select_as_float64_would_and_as_their_numbers_do(kernel, width):
    """Part of a last chunk, every code at many scales; columns that no query sees hold what decodes to NaN."""
    rng = np.random.default_rng(width)
    shape = (2, 2, 1152, width)
    numbers = np.asarray(rng.normal(size=shape) * 2.0 ** rng.integers(-40, 40, (*shape[:-1], 1)), np.float32)
    numbers[1, 0, 100:400] = numbers[1, 0, 7]  # ties at the largest scores and at zero
    keys = np.asarray(simulate_fp4(jnp.asarray(numbers, jnp.bfloat16)), np.float32)
    q = np.asarray(simulate_fp4(jnp.asarray(rng.normal(size=(2, 3, HEADS, width)), jnp.bfloat16)), np.float32)
    weights = rng.normal(size=(2, 3, HEADS)).astype(np.float32)
    counts = np.array([[1100, 400, 5], [1100, 0, 1024]])
    columns = _columns(keys)
    columns = KeyColumns(
        columns.code_words.at[..., 1100:].set(~jnp.uint32(0)), columns.scale_words.at[..., 1100:].set(~jnp.uint32(0))
    )
    arguments = {"q": jnp.asarray(q, jnp.bfloat16), "weights": jnp.asarray(weights), "counts": jnp.asarray(counts)}
    ranked = gpu.interpreted if kernel == "gpu_interpret" else tpu.interpreted
    scores, found = ranked(keys=columns, **arguments, layer=1, k=512)
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), counts, 512))
    if width == 128 and kernel == "tpu_interpret":
        # The same numbers enter the same products, which on GPUs are two of half the channels each.
        rows = jnp.asarray(keys, jnp.bfloat16)
        expected = tpu.ranked_topk(keys=rows, **arguments, layer=1, k=512, interpret=pltpu.InterpretParams())
        np.testing.assert_array_equal(scores, expected[0])
        np.testing.assert_array_equal(found, expected[1])


def test_fp4_rows_give_the_bits_that_their_numbers_give_on_gpus():
    """Part of a last tile, every code at many scales; rows that no query sees hold bytes whose scales are NaN."""
    rng = np.random.default_rng(4)
    numbers = rng.normal(size=(2, 1, 300, 128)) * 2.0 ** rng.integers(-40, 40, (2, 1, 300, 1))
    rows = KeyRows(jnp.zeros(64, jnp.uint8), jnp.zeros(4, jnp.float8_e8m0fnu)).pack(jnp.asarray(numbers, jnp.float32))
    keys = rows.unpack(jnp.bfloat16)
    nowhere = np.arange(300)[:, None] >= 290
    unseen = (np.where(nowhere, np.uint8(255), np.asarray(part).view(np.uint8)) for part in rows)
    rows = KeyRows(*(jnp.asarray(part.view(form.dtype)) for part, form in zip(unseen, rows, strict=True)))
    q, weights = rng.normal(size=(1, 3, HEADS, 128)), rng.normal(size=(1, 3, HEADS))
    arguments = {"q": jnp.asarray(q, jnp.bfloat16), "weights": jnp.asarray(weights, jnp.float32)}
    arguments |= {"counts": jnp.asarray([[290, 0, 256]]), "layer": 1, "k": 64}
    for found, expected in zip(
        gpu.interpreted(keys=rows, **arguments), gpu.interpreted(keys=keys, **arguments), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (4, 3), (3, 1)])  # queries, rows, or nothing is shared out
@pytest.mark.parametrize("keys_over", [(), ("context",)])
@pytest.mark.parametrize("topk", [merge.kernel_topk, merge.twin_topk])
def test_split_heads_are_brought_together(batch, length, keys_over, topk):
    """On simulated devices, the twin also in the kernel's place: what whole heads and whole keys give, bit for bit."""
    rng = np.random.default_rng(batch)
    q, weights, keys = _arrays(rng, batch, length, 48, integers=True)
    q, weights = (np.concatenate([a, a[:, :, :1]], axis=2) for a in (q, weights))
    dtype = jnp.bfloat16 if batch > 1 else jnp.float32
    counts = rng.integers(0, 49, (batch, length))

    def call(q, weights, keys, counts):
        arguments = {"q": q, "weights": weights, "keys": keys, "counts": counts, "layer": 1, "k": 7}
        return topk(xla.ranked_topk, **arguments, sum_over=("outer", "inner"), keys_over=keys_over)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("outer", "inner", "context"))
    heads = P(None, None, ("outer", "inner"))
    specs = (heads, heads, P(None, None, *keys_over), P())
    split = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    found = compiled(split)(jnp.asarray(q, dtype), jnp.asarray(weights), jnp.asarray(keys, dtype), jnp.asarray(counts))
    np.testing.assert_array_equal(found, _best(_scores(q, weights, keys), counts, 7))


def test_what_no_kernel_serves_is_refused_by_name_and_left_to_the_twin():
    q, weights, counts = jnp.zeros((1, 1, 2, 64)), jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32)
    keys = jnp.zeros((1, 1, 40, 64))
    published = KeyRows(jnp.zeros((1, 1, 40, 32), jnp.uint8), jnp.ones((1, 1, 40, 2), jnp.float8_e8m0fnu))
    uneven = KeyColumns(jnp.zeros((1, 1, 8, 40), jnp.uint32), jnp.zeros((1, 1, 1, 40), jnp.uint32))
    many = jax.ShapeDtypeStruct((1, 1, 1 << 19, 64), jnp.float32)
    with pytest.raises(ValueError, match="2 heads are not a power of two of at least 16"):
        index_topk(q.astype(jnp.bfloat16), weights, keys, counts, k=4, implementation="gpu")
    with pytest.raises(ValueError, match="released rows of 64 channels, expected 128"):
        index_topk(q.astype(jnp.bfloat16), weights, published, counts, k=4, implementation="gpu")
    for keys_of_call, rest, reason in (
        (keys, {"first_entries": counts}, "several documents"),
        (published, {}, "published layout by rows"),
        (uneven, {}, "40 columns of keys are not a multiple of 128"),
        (many, {}, "524288 keys, at most 262144"),
    ):
        with pytest.raises(ValueError, match=reason):
            index_topk(q, weights, keys_of_call, counts, k=4, implementation="tpu_interpret", **rest)
    for keys_of_call, rest in ((keys, {"first_entries": counts}), (published, {}), (uneven, {})):
        assert index_topk(q, weights, keys_of_call, counts, k=4, implementation="tpu_interpret|xla", **rest).shape == (
            1,
            1,
            4,
        )


def test_costs_are_hand_sums():
    cases = {case.name: case.cost for case in operations()["index_topk"].cases()}
    decode = cases["flash/decode/64x128K"]
    assert decode.bytes_read == 64 * (64 * (128 * 2 + 4) + 4 + 32768 * 256)
    assert decode.bytes_written == 64 * 512 * 4
    assert decode.operations == {"bfloat16": 64 * 64 * 128 * 2 * 32768}
    packed = cases["flash/fp4/decode/64x128K"]
    assert decode.bytes_read - packed.bytes_read == 64 * 32768 * (256 - 68)
    prefill = cases["pro/prefill/2048x8K"]
    visible = sum((t + 1) // 4 for t in range(8192 - 2048, 8192))
    assert prefill.operations == {"bfloat16": 64 * 128 * 2 * visible}
