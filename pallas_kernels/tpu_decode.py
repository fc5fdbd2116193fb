"""Stored weights to bfloat16 inside TPU kernels: tiles in VMEM in, tiles in VMEM out, nothing in HBM.

Everything works on 32-bit words, four bytes of one column at a time, because that is what the vector unit of every
generation has. Decoded tiles are kept as words too: word [i, c] of a ``uint32 [N/2, C]`` tile holds rows 2i (low half)
and 2i + 1 of the bfloat16 matrix [N, C], which ``paired_rows`` reads without moving anything.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128

CHUNK = 2 * LANES
"""Columns that 128 bytes of packed FP4 become: the 128 even ones, then the 128 odd ones."""

_ROWS = 256
"""Rows decoded per turn of a loop."""

_UNROLL = 4
"""Turns of a decoding loop that the compiler may overlap."""

# E2M1 placed in the bits of E5M2 is 2^14 too small: exponent bias 15 against 1.
_FP4_BIAS = 14


def nibbles_to_e5m2(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint32 words of packed FP4 to words of E5M2 bytes, each code times 2^-14: (low nibbles, high nibbles).

    Exact for all sixteen codes: sign, exponent and mantissa bits keep their meaning, and code 1 (0.5) becomes the
    E5M2 subnormal 2 * 2^-16, which every generation's conversion honours.
    """
    magnitude, sign = jnp.uint32(0x0E0E0E0E), jnp.uint32(0x80808080)
    low = ((words << 1) & magnitude) | ((words << 4) & sign)
    high = ((words >> 3) & magnitude) | (words & sign)
    return low, high


def e8m0_after_e5m2(byte: jax.Array) -> jax.Array:
    """E8M0 bytes (int32) to float32 times 2^14, which ``nibbles_to_e5m2`` left out.

    Bytes up to 240 (2^113) are exact; larger ones give infinity or NaN, never a wrong finite number.
    """
    biased = jnp.minimum(byte + _FP4_BIAS, 255)
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def scales_as_laid_out(scale: jax.Array) -> tuple[jax.Array, bool]:
    """FP4 scales [.., N, G] in the order of their bytes in HBM, without a copy, and whether that is [.., G, N].

    TPUs lay out an array whose minor dim is not a multiple of 128 with its last two dims exchanged, where that saves
    padding; a kernel's operands keep the order of their dims, so it must be handed the exchanged array.
    """
    exchanged = scale.shape[-1] % LANES != 0
    return (jnp.swapaxes(scale, -1, -2) if exchanged else scale), exchanged


