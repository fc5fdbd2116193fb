"""Packed weights and cache rows as GPU kernels read them: words of four bytes, decoded in registers.

Arrays of one byte per element are passed as words. The Triton backend of Pallas counts elements of arrays up to 4 GiB
in 32 bits with a sign: of single bytes it would lose those beyond 2 GiB, where a layer of Pro's experts has four. XLA
on GPUs gives an array another element type without moving it, and a word is four loads in one.
"""

import jax
import jax.numpy as jnp
from jax import lax

WORD = 4
"""Bytes of a word."""


def as_words(array: jax.Array) -> jax.Array:
    """An array of one-byte elements [..., K] as uint32 [..., K/4], the first element in the lowest byte."""
    grouped = array.reshape(*array.shape[:-1], array.shape[-1] // WORD, WORD)
    return lax.bitcast_convert_type(grouped, jnp.uint32)


def e4m3_tile(words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Words [N, C] of four E4M3 codes each, as ``as_words`` makes them, to their values [N, 4C]; exact in bfloat16."""
    return _interleaved(_e4m3_bytes(words, dtype))


def e4m3_scaled_tile(words: jax.Array, scales: jax.Array) -> jax.Array:
    """Words [N, C] of four E4M3 codes each and their E8M0 bytes [N, C] (uint32) to bfloat16 values [N, 4C].

    Exact for scales from 2^-117 to 2^119, of which every product is a normal number; byte 0 counts as zero.
    """
    scale = _powers(scales)
    return _interleaved([plane * scale for plane in _e4m3_bytes(words, jnp.bfloat16)])


def fp4_tile(words: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Words [N, 16] of 128 packed E2M1 codes and words [N] of their four E8M0 scales to values [N, 128].

    Exact in bfloat16 for scales from 2^-125 to 2^121. A code with one more exponent bit at its front is E4M3's for a
    64th of its value, all sixteen of them; the scale takes the 64 back.
    """
    # Four words of eight codes share a byte of scale.
    shift = lax.broadcasted_iota(jnp.int32, words.shape, 1) // 4 * 8
    byte = (scales[:, None] >> shift.astype(jnp.uint32)) & jnp.uint32(255)
    even, odd = ([plane.astype(dtype) for plane in _fp4_planes(nibbles, byte)] for nibbles in (words, words >> 4))
    return _interleaved([plane for pair in zip(even, odd, strict=True) for plane in pair])


def fp4_halves(words: jax.Array, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Words [N, C] of packed E2M1 codes to bfloat16 values [N, 4C] of the low nibbles and of the high ones.

    ``scales`` [N, C] are E8M0 bytes of each word's low and high nibbles. Exact as ``fp4_tile`` is.
    """
    low, high = (_interleaved(_fp4_planes(n, byte)) for n, byte in zip((words, words >> 4), scales, strict=True))
    return low, high


def _fp4_planes(nibbles: jax.Array, scales: jax.Array) -> list[jax.Array]:
    """bfloat16 values of the low nibble of each byte of words, in four arrays, times words' E8M0 bytes ``scales``."""
    codes = ((nibbles & jnp.uint32(0x07070707)) << 2) | ((nibbles & jnp.uint32(0x08080808)) << 4)
    scale = _powers(scales + 6)
    return [plane * scale for plane in _e4m3_bytes(codes, jnp.bfloat16)]


def _powers(exponents: jax.Array) -> jax.Array:
    """E8M0 bytes 1 to 254 (uint32) as bfloat16; 0 becomes zero."""
    return lax.bitcast_convert_type((exponents << 7).astype(jnp.uint16), jnp.bfloat16)


def _e4m3_bytes(words: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """The values of the four E4M3 codes of every word, each in an array of its own."""
    codes = [(words >> (8 * i)).astype(jnp.uint8) for i in range(WORD)]
    return [lax.bitcast_convert_type(code, jnp.float8_e4m3fn).astype(dtype) for code in codes]


def _interleaved(planes: list[jax.Array]) -> jax.Array:
    """2^n arrays [N, C] to [N, 2^n C]: element i of every group of 2^n comes from array i."""
    rows = planes[0].shape[0]
    while len(planes) > 1:
        half = len(planes) // 2
        planes = [jnp.stack([a, b], axis=-1) for a, b in zip(planes[:half], planes[half:], strict=True)]
    return planes[0].reshape(rows, -1)
