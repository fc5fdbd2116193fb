"""Attention for training and its gradient: kernels against the twin and the definition, at the edges, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import compiled
from test_compressed_attention import SCALE, WIDTH, WINDOW, Float64, Problem, make, oracle

from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.compressed_attention import gradient as of_training
from pallas_kernels.compressed_attention.multiplicity import multiplicity
from pallas_kernels.compressed_attention.training_plan import TrainingTiles
from pallas_kernels.registry import operations

# Small enough that a few dozen tokens take several turns of every loop.
SMALL = TrainingTiles(queries=32, heads=4, product_rows=64, entries=16)


@functools.cache
def program(cores: int):
    """(outputs, log sums, gradients) of the kernels with small tiles, heads dealt to ``cores``."""

    @compiled
    def run(cotangent, arguments):
        options = {"tiles": SMALL, "cores": cores, "interpret": True, "window_size": WINDOW, "scale": SCALE}
        out, sums = of_training._forward(**arguments, **options)
        return out, sums, of_training._backward(cotangent, out, sums, **arguments, **options)

    return run


@compiled
def twin(cotangent, arguments):
    arguments = arguments | {"window_size": WINDOW, "scale": SCALE}
    out, sums = of_training._twin_with_sums(**arguments)
    return out, sums, of_training._twin_gradient(cotangent, out, sums, **arguments)


def arguments_of(problem: Problem):
    """The arguments by name, and a cotangent."""
    args, kwargs = make(problem)
    names = ("entries", "counts", "indices", "window_counts", "first_entries")
    arguments = dict(zip(("q", "window", "sink", "start"), args, strict=True)) | dict.fromkeys(names) | kwargs
    del arguments["window_size"], arguments["scale"]
    cotangent = np.random.default_rng(7).normal(size=args[0].shape)
    return arguments, jnp.asarray(cotangent, args[0].dtype)


def packed():
    """Rows of documents: their windows and entries begin anew."""
    arguments, cotangent = arguments_of(Problem((0, 0), length=37, total=9))
    lengths = ((13, 1, 2, 21), (30, 7))
    places = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    done = np.cumsum(places % 4 == 3, axis=1)
    arguments["window_counts"] = jnp.asarray(np.minimum(places + 1, WINDOW), jnp.int32)
    arguments["counts"] = jnp.asarray(done, jnp.int32)
    arguments["first_entries"] = jnp.asarray(done - (places + 1) // 4, jnp.int32)
    entries = np.random.default_rng(3).normal(size=(2, 2, 9, WIDTH))
    return arguments | {"entries": jnp.asarray(entries, jnp.float32)}, cotangent


CASES = {
    "all visible": lambda: arguments_of(Problem((0, 61, -1), length=35, total=37)),
    "all visible, bfloat16": lambda: arguments_of(Problem((0, 61), length=20, total=23, dtype="bfloat16")),
    "selected": lambda: arguments_of(Problem((0, 50), length=35, total=37, selected=6)),
    "selected, repeated": lambda: arguments_of(Problem((30, 90), length=17, total=29, selected=9, indices="repeated")),
    "selected, all padding": lambda: arguments_of(Problem((30, 90), length=5, total=29, selected=9, indices="none")),
    "nothing to see but the sink": lambda: arguments_of(Problem((-3, -1), length=2)),
    "no entry yet": lambda: arguments_of(Problem((0, 1), length=2, total=5)),
    "window only": lambda: arguments_of(Problem((0, 5), length=40)),
    "packed documents": packed,
}

# float32: sums of up to 320 terms of size one, hundreds of units of 2^-24 apart in another order. bfloat16: weights and
# score gradients are rounded to 8 bits, once before and once after they are divided by the sum, as are the results.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-6}


@pytest.mark.parametrize("name", CASES)
def test_training_kernels_equal_the_twin(name):
    arguments, cotangent = CASES[name]()
    out, sums, gradients = program(1)(cotangent, arguments)
    expected = twin(cotangent, arguments)
    tolerance = TOLERANCE[arguments["q"].dtype.name]
    pairs = {"out": (out, expected[0]), "sums": (sums, expected[1])}
    pairs |= {f: (getattr(gradients, f), getattr(expected[2], f)) for f in gradients._fields}
    for field, (ours, theirs) in pairs.items():
        if theirs is None:
            assert ours is None
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.all(np.isfinite(ours)), field
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()), err_msg=field)


def test_gradient_is_the_slope_of_the_definition():
    arguments, cotangent = arguments_of(Problem((0, 30), length=20, total=12, selected=5, indices="repeated"))
    arguments = {
        k: v if k in ("counts", "indices") else jnp.nan_to_num(v) for k, v in arguments.items() if v is not None
    }
    absent = {"window_counts": None, "first_entries": None}
    _, _, gradients = program(1)(cotangent, arguments | absent)
    for seed, field in enumerate(gradients._fields):
        direction = np.random.default_rng(seed).normal(size=arguments[field].shape)

        def at(step, field=field, direction=direction):
            moved = arguments | {field: np.asarray(arguments[field], np.float64) + step * direction}
            args = [moved.pop(name) for name in ("q", "window", "sink", "start")]
            return np.sum(_in_float64(args, moved) * np.asarray(cotangent, np.float64))

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        along = float(np.sum(np.asarray(getattr(gradients, field), np.float64) * direction))
        # A central difference of step 1e-5 is good to about 1e-9; the rest is the kernel's float32.
        assert along == pytest.approx(slope, rel=1e-4, abs=1e-4), field


def _in_float64(args, moved):
    return oracle(args, moved | {"scale": SCALE, "entries": np.asarray(moved["entries"]).view(Float64)})


@pytest.mark.parametrize("name", ["all visible", "selected"])
def test_gradients_of_a_row_are_the_same_in_any_company(name):
    """Alone, in another slot, with more entries, more padding of indices and padding behind: the same bits."""
    arguments, cotangent = CASES[name]()
    together = program(1)(cotangent, arguments)
    more = 9
    rows = np.array([1, 0])
    behind = [(0, 0), (0, more)]

    def moved(a):
        return None if a is None else a[rows]

    other = arguments | {key: moved(arguments[key]) for key in ("q", "window", "start", "counts", "indices")}
    for key in ("q", "window", "counts", "indices"):
        if other[key] is not None:
            fill = -1 if key == "indices" else 0
            other[key] = jnp.pad(other[key], [*behind, *[(0, 0)] * (other[key].ndim - 2)], constant_values=fill)
    if other["indices"] is not None:
        other["indices"] = jnp.pad(other["indices"], [(0, 0), (0, 0), (0, 7)], constant_values=-1)
    entries = arguments["entries"][:, rows]
    other["entries"] = jnp.pad(entries, [(0, 0), (0, 0), (0, 27), (0, 0)], constant_values=jnp.nan)
    out, sums, gradients = program(1)(jnp.pad(cotangent[rows], [*behind, (0, 0), (0, 0)]), other)
    length, total = cotangent.shape[1], arguments["entries"].shape[2]
    for ours, theirs in (
        (out, together[0]),
        (sums, together[1]),
        (gradients.q, together[2].q),
        (gradients.window[:, :length], together[2].window[:, :length]),
        (gradients.entries[0][:, :total], together[2].entries[0]),
    ):
        np.testing.assert_array_equal(np.asarray(ours)[:, : theirs.shape[1]], np.asarray(theirs)[rows])


def test_cores_share_the_heads():
    arguments, cotangent = CASES["selected"]()
    one, two = program(1)(cotangent, arguments), program(2)(cotangent, arguments)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        # Sums over heads in two parts: units of float32 rounding.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_the_operation_differentiates_by_the_kernel_where_it_serves():
    """In the interpreter whose memory is NaN until it is written, too; a ring's gradient is the twin's."""
    arguments, cotangent = arguments_of(Problem((0,), length=3, total=5, selected=3))
    arguments = {k: v for k, v in arguments.items() if v is not None}

    def gradients(implementation, arguments):
        def loss(q, window, sink, entries):
            moved = arguments | {"q": q, "window": window, "sink": sink, "entries": entries}
            moved |= {"window_size": WINDOW, "scale": SCALE}
            return jnp.sum(compressed_attention(**moved, implementation=implementation) * cotangent)

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*(arguments[f] for f in of_training.Gradients._fields))

    ours, theirs = gradients("tpu_interpret", arguments), gradients("xla", arguments)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    assert any(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), "no kernel ran"


def test_repetitions_are_counted_whatever_their_number():
    rng = np.random.default_rng(0)
    once = np.stack([[rng.permutation(5000)[:40] - 1 for _ in range(3)] for _ in range(2)])
    often = rng.integers(-1, 5, (2, 3, 40))
    for indices in (once, often, np.full((1, 2, 300), 4), np.full((1, 2, 4), -1)):
        expected = np.zeros((*indices.shape[:2], 5000), np.int64)
        for place in np.ndindex(indices.shape):
            if indices[place] >= 0:
                expected[(*place[:2], indices[place])] += 1
        np.testing.assert_array_equal(multiplicity(jnp.asarray(indices, jnp.int32), 5000), expected)


def test_calls_that_the_gradient_kernel_does_not_serve_say_why():
    q = jax.ShapeDtypeStruct((1, 128, 64, 512), jnp.bfloat16)

    def reason(shape, dtype=jnp.bfloat16):
        return of_training.unserved(q, jax.ShapeDtypeStruct(shape, dtype), None, 128)

    assert reason((1, 1, 4096, 512)) is None
    assert reason((1, 1, 4097, 512)) == "4097 entries, at most 4096 with their gradients in VMEM"
    assert reason((1, 1, 64, 256), jnp.uint32) == "entries that are not plain"
    assert "a window of 200 tokens" in of_training.unserved(q, None, None, 200)


def test_costs_are_hand_sums():
    cases = {case.name: case.cost for case in operations()["compressed_attention_gradient"].cases()}
    cost = cases["flash/csa/train/4096"]
    seen = sum(min((t + 1) // 4, 512) + min(t + 1, 128) for t in range(4096))
    assert cost.operations == {"bfloat16": 5 * 2 * 64 * 512 * seen}
    queries, of_keys = 4096 * 64 * 512, (4096 + 1024) * 512
    assert cost.bytes_read == 2 * (3 * queries + of_keys) + 4 * (4096 * 64 + 4096 * 512 + 64)
    assert cost.bytes_written == 2 * queries + 4 * (of_keys + 64)
