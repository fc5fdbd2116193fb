"""GPU kernels (Pallas on Triton) of the hyper-connections: mix in, mix back, and both.

Two kernels, each over blocks of tokens and spans of channels. The first mixes a span back where a sublayer ends, writes
the streams, and projects them where one begins: partial sums per span, since one program for all channels of a token
would leave most of a GPU idle in decode. The second adds a token's partial sums in order, makes its coefficients doubly
stochastic in registers and collapses the streams. Mixing back alone is the first without projection, one read and one
write of the streams; mixing in reads them twice, since shared memory does not hold the streams of enough tokens to
share the projection's weights. In decode the L2 cache holds them.

The projection keeps float32's accuracy on bfloat16 tensor cores as in the TPU kernel: a float32 is the exact sum of
three bfloat16 numbers. A token's sums involve no other token. Written on the Triton backend of Pallas, which jax 0.10.2
has and 0.11 calls deprecated; never timed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_v4.execution import dot_precision
from pallas_kernels.targets import Chip

_TOKENS = 16
"""Tokens of a program: columns of the smallest product that Triton gives to tensor cores."""

_SPAN = 512
"""Most channels of a program, a power of two. The order of a token's sums depends on it and on ``_PRODUCT``."""

_PRODUCT = 32
"""Channels at a time: with more, registers spill."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: which parts run, sizes, block sizes and constants."""

    back: bool
    into: bool
    tokens: int
    streams: int
    width: int
    span: int
    interpreted: bool
    iterations: int = 1
    norm_eps: float = 0.0
    hc_eps: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Spans, which are neighbours in time, and blocks of tokens."""
        return self.width // self.span, pl.cdiv(self.tokens, _TOKENS)

    @property
    def step(self) -> int:
        """Channels at a time."""
        return min(self.span, _PRODUCT)

    @property
    def mixes(self) -> int:
        """Rows of the projection."""
        return (2 + self.streams) * self.streams


def unserved(chip: Chip | None, streams: jax.Array, *, compiled: bool = True) -> str | None:
    """Why the kernels cannot serve streams [B, S, n, d], or None. ``compiled``: not interpreted."""
    width = streams.shape[-1]
    if streams.dtype not in (jnp.bfloat16, jnp.float32):
        return f"streams are {streams.dtype}, expected bfloat16 or float32"
    if streams.size == 0:
        return "there are no tokens"
    if compiled and streams.dtype != jnp.bfloat16:
        return f"streams are {streams.dtype}, expected bfloat16"
    if compiled and width % _PRODUCT:
        return f"hidden size {width} is not a multiple of {_PRODUCT}"
    return None


def pre_mix(*, streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps, interpret=False):
    """See ``pallas_kernels.hyper_connection.pre_mix``."""
    constants = {"iterations": sinkhorn_iters, "norm_eps": norm_eps, "hc_eps": hc_eps}
    plan = _plan(streams, interpret, into=True, **constants)
    sums = _project(plan, streams, (), fn)
    return _collapse(plan, streams, sums, scale, base)


def post_mix(*, y, streams, post, comb, interpret=False):
    """See ``pallas_kernels.hyper_connection.post_mix``."""
    (mixed,) = _project(_plan(streams, interpret, back=True), streams, (y, post, comb), None)
    return mixed.reshape(streams.shape)


def seam(*, y, streams, post, comb, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps, interpret=False):
    """See ``pallas_kernels.hyper_connection.seam``."""
    constants = {"iterations": sinkhorn_iters, "norm_eps": norm_eps, "hc_eps": hc_eps}
    plan = _plan(streams, interpret, back=True, into=True, **constants)
    mixed, *sums = _project(plan, streams, (y, post, comb), fn)
    mixed = mixed.reshape(streams.shape)
    return mixed, *_collapse(plan, mixed, sums, scale, base)


def _plan(streams, interpret, *, back=False, into=False, **constants) -> Plan:
    n, width = streams.shape[-2:]
    span = _SPAN
    while width % span:
        span //= 2
    return Plan(back, into, math.prod(streams.shape[:-2]), n, width, span, interpret, **constants)


def _project(plan: Plan, streams, sublayer, fn):
    """The first kernel: the new streams [T, n, d] if mixing back; partial sums if mixing in, a token per column."""
    n, d, tokens = plan.streams, plan.width, plan.tokens
    operands = [streams.reshape(tokens, n, d)]
    if plan.back:
        y, post, comb = sublayer
        operands += [y.reshape(tokens, d), post.reshape(tokens, n), comb.reshape(tokens, n, n)]
    results = []
    if plan.back:
        results.append(jax.ShapeDtypeStruct((tokens, n, d), streams.dtype))
    if plan.into:
        operands.append(fn)
        spans = plan.grid[0]
        results.append(jax.ShapeDtypeStruct((spans, plan.mixes, tokens), jnp.float32))
        results.append(jax.ShapeDtypeStruct((spans, tokens), jnp.float32))
    return _call(plan, _projecting, operands, results, "back" if plan.back else "in")


def _collapse(plan: Plan, streams, sums, scale, base):
    """The second kernel: x, post and comb of mixing in, in their public shapes."""
    leading, n, tokens = streams.shape[:-2], plan.streams, plan.tokens
    operands = [streams.reshape(tokens, n, plan.width), *sums, scale, base]
    results = [
        jax.ShapeDtypeStruct((tokens, plan.width), streams.dtype),
        jax.ShapeDtypeStruct((tokens, n), jnp.float32),
        jax.ShapeDtypeStruct((tokens, n, n), jnp.float32),
    ]
    x, post, comb = _call(plan, _collapsing, operands, results, "collapse")
    return x.reshape(*leading, plan.width), post.reshape(*leading, n), comb.reshape(*leading, n, n)


def _call(plan: Plan, kernel, operands, results, name):
    def whole(a):
        return pl.BlockSpec(a.shape, lambda i, j: (0,) * len(a.shape))

    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=plan.grid,
        in_specs=[whole(a) for a in operands],
        out_specs=[whole(a) for a in results],
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=plan.interpreted,
        name=f"hyper_connection_{name}",
    )(*operands)


def _block(plan: Plan):
    """This program's tokens, which of them there are, and the same with 0 for those that there are not."""
    token = pl.program_id(1) * _TOKENS + jnp.arange(_TOKENS, dtype=jnp.int32)
    present = token < plan.tokens
    return token, present, jnp.where(present, token, 0)