def fp4_scale_words(scale, words, exchanged: bool) -> None:
    """E8M0 scales (ref [N, G], or [G, N] exchanged) to bfloat16 pairs (ref uint32 [N/2, >= G]), ``e8m0_after_e5m2``."""
    groups, rows = scale.shape if exchanged else scale.shape[::-1]
    block = _block(rows)

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * block, block), block)
        byte = scale[:, at] if exchanged else scale[at, :]
        value = e8m0_after_e5m2(pltpu.bitcast(byte, jnp.uint8).astype(jnp.int32))
        value = (value.T if exchanged else value).astype(jnp.bfloat16)
        half = pl.ds(pl.multiple_of(i * (block // 2), block // 2), block // 2)
        words[half, :groups] = pltpu.bitcast(value, jnp.uint32)

    lax.fori_loop(0, rows // block, step, None)


def decode_fp4(packed, scale_words, first_group, out) -> None:
    """Packed FP4 (ref uint8 [N, C]) times its scales to bfloat16 words (ref uint32 [N/2, 2C]).

    ``scale_words`` (ref uint32 [N/2, G']) is what ``fp4_scale_words`` wrote, ``first_group`` (a multiple of 8) the
    group of byte 0. Columns leave in chunks of 256: the even inputs of 128 bytes, then their odd inputs. Exact.
    """
    rows, columns = packed.shape
    block, chunks = _block(rows), columns // LANES
    # Sixteen bytes of a row share one scale, so a chunk of 128 bytes needs eight lanes of scales, spread sixteenfold.
    spread = lax.broadcasted_iota(jnp.int32, (block // 2, LANES), 1) // 16

    def place(i):
        row_block, chunk = _divide(i, chunks, rows // block)
        return row_block, pl.ds(_multiple(row_block, block // 2), block // 2), chunk

    def scales_of(i):
        _, half, chunk = place(i)
        vector, lane = _divide(first_group + chunk * (LANES // 16), LANES)
        words = scale_words[half, _lanes(vector)]
        return jnp.take_along_axis(words, spread + lane, axis=1, mode="promise_in_bounds")

    def step(i, scales):
        # The next step's scales are spread by a unit that this step's arithmetic leaves idle.
        following = scales_of(jnp.minimum(i + 1, steps - 1))
        row_block, half, chunk = place(i)
        words = pltpu.bitcast(packed[pl.ds(_multiple(row_block, block), block), _lanes(chunk)], jnp.uint32)
        scale = pltpu.bitcast(scales, jnp.bfloat16)
        for parity, codes in enumerate(nibbles_to_e5m2(words)):
            value = pltpu.bitcast(codes, jnp.float8_e5m2).astype(jnp.bfloat16) * scale
            out[half, _lanes(2 * chunk + parity)] = pltpu.bitcast(value, jnp.uint32)
        return following

    steps = rows // block * chunks
    lax.fori_loop(0, steps, step, scales_of(0), unroll=min(_UNROLL, steps))


def decode_fp8(codes, scale_at, out, *, native: bool) -> None:
    """E4M3 (ref [N, C], multiples of 128) times a scale per 128 x 128 block to bfloat16 words (ref uint32 [N/2, C]).

    ``scale_at(i, j)`` is the float32 scale of block (i, j). The product is rounded once to bfloat16, and exact for
    powers of two. ``native``: the chip converts E4M3 itself. The others convert E4M3 with bias 11, which has the same
    bits 2^4 smaller, but no negative zero (its byte means NaN) and no NaN of its own: NaN weights are not preserved.
    """
    rows, columns = codes.shape
    chunks = columns // LANES

    def step(i, _):
        row, chunk = _divide(i, chunks)
        tile = codes[pl.ds(pl.multiple_of(row * LANES, LANES), LANES), _lanes(chunk)]
        scale = scale_at(row, chunk)
        if not native:
            tile = pltpu.bitcast(e4m3_to_e4m3b11(pltpu.bitcast(tile, jnp.uint32)), jnp.float8_e4m3b11fnuz)
            scale = scale * 16.0
        value = (tile.astype(jnp.float32) * scale).astype(jnp.bfloat16)
        halves = pl.ds(pl.multiple_of(row * (LANES // 2), LANES // 2), LANES // 2)
        out[halves, _lanes(chunk)] = pltpu.bitcast(value, jnp.uint32)

    lax.fori_loop(0, rows // LANES * chunks, step, None)


def e4m3_to_e4m3b11(words: jax.Array) -> jax.Array:
    """uint32 words of E4M3 bytes to words of E4M3 with bias 11, which are 2^4 smaller (see ``decode_fp8``)."""
    magnitude = jnp.uint32(0x7F7F7F7F)
    # Bit 7 of a byte of the sum says that the magnitude is not zero: a sign is kept only there.
    return words & (((words & magnitude) + magnitude) | magnitude)


def e4m3_of_words(words: jax.Array, byte: int) -> jax.Array:
    """Byte ``byte`` of uint32 words, an E4M3 code, as float32 in the same place; exact for all 256 codes."""
    # Shifted down with its sign and masked, a code is a float32 whose exponent lacks the difference of the biases.
    shifted = lax.bitcast_convert_type(words << (24 - 8 * byte), jnp.int32) >> 4
    bits = lax.bitcast_convert_type(shifted, jnp.uint32) & jnp.uint32(0x87F00000)
    sign = bits & jnp.uint32(0x80000000)
    normal = lax.bitcast_convert_type(bits + jnp.uint32((127 - 7) << 23), jnp.float32)
    # With exponent 0 a code has no leading one, and the exponent of 1: twice that, less the one.
    one = lax.bitcast_convert_type(sign | jnp.uint32((127 - 6) << 23), jnp.float32)
    value = jnp.where((bits & jnp.uint32(0x07800000)) == 0, (normal + normal) - one, normal)
    return jnp.where((bits & jnp.uint32(0x07F00000)) == 0x07F00000, jnp.nan, value)


def paired_rows(words, start, rows: int, columns=slice(None)) -> jax.Array:
    """Rows start .. start + rows (even numbers) of a decoded tile, a ref uint32 [N/2, C], as bfloat16 [rows, C]."""
    half = start // 2 if isinstance(start, int) else pl.multiple_of(start // 2, rows // 2)
    return pltpu.bitcast(words[pl.ds(half, rows // 2), columns], jnp.bfloat16)


def even_odd_permutation() -> jax.Array:
    """bfloat16 [256, 256]: x @ P puts the 128 even columns of x before the 128 odd ones, exactly."""
    column = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    source = jnp.where(column < LANES, 2 * column, 2 * column - (CHUNK - 1))
    return (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0) == source).astype(jnp.bfloat16)


def split_even_odd(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """bfloat16 [R, C] with every 256 columns reordered as ``decode_fp4`` orders them."""
    groups = [
        lax.dot_general(
            x[:, i : i + CHUNK], permutation, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(jnp.bfloat16)
        for i in range(0, x.shape[1], CHUNK)
    ]
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups, axis=1)


def join_even_odd(x: jax.Array) -> jax.Array:
    """float32 [R, C] whose every 256 columns are ordered as ``decode_fp4`` orders them, in their own order."""
    lane = lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    even_lane = (lane & 1) == 0
    groups = []
    for i in range(0, x.shape[1], CHUNK):
        even, odd = x[:, i : i + LANES], x[:, i + LANES : i + CHUNK]
        for first in (0, LANES // 2):
            take = functools.partial(jnp.take_along_axis, indices=(lane >> 1) + first, axis=1, mode="promise_in_bounds")
            groups.append(jnp.where(even_lane, take(even), take(odd)))
    return jnp.concatenate(groups, axis=1)


def _block(rows: int) -> int:
    return min(rows, _ROWS)


def _divide(index, divisor: int, quotients: int | None = None):
    """Quotient and remainder of a traced index, not negative; ``quotients`` is how many quotients there are, if known.

    Scalar arithmetic is what short loops spend their time on: no division where a shift or nothing will do.
    """
    if divisor == 1:
        return index, 0
    if quotients == 1:
        return 0, index
    if divisor & (divisor - 1) == 0:
        return index >> (divisor.bit_length() - 1), index & (divisor - 1)
    return lax.div(index, jnp.int32(divisor)), lax.rem(index, jnp.int32(divisor))


def _lanes(chunk):
    return pl.ds(_multiple(chunk, LANES), LANES)


def _multiple(index, size: int):
    start = index * size
    return start if isinstance(start, int) else pl.multiple_of(start, size)
