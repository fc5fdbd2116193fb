"""What the TPU kernels say of one device's part of a cache, interpreted, against the twin's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_compressed_attention import Problem, make

from pallas_kernels.compressed_attention import compressed_attention, tpu, xla
from pallas_kernels.index_topk import index_topk


@pytest.mark.parametrize(
    "problem",
    [
        Problem((0, 9, 61), length=1, total=20, ring=16),
        Problem((0, 9, 61), length=2, total=20, selected=8, ring=16),
        Problem((40,), length=24, total=20, ring=16, dtype="bfloat16", words=True),
        Problem((40,), length=24, total=20, selected=8, ring=16, dtype="bfloat16", words=True),
        Problem((0, 9, 61), length=2, total=20, selected=8, ring=16, dtype="bfloat16", released=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [True, False], ids=["window", "no window"])
def test_parts_of_a_softmax(problem, window):
    (q, rows, _, start), options = make(problem)
    if not window:  # as to all devices but the first: it lies before the sequence
        start = jnp.full_like(start, -8 - problem.length)
    options = {"indices": None} | options | {"q": q, "window": rows, "start": start}
    found = [np.asarray(a) for a in tpu.partial_interpreted(**options)]
    expected = [np.asarray(a) for a in xla.partial_attention(**options)]
    assert [a.dtype for a in found] == [np.float32] * 3
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    seen = expected[2] > 0
    assert (found[1] == np.finfo(np.float32).min).all(where=~seen)
    assert (found[0] == 0).all(where=~seen)
    # Weights are rounded relative to the largest score so far: to 2^-8 where values are bfloat16.
    tolerance = 1e-5 if problem.dtype == "float32" else 1e-2
    for ours, theirs in ((found[0], expected[0]), (found[2], expected[2])):
        difference = np.abs(ours - theirs) / np.where(seen, expected[2], 1)
        assert difference.max(where=np.broadcast_to(seen, difference.shape), initial=0) < tolerance


def on_one_device(function, *arrays):
    """As on a mesh; the interpreter does not run on several devices at once."""
    mesh, specs = Mesh(jax.devices()[:1], ("context",)), PartitionSpec()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))(*arrays)


def test_operations_on_kernels():
    (q, rows, sink, start), options = make(Problem((0, 9, 61), length=2, total=20, selected=8, ring=16))
    split = functools.partial(compressed_attention, q, rows, sink, start, **options, implementation="tpu_interpret")
    found = on_one_device(lambda: split(entries_over=("context",)))
    # Float32 sums of a dozen values of order one, in another order.
    np.testing.assert_allclose(found, split(), atol=3e-6, rtol=0)
    rng = np.random.default_rng(0)
    q, weights, keys = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 3, 8), (2, 3, 3), (2, 2, 40, 8)))
    counts = jnp.asarray([[0, 3, 40], [33, 9, 1]], jnp.int32)
    split = functools.partial(index_topk, q, weights, keys, counts, layer=1, k=8, implementation="tpu_interpret")
    np.testing.assert_array_equal(on_one_device(lambda: split(keys_over=("context",))), split())
