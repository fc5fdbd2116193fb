"""GPU kernel (Pallas on Triton) of ``compress``: a program per window that may end in the call.

It takes the window's rows from where they lie, those of the call and those before it from the ring by position, so
that a chunk of thousands of tokens and a single one run the same code; nothing is joined or aligned in HBM. A window
that does not end reads nothing, which in decode are three of four in CSA and 127 of 128 in HCA. All channels are in
one program, for the norm; rows come a block at a time, in the order of their positions.

Written on the Triton backend of Pallas, which jax 0.10.2 has and 0.11 calls deprecated. Nothing here was ever timed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.layer_spec import RopeSpec
from deepseek_v4.rope import rope_angles
from pallas_kernels.compress.windows import beginnings, ending, unserved_types

_ROWS = 32
"""Most rows at a time: with more, registers spill. The order of a sum depends on it."""

_WARP_CHANNELS = 1024
"""Values of a block of rows that go to a warp."""


_NO_SCORE = -1e30
"""Below every score, and finite."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    length: int
    ratio: int
    overlap: bool
    width: int
    rope_dims: int
    norm_eps: float
    dtype: Any

    @property
    def pool_rows(self) -> int:
        """Rows that an entry pools."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def block(self) -> int:
        """Rows at a time."""
        return min(_ROWS, pl.next_power_of_2(self.pool_rows))

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return min(16, max(2, pl.next_power_of_2(self.block * self.width // _WARP_CHANNELS)))


def unserved(
    kv: jax.Array,
    kv_ring: jax.Array | None,
    overlap: bool,
    rope: RopeSpec,
    dtype: jax.typing.DTypeLike,
    *,
    compiled: bool = True,
) -> str | None:
    """Why the kernel cannot serve projections [B, S, lanes*c] (and rings [n, B, N, lanes*c] or None), or None.

    ``compiled``: not interpreted.
    """
    width = kv.shape[2] // (2 if overlap else 1)
    if reason := unserved_types(kv, kv_ring, dtype):
        return reason
    if kv.size == 0:
        return "there are no rows"
    if width % 2 or rope.dims > width:
        return f"{width} channels, {rope.dims} of them rotated"
    if compiled and width & (width - 1):
        return f"{width} channels are not a power of two"
    return None


def compress(
    *,
    kv,
    score,
    norm_weight,
    start,
    lengths,
    kv_ring,
    score_ring,
    layer,
    ratio,
    overlap,
    rope,
    norm_eps,
    dtype,
    interpret=False,
):
    """See ``pallas_kernels.compress.compress``."""
    batch, length, channels = kv.shape
    width = channels // (2 if overlap else 1)
    plan = Plan(length, ratio, overlap, width, rope.dims, norm_eps, jnp.dtype(dtype))
    windows = -(-length // ratio)
    start = start.astype(jnp.int32)
    first, done = ending(start, lengths, ratio, windows)
    angles = rope_angles(beginnings(first, ratio, windows), rope)
    operands = [jnp.asarray(layer, jnp.int32).reshape(1), start, done, jnp.cos(angles), jnp.sin(angles)]
    operands += [norm_weight.astype(jnp.float32), kv, score]
    operands += [] if kv_ring is None else [kv_ring, score_ring]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(windows, batch),
        in_specs=[pl.BlockSpec(a.shape, lambda *_, n=a.ndim: (0,) * n) for a in operands],
        out_specs=pl.BlockSpec((None, None, width), lambda window, b: (b, window, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, windows, width), plan.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
        name="compress",
    )(*operands)


def _kernel(p: Plan, layer, starts, done, cos, sin, weight, kv, score, *rest):
    *rings, out = rest
    window, b = pl.program_id(0), pl.program_id(1)
    start = starts[b]
    number = start // p.ratio + window
    shape = (p.block, p.width)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1)

    def visit(index, state):
        turn = index * p.block + lax.broadcasted_iota(jnp.int32, shape, 0)
        position = (number - (1 if p.overlap else 0)) * p.ratio + turn
        # With overlap, the window before has the first lane, and before the first window there is none.
        place = channel + jnp.where(turn >= p.ratio, p.width, 0) if p.overlap else channel
        known = (turn < p.pool_rows) & (position >= 0)
        new = known & (position >= start)
        found = []
        for rows, ring in zip((kv, score), rings or (None, None), strict=True):
            value = _load(rows.at[b, jnp.where(new, position - start, 0), place], new)
            if ring is not None:
                slot = lax.rem(jnp.maximum(position, 0), ring.shape[2])
                value = jnp.where(new, value, _load(ring.at[layer[0], b, slot, place], known & ~new))
            found.append(value)
        values, scores = found[0], jnp.where(known, found[1], -jnp.inf)
        high, total, acc = state
        # The first block of an entry's rows may be all unknown: what is subtracted is finite all the same.
        highest = jnp.maximum(high, jnp.max(scores, axis=0))
        weights = jnp.exp(scores - highest[None, :])
        shrink = jnp.exp(high - highest)
        total = total * shrink + jnp.sum(weights, axis=0)
        return highest, total, acc * shrink + jnp.sum(weights * values, axis=0)

    @pl.when(window < done[b])
    def _():
        nothing = jnp.zeros(p.width, jnp.float32)
        state = (nothing + _NO_SCORE, nothing, nothing)
        _, total, acc = lax.fori_loop(0, pl.cdiv(p.pool_rows, p.block), visit, state)
        entry = (acc / total).astype(p.dtype).astype(jnp.float32)
        entry = entry * lax.rsqrt(jnp.sum(entry * entry) / p.width + p.norm_eps) * weight[...]
        entry = entry.astype(p.dtype).astype(jnp.float32)
        out[...] = _rotated(p, entry, cos, sin, (b, window)).astype(p.dtype)

    @pl.when(window >= done[b])
    def _():
        out[...] = jnp.zeros(p.width, p.dtype)


def _load(ref, wanted):
    return plgpu.load(ref, mask=wanted, other=0.0)


def _rotated(p: Plan, entry, cos, sin, at):
    """The last channels turned in pairs, by angles [B, windows, rope_dims/2] whose cosines and sines are given."""
    shape = (p.width // 2, 2)
    pairs, odd = entry.reshape(shape), lax.broadcasted_iota(jnp.int32, shape, 1) == 1
    # Picked by sums with zeros, which change nothing: a vector is not cut where it lies in registers.
    real = jnp.sum(jnp.where(odd, 0.0, pairs), axis=1)
    imaginary = jnp.sum(jnp.where(odd, pairs, 0.0), axis=1)
    pair = jnp.arange(p.width // 2, dtype=jnp.int32) - (p.width - p.rope_dims) // 2
    turning, pair = pair >= 0, jnp.maximum(pair, 0)
    cos = plgpu.load(cos.at[(*at, pair)], mask=turning, other=1.0)
    sin = plgpu.load(sin.at[(*at, pair)], mask=turning, other=0.0)
    return jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1).reshape(p.width)
