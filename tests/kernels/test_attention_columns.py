"""Attention over entries in the released bytes by columns: the TPU kernel, interpreted, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_compressed_attention import SMALL, TOLERANCE, WIDTH, Problem, make, oracle

from deepseek_v4.formats import simulate_kv
from deepseek_v4.stored_rows import KVColumns
from pallas_kernels.compressed_attention import compressed_attention, tpu

ROPE = 8
FORM = KVColumns(((WIDTH - ROPE) // 4, 1), (ROPE // 2, 1), (1, 1))

PROBLEMS = {
    "few queries, two blocks of columns": Problem((0, 470, 1100), length=2, total=256, ring=11, dtype="bfloat16"),
    "chunk": Problem((3, 600), length=21, total=256, ring=9, dtype="bfloat16"),
}


def in_columns(kwargs):
    """The arguments with entries in columns, and with the numbers that these hold; what none may see decodes to NaN."""
    entries = simulate_kv(jnp.nan_to_num(kwargs["entries"]), ROPE)
    columns = KVColumns(*(jnp.zeros(shape, jnp.uint32) for shape in FORM)).pack(entries)
    limits = jnp.max(kwargs["counts"], axis=1)[None, :, None, None]
    seen = jnp.arange(entries.shape[2]) < limits
    columns = jax.tree.map(lambda words: jnp.where(seen, words, jnp.uint32(0xFFFFFFFF)), columns)
    return kwargs | {"entries": columns}, kwargs | {"entries": entries}


def run(args, kwargs, cores=1):
    interpret = pltpu.InterpretParams(num_cores_or_threads=cores)
    return np.asarray(
        tpu.compressed_attention(*args, **kwargs, indices=None, tiles=SMALL, cores=cores, interpret=interpret),
        np.float32,
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_and_the_twin_attend_to_what_columns_hold(name):
    args, kwargs = make(PROBLEMS[name])
    columns, numbers = in_columns(kwargs)
    expected = oracle(args, numbers)
    np.testing.assert_allclose(run(args, columns), expected, rtol=0, atol=TOLERANCE["bfloat16"])
    twin = compressed_attention(*args, **columns, implementation="xla")
    np.testing.assert_allclose(np.asarray(twin, np.float32), expected, rtol=0, atol=TOLERANCE["bfloat16"])


def test_a_row_is_the_same_in_any_company():
    """Alone, in another slot, with a larger cache: the same bits."""
    args, kwargs = make(PROBLEMS["few queries, two blocks of columns"])
    columns, _ = in_columns(kwargs)
    together = run(args, columns)
    rows = np.array([2])
    q, window, sink, start = args
    moved = dict(columns, ring=columns["ring"][:, rows], counts=columns["counts"][rows])
    moved["entries"] = jax.tree.map(
        lambda words: jnp.pad(words[:, rows], [(0, 0)] * 3 + [(0, 128)], constant_values=np.uint32(0xFFFFFFFF)),
        columns["entries"],
    )
    np.testing.assert_array_equal(run((q[rows], window[rows], sink, start[rows]), moved), together[rows])


def test_what_the_kernel_does_not_serve_is_said():
    args, kwargs = make(Problem((90,), total=128, selected=4, dtype="bfloat16"))
    columns, _ = in_columns(kwargs)
    with pytest.raises(ValueError, match="selected entries in columns"):
        compressed_attention(*args, **columns, implementation="tpu_interpret")
    short = {**columns, "entries": jax.tree.map(lambda words: words[..., :100], columns["entries"]), "indices": None}
    with pytest.raises(ValueError, match="100 columns of entries are not a multiple of 128"):
        compressed_attention(*args, **short, implementation="tpu_interpret")