def _load(ref, present, *index):
    """float32 of ``ref`` [T, ..., d] at tokens and channels, or at tokens alone; 0 for tokens that there are not."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    mask = jnp.broadcast_to(present if len(shape) == 1 else present[:, None], shape)
    return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)


def _store(ref, present, values, *index):
    mask = jnp.broadcast_to(present if values.ndim == 1 else present[:, None], values.shape)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _projecting(plan: Plan, streams, *refs):
    rest = list(refs)
    n, step = plan.streams, plan.step
    token, present, source = _block(plan)
    start = pl.program_id(0) * plan.span
    y, post, comb = (rest.pop(0) for _ in range(3)) if plan.back else (None, None, None)
    fn = rest.pop(0) if plan.into else None
    mixed = rest.pop(0) if plan.back else None
    if plan.back:
        own_weights = [_load(post, present, source, k) for k in range(n)]
        weights = [[_load(comb, present, source, j, k) for k in range(n)] for j in range(n)]
    mixes = pl.next_power_of_2(plan.mixes)
    mix = jnp.arange(mixes, dtype=jnp.int32)
    real = mix < plan.mixes

    def visit(index, carry):
        channel = start + index * step + jnp.arange(step, dtype=jnp.int32)
        at, to = (source[:, None], channel[None, :]), (token[:, None], channel[None, :])
        rows = [_load(streams, present, at[0], i, at[1]) for i in range(n)]
        if plan.back:
            own = _load(y, present, *at)
            rows = [
                own_weights[k][:, None] * own + sum(weights[j][k][:, None] * rows[j] for j in range(n))
                for k in range(n)
            ]
            rows = [row.astype(streams.dtype) for row in rows]
            for k, row in enumerate(rows):
                _store(mixed, present, row, to[0], k, to[1])
            rows = [row.astype(jnp.float32) for row in rows]
        if not plan.into:
            return carry
        projected, squares = carry
        for i, row in enumerate(rows):
            column = jnp.broadcast_to(i * plan.width + channel[None, :], (mixes, step))
            known = jnp.broadcast_to(real[:, None], (mixes, step))
            matrix = plgpu.load(fn.at[jnp.where(known, mix[:, None], 0), column], mask=known, other=0.0)
            projected = _add_product(plan, projected, matrix, row.astype(streams.dtype))
            squares = squares + jnp.sum(row * row, axis=1)
        return projected, squares

    nothing = (jnp.zeros((mixes, _TOKENS), jnp.float32), jnp.zeros(_TOKENS, jnp.float32)) if plan.into else 0
    carry = lax.fori_loop(0, plan.span // step, visit, nothing)
    if plan.into:
        sums, squares_out = rest
        projected, squares = carry
        span = pl.program_id(0)
        # Rows that there are not have no place either, for the interpreter's sake.
        place = jnp.where(real, mix, plan.mixes)
        plgpu.store(sums.at[span, place[:, None], token[None, :]], projected, mask=real[:, None] & present[None, :])
        _store(squares_out, present, squares, span, token)


def _add_product(plan: Plan, total, matrix, row):
    """total [m, T] plus matrix [m, c] in float32 times row [T, c] transposed; nothing is rounded but sums."""
    transposed = (((1,), (1,)), ((), ()))
    if row.dtype != jnp.bfloat16 or plan.interpreted:
        # The CPU under the interpreter lacks some bfloat16 products; in float32 the same products are exact.
        row = row.astype(jnp.float32)
        return total + lax.dot_general(matrix, row, transposed, precision=dot_precision(row.dtype))
    for _ in range(3):
        # Cut off and not rounded, so that three times eight bits are all of them and nothing can be simplified.
        bits = lax.bitcast_convert_type(matrix, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        matrix = matrix - part
        total += lax.dot_general(part.astype(jnp.bfloat16), row, transposed, preferred_element_type=jnp.float32)
    return total


def _collapsing(plan: Plan, streams, sums, squares, scale, base, x, post_out, comb_out):
    n, step = plan.streams, plan.step
    token, present, source = _block(plan)

    def add(span, found):
        read = [
            _load(squares, present, span, source),
            *(_load(sums, present, span, m, source) for m in range(plan.mixes)),
        ]
        return tuple(total + value for total, value in zip(found, read, strict=True))

    total, *mixes = lax.fori_loop(0, plan.grid[0], add, (jnp.zeros(_TOKENS, jnp.float32),) * (1 + plan.mixes))
    normal = lax.rsqrt(total / (n * plan.width) + plan.norm_eps)

    def activated(part, mix):
        return mixes[mix] * normal * scale[part] + base[mix]

    pre = [jax.nn.sigmoid(activated(0, i)) + plan.hc_eps for i in range(n)]
    start = pl.program_id(0) * plan.span

    def visit(index, _):
        channel = start + index * step + jnp.arange(step, dtype=jnp.int32)
        rows = [_load(streams, present, source[:, None], i, channel[None, :]) for i in range(n)]
        value = sum(pre[i][:, None] * rows[i] for i in range(n))
        _store(x, present, value, token[:, None], channel[None, :])
        return 0

    lax.fori_loop(0, plan.span // step, visit, 0)

    @pl.when(pl.program_id(0) == 0)
    def coefficients():
        for k in range(n):
            _store(post_out, present, 2 * jax.nn.sigmoid(activated(1, n + k)), token, k)
        logits = [[activated(2, (2 + j) * n + k) for k in range(n)] for j in range(n)]
        for j, row in enumerate(_sinkhorn(plan, logits)):
            for k, value in enumerate(row):
                _store(comb_out, present, value, token, j, k)


def _sinkhorn(plan: Plan, rows):
    """n x n vectors of tokens, from logits to doubly stochastic matrices; see the twin."""
    eps = plan.hc_eps

    def add(values):
        return functools.reduce(jnp.add, values)

    def columns(rows):
        totals = [add(column) + eps for column in zip(*rows, strict=True)]
        return [[value / total for value, total in zip(row, totals, strict=True)] for row in rows]

    def alternate(_, rows):
        totals = [add(row) + eps for row in rows]
        return columns([[value / total for value in row] for row, total in zip(rows, totals, strict=True)])

    highest = [functools.reduce(jnp.maximum, row) for row in rows]
    rows = [[jnp.exp(value - high) for value in row] for row, high in zip(rows, highest, strict=True)]
    totals = [add(row) for row in rows]
    rows = [[value / total + eps for value in row] for row, total in zip(rows, totals, strict=True)]
    return lax.fori_loop(0, plan.iterations - 1, alternate, columns(rows))
