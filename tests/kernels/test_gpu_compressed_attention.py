"""The GPU kernel of compressed_attention: its parts, lowered for CUDA, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from lowering import lowered_for_cuda, served_on_gpus
from test_compressed_attention import IMPLEMENTATIONS, PROBLEMS, Problem, make

from deepseek_v4.stored_rows import KVRows
from pallas_kernels.compressed_attention import compressed_attention, gpu, gpu_rows
from pallas_kernels.compressed_attention.blocks import TABLE
from pallas_kernels.registry import operations
from pallas_kernels.targets import chip


@pytest.mark.parametrize("name", served_on_gpus("compressed_attention"))
def test_released_shapes_lower_for_cuda(name):
    """To Triton's language, as far as jax goes without NVIDIA's compiler; tests/kernels/test_compile_gpu.py goes on."""
    case = next(c for c in operations()["compressed_attention"].cases() if c.name == name)
    case = case.on(chip("h200"))
    names = list(case.traced())

    def call(*arrays):
        arguments = dict(zip(names, arrays, strict=True)) | case.static()
        arguments = {"ring": None, "entries": None, "counts": None, "indices": None} | arguments
        return gpu.compressed_attention(**arguments, blocks=TABLE["h200"])

    exported = lowered_for_cuda(call, list(case.traced().values()))
    assert "triton" in exported.mlir_module()
    assert exported.out_avals[0].shape == case.arguments["q"].shape


def test_parts_change_no_bit(monkeypatch):
    """Entries in one part, or with more room behind them in several; all rows at a time, or one by one."""
    call = IMPLEMENTATIONS["gpu_interpret, small blocks"]
    args, kwargs = make(Problem((3, 30, 12), total=8, ring=9))
    roomy = kwargs | {"entries": jnp.pad(kwargs["entries"], [(0, 0), (0, 0), (0, 12), (0, 0)], constant_values=jnp.nan)}
    alone = np.asarray(call(*args, **kwargs))
    np.testing.assert_array_equal(np.asarray(call(*args, **roomy)), alone)
    monkeypatch.setattr(gpu, "_PART_BYTES", 1)
    np.testing.assert_array_equal(np.asarray(call(*args, **roomy)), alone)
    args, kwargs = make(PROBLEMS["all visible, few queries"])
    one_by_one = np.asarray(call(*args, **kwargs))
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(call(*args, **kwargs)), one_by_one)


@pytest.mark.filterwarnings("ignore:invalid value")  # of NaNs, which some bytes are
def test_released_rows_decode_exactly():
    """Codes and scales of all bytes, RoPE dims of any bits, as by ml_dtypes in NumPy; what is not wanted is zero."""
    rng = np.random.default_rng(0)
    count, content, rope = 128, 448, 64
    codes = rng.integers(0, 256, (1, count, content), dtype=np.uint8)
    codes[0, :, :2] = np.arange(2 * count).reshape(count, 2)
    # Smaller ones lead below bfloat16's normal numbers, which accelerators flush to zero; 255 is no scale.
    scales = rng.integers(16, 247, (1, count, 8), dtype=np.uint8)
    turned = rng.integers(0, 1 << 16, (1, count, rope), dtype=np.uint16)
    rows = KVRows(codes.view(jnp.float8_e4m3fn), turned.view(jnp.bfloat16), scales.view(jnp.float8_e8m0fnu))
    expected = codes.view(jnp.float8_e4m3fn).astype(np.float64)
    expected *= np.repeat(scales.view(jnp.float8_e8m0fnu).astype(np.float64)[..., :7], 64, axis=-1)
    expected = np.concatenate([expected, turned.view(jnp.bfloat16).astype(np.float64)], axis=-1)
    stored = gpu_rows.addressable(jax.tree.map(jnp.asarray, rows))
    tiles = gpu_rows.tiles_of(content + rope, [stored])
    assert [(tile.start, tile.stop) for tile in tiles] == [(0, 256), (256, 384), (384, 448), (448, 512)]

    def kernel(codes, rope, scales, index, wanted, out):
        stored = gpu_rows.ReleasedWords(codes, rope, scales)
        found = gpu_rows.load_tiles(stored, (0,), index[...], wanted[...], tiles)
        out[...] = jnp.concatenate(found, axis=1)

    index, wanted = rng.permutation(count).astype(np.int32), rng.random(count) < 0.8
    shape = jax.ShapeDtypeStruct((count, content + rope), jnp.bfloat16)
    found = pl.pallas_call(kernel, out_shape=shape, interpret=True)(*stored, np.where(wanted, index, 10**9), wanted)
    np.testing.assert_array_equal(np.asarray(found, np.float64), np.where(wanted[:, None], expected[0, index], 0))


def test_costs_of_released_rows_are_hand_sums():
    """584 bytes of every entry and of every row of the ring; on TPUs what is fetched is more."""
    cases = {case.name: case.on(chip("h200")).cost for case in operations()["compressed_attention"].cases()}
    row, kept = 512 * 2, 448 + 2 * 64 + 8
    csa = cases["flash/csa-fp8/decode/64x128K"]
    assert csa.bytes_read == 64 * (64 * row + 512 * kept + 512 * 4 + row + 127 * kept) + 64 * 4
    assert csa.operations == cases["flash/csa/decode/64x128K"].operations
    assert cases["pro/hca-fp8/decode/1x1M"].bytes_read == 128 * row + 8192 * kept + 4 + row + 127 * kept + 128 * 4


def test_a_kernel_asked_for_by_name_says_why_it_cannot():
    args, kwargs = make(PROBLEMS["selected, words"])
    with pytest.raises(ValueError, match="'gpu': 8 heads are not a multiple of 16"):
        compressed_attention(*args, **kwargs, implementation="gpu")
    shapes = ((28, jnp.float8_e4m3fn), (4, jnp.bfloat16), (4, jnp.float8_e8m0fnu))
    rows = KVRows(*(jax.ShapeDtypeStruct((2, 3, 8, width), dtype) for width, dtype in shapes))
    mixed = kwargs | {"ring": rows}
    with pytest.raises(ValueError, match="'gpu_interpret': entries in words beside a ring in the released bytes"):
        compressed_attention(*args, **mixed, implementation="gpu_interpret")
    released = mixed | {"entries": rows}
    with pytest.raises(ValueError, match="'gpu': released rows of 28 codes and 4 RoPE dims, not multiples of 16"):
        compressed_attention(*args, **released, implementation="gpu")
    with pytest.raises(ValueError, match="'gpu_interpret': rows in the released bytes with float32 queries"):
        compressed_attention(args[0].astype(jnp.float32), *args[1:], **released, implementation="gpu_interpret")
    with pytest.raises(ValueError, match="'tpu_interpret': a ring in the published layout"):
        compressed_attention(*args, **released, implementation="tpu_interpret")
