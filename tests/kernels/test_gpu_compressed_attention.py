"""The GPU kernel of compressed_attention, interpreted: against the float64 oracle, in company, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered_for_cuda
from test_compressed_attention import PROBLEMS, TOLERANCE, make, oracle

from pallas_kernels.compressed_attention import compressed_attention, gpu
from pallas_kernels.compressed_attention.blocks import TABLE, Blocks
from pallas_kernels.registry import operations


def _small(q, window, sink, start, **rest):
    arguments = {"ring": None, "entries": None, "counts": None, "indices": None, "layer": 0} | rest
    # Small enough that a few dozen entries take several turns of every loop.
    return gpu.compressed_attention(q, window, sink, start, **arguments, blocks=Blocks(heads=4, keys=4), interpret=True)


def _default(*args, **rest):
    return compressed_attention(*args, **rest, implementation="gpu_interpret")


# Interpreting is slow: what block sizes do not touch runs with the small ones alone.
DEFAULT_RUNS = ("window only, ring", "all visible, words", "selected, words", "selected, all padding")


@pytest.mark.parametrize(
    ("call", "name"), [*((_small, name) for name in PROBLEMS), *((_default, name) for name in DEFAULT_RUNS)]
)
def test_against_oracle(call, name):
    problem = PROBLEMS[name]
    args, kwargs = make(problem)
    got = call(*args, **kwargs)
    assert got.dtype == args[0].dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), oracle(args, kwargs), atol=TOLERANCE[problem.dtype], rtol=0)


@pytest.mark.parametrize("name", ["all visible, few queries", "selected"])
def test_a_row_is_the_same_in_any_company(name):
    """Alone, in another slot, with a larger cache and more padding: the same bits."""
    args, kwargs = make(PROBLEMS[name])
    together = np.asarray(_small(*args, **kwargs))
    order = np.array([2, 0, 1])
    q, window, sink, start = args
    for rows in (order, order[:1]):
        moved = dict(kwargs, ring=kwargs["ring"][:, rows], counts=kwargs["counts"][rows])
        entries = kwargs["entries"][:, rows]
        moved["entries"] = jnp.pad(entries, [(0, 0), (0, 0), (0, 27), (0, 0)], constant_values=jnp.nan)
        if "indices" in kwargs:
            moved["indices"] = jnp.pad(kwargs["indices"][rows], [(0, 0), (0, 0), (0, 9)], constant_values=-1)
        got = _small(q[rows], window[rows], sink, start[rows], **moved)
        np.testing.assert_array_equal(np.asarray(got), together[rows])


def test_gradients_are_the_twins():
    args, kwargs = make(PROBLEMS["selected"])
    args = (args[0], jnp.nan_to_num(args[1]), *args[2:])
    kwargs |= {"entries": jnp.nan_to_num(kwargs["entries"]), "ring": jnp.nan_to_num(kwargs["ring"])}

    def gradient(implementation):
        def value(q, sink):
            call = compressed_attention(q, args[1], sink, args[3], **kwargs, implementation=implementation)
            return jnp.sum(jnp.sin(jnp.arange(call.size).reshape(call.shape)) * call)

        return jax.grad(value, argnums=(0, 1))(args[0], args[2])

    for ours, theirs in zip(gradient("gpu_interpret"), gradient("xla"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [c.name for c in operations()["compressed_attention"].cases() if c.representative])
def test_released_shapes_lower_for_cuda(name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    case = next(c for c in operations()["compressed_attention"].cases() if c.name == name)
    names = list(case.traced())

    def call(*arrays):
        arguments = dict(zip(names, arrays, strict=True)) | case.static()
        arguments = {"ring": None, "entries": None, "counts": None, "indices": None} | arguments
        return gpu.compressed_attention(**arguments, blocks=TABLE["h200"])

    exported = lowered_for_cuda(call, list(case.traced().values()))
    assert "triton" in exported.mlir_module()
    assert exported.out_avals[0].shape == case.arguments["q"].shape


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    args, kwargs = make(PROBLEMS["selected, words"])
    with pytest.raises(ValueError, match="'gpu': 8 heads are not a multiple of 16"):
        compressed_attention(*args, **kwargs, implementation="gpu")
