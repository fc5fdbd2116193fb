"""TPU kernels of the hyper-connections: mix in, mix back, and both in one pass over the streams.

They are one kernel with parts left out. A block of tokens is brought to fast memory once, mixed back there, projected
to its coefficients, which are made doubly stochastic there, and collapsed to the next input; streams cross HBM once
each way. Coefficients lie transposed, [n + n*n, tokens]: a token per lane is dense in memory and lets Sinkhorn
treat 128 tokens at a time. Everything about coefficients has that shape however many tokens there are, filled up
where there are fewer: a token's bits do not depend on its company.

The projection keeps float32's accuracy: a float32 is the exact sum of three bfloat16 numbers, and bfloat16 streams are
exact already, so three products accumulated in float32 lose nothing but the rounding of sums.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connection.cost import mix_cost
from pallas_kernels.targets import Chip

LANES = 128
_TOKENS = 128
_CHUNK = 512
_ROW_TILE = 16
_STREAMS = 4
_MIB = 1 << 20
_TRANSPOSED = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: which parts run, sizes, block sizes (of tokens, and of channels at a time)."""

    back: bool
    into: bool
    tokens: int
    streams: int
    width: int
    dtype: Any
    block: int
    chunk: int
    iterations: int = 1
    norm_eps: float = 0.0
    hc_eps: float = 0.0
    interpreted: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of tokens; the last one may be partial."""
        return -(-self.tokens // self.block)

    @property
    def lanes(self) -> int:
        """Channels that sums of squares keep apart until the end."""
        return math.gcd(self.chunk, LANES)

    @property
    def mixes(self) -> int:
        """Rows of the projection."""
        return (2 + self.streams) * self.streams

    @property
    def coefficients(self) -> int:
        """Rows of post and comb together."""
        return (1 + self.streams) * self.streams


def unserved(chip: Chip | None, streams: jax.Array, *, compiled: bool = True) -> str | None:
    """Why the kernels cannot serve streams [B, S, n, d], or None. ``compiled``: not interpreted."""
    n, width = streams.shape[-2:]
    if streams.dtype not in (jnp.bfloat16, jnp.float32):
        return f"streams are {streams.dtype}, expected bfloat16 or float32"
    if streams.size == 0:
        return "there are no tokens"
    if compiled and n != _STREAMS:
        return f"{n} streams, the kernel's layout is that of {_STREAMS}"
    if compiled and width % LANES:
        return f"hidden size {width} is not a multiple of {LANES}"
    if chip is not None:
        need = _fast_memory(_plan(streams, back=True, into=True))
        if need > chip.fast_memory:
            return f"{_TOKENS} tokens of {width} channels take {need >> 20} MiB of fast memory"
    return None


def pre_mix(*, streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps, interpret=False):
    """See ``pallas_kernels.hyper_connection.pre_mix``."""
    constants = {"iterations": sinkhorn_iters, "norm_eps": norm_eps, "hc_eps": hc_eps}
    plan = _plan(streams, into=True, interpreted=interpret, **constants)
    x, coefficients = _call(plan, streams, mix=(fn, scale, base))
    return _into(plan, streams, x, coefficients)


def post_mix(*, y, streams, post, comb, interpret=False):
    """See ``pallas_kernels.hyper_connection.post_mix``."""
    plan = _plan(streams, back=True, interpreted=interpret)
    (mixed,) = _call(plan, streams, sublayer=(y, post, comb))
    return mixed.reshape(streams.shape)


def seam(*, y, streams, post, comb, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps, interpret=False):
    """See ``pallas_kernels.hyper_connection.seam``."""
    constants = {"iterations": sinkhorn_iters, "norm_eps": norm_eps, "hc_eps": hc_eps}
    plan = _plan(streams, back=True, into=True, interpreted=interpret, **constants)
    mixed, x, coefficients = _call(plan, streams, sublayer=(y, post, comb), mix=(fn, scale, base))
    return mixed.reshape(streams.shape), *_into(plan, streams, x, coefficients)


def _plan(streams, *, back=False, into=False, **constants) -> Plan:
    n, width = streams.shape[-2:]
    tokens = math.prod(streams.shape[:-2])
    block = min(_TOKENS, -(-tokens // _ROW_TILE) * _ROW_TILE)
    fitting = [c for c in range(LANES, min(_CHUNK, width) + 1, LANES) if width % c == 0]
    return Plan(back, into, tokens, n, width, streams.dtype, block, max(fitting, default=width), **constants)


def _into(plan: Plan, streams, x, coefficients):
    """The results of mixing in, in their public shapes."""
    leading, n = streams.shape[:-2], plan.streams
    coefficients = coefficients[:, : plan.tokens].T
    post, comb = coefficients[:, :n], coefficients[:, n:]
    return x.reshape(*leading, plan.width), post.reshape(*leading, n), comb.reshape(*leading, n, n)


def _call(plan: Plan, streams, *, sublayer=None, mix=None):
    n, d, tokens, block = plan.streams, plan.width, plan.tokens, plan.block
    whole = pl.BlockSpec((block, n, d), lambda i: (i, 0, 0))
    one = pl.BlockSpec((block, d), lambda i: (i, 0))
    columns = pl.BlockSpec((plan.coefficients, _TOKENS), lambda i: (0, i))
    padded = plan.blocks * _TOKENS
    operands, in_specs, out_specs, out_shape = [streams.reshape(tokens, n, d)], [whole], [], []
    if sublayer is not None:
        y, post, comb = sublayer
        known = jnp.concatenate([post.reshape(tokens, n), comb.reshape(tokens, n * n)], axis=1).T
        operands += [y.reshape(tokens, d), jnp.pad(known, ((0, 0), (0, padded - tokens)))]
        in_specs += [one, columns]
        out_specs += [whole]
        out_shape += [jax.ShapeDtypeStruct((tokens, n, d), plan.dtype)]
    if mix is not None:
        fn, scale, base = mix
        operands += [fn, scale, base[:, None]]
        in_specs += [
            pl.BlockSpec(fn.shape, lambda i: (0, 0)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((plan.mixes, 1), lambda i: (0, 0)),
        ]
        out_specs += [one, columns]
        out_shape += [
            jax.ShapeDtypeStruct((tokens, d), plan.dtype),
            jax.ShapeDtypeStruct((plan.coefficients, padded), jnp.float32),
        ]
    cost = mix_cost(
        tokens=tokens, streams=n, width=d, back=plan.back, into=plan.into, itemsize=jnp.dtype(plan.dtype).itemsize
    )
    call = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(plan.blocks,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_fast_memory(plan)),
        cost_estimate=pl.CostEstimate(
            flops=cost.total_operations, bytes_accessed=cost.bytes_moved, transcendentals=tokens * plan.mixes
        ),
        interpret=pltpu.InterpretParams() if plan.interpreted else False,
        name="hyper_connection_" + ("seam" if plan.back and plan.into else "post_mix" if plan.back else "pre_mix"),
    )
    return call(*operands)


def _kernel(plan: Plan, streams, *refs):
    rest: list[Any] = list(refs)
    y, known = (rest.pop(0), rest.pop(0)) if plan.back else (None, None)
    fn, scale, base = (rest.pop(0), rest.pop(0), rest.pop(0)) if plan.into else (None, None, None)
    mixed = rest.pop(0) if plan.back else streams
    n = plan.streams
    weights = [] if known is None else _columns(plan, known[...])
    post, comb = weights[:n], weights[n:]

    def first_pass(c, carry):
        at = pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)
        rows = _rows(plan, streams, at)
        if plan.back:
            own = y[:, at].astype(jnp.float32)
            rows = [post[k] * own + sum(comb[j * n + k] * rows[j] for j in range(n)) for k in range(n)]
            rows = [row.astype(plan.dtype) for row in rows]
            for k in range(n):
                mixed[:, k, at] = rows[k]
            rows = [row.astype(jnp.float32) for row in rows]
        if not plan.into:
            return carry
        projected, squares = carry
        for i, row in enumerate(rows):
            where = pl.ds(pl.multiple_of(i * plan.width + c * plan.chunk, plan.chunk), plan.chunk)
            projected = projected + _product(plan, fn[:, where], _filled(row))
            square = row * row
            for lane in range(0, plan.chunk, plan.lanes):
                squares = squares + square[:, lane : lane + plan.lanes]
        return projected, squares

    parts = _parts(plan) * plan.mixes
    start = (jnp.zeros((parts, _TOKENS), jnp.float32), jnp.zeros((plan.block, plan.lanes), jnp.float32))
    carry = lax.fori_loop(0, plan.width // plan.chunk, first_pass, start if plan.into else None)
    if not plan.into:
        return
    x, coefficients = rest
    projected, squares = carry
    mixes = sum(projected[i * plan.mixes : (i + 1) * plan.mixes] for i in range(_parts(plan)))
    mean = jnp.sum(_filled(squares).T, axis=0, keepdims=True) / (n * plan.width)
    mixes = mixes * lax.rsqrt(mean + plan.norm_eps)

    def activated(part, low, high):
        return mixes[low:high] * scale[part] + base[low:high]

    pre = jax.nn.sigmoid(activated(0, 0, n)) + plan.hc_eps
    coefficients[:n, :] = 2 * jax.nn.sigmoid(activated(1, n, 2 * n))
    logits = activated(2, 2 * n, plan.mixes)
    for j, row in enumerate(_sinkhorn([logits[j * n : (j + 1) * n] for j in range(n)], plan)):
        coefficients[(1 + j) * n : (2 + j) * n, :] = row
    weights = _columns(plan, pre)

    def second_pass(c, _):
        at = pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)
        rows = _rows(plan, mixed, at)
        x[:, at] = sum(weights[i] * rows[i] for i in range(n)).astype(plan.dtype)

    lax.fori_loop(0, plan.width // plan.chunk, second_pass, None)


def _rows(plan: Plan, streams, at) -> list[jax.Array]:
    """The n streams [block, chunk] in float32, each on its own."""
    stored = streams[:, :, at].astype(jnp.float32)
    return [stored[:, i, :] for i in range(plan.streams)]


def _columns(plan: Plan, coefficients: jax.Array) -> list[jax.Array]:
    """Each row of [m, 128] as a column [block, 1], which multiplies tokens' channels."""
    turned = coefficients.T
    return [turned[: plan.block, i : i + 1] for i in range(coefficients.shape[0])]


def _filled(rows: jax.Array) -> jax.Array:
    """Rows of a block [block, ...] with zeros behind them up to 128."""
    missing = _TOKENS - rows.shape[0]
    return jnp.concatenate([rows, jnp.zeros((missing, rows.shape[1]), rows.dtype)], axis=0) if missing else rows


def _sinkhorn(rows: list[jax.Array], plan: Plan) -> list[jax.Array]:
    """Row j of every token's matrix as [n, tokens], from logits to doubly stochastic; see the twin."""
    eps = plan.hc_eps
    exponents = [jnp.exp(row - jnp.max(row, axis=0, keepdims=True)) for row in rows]
    rows = [e / jnp.sum(e, axis=0, keepdims=True) + eps for e in exponents]

    def normalise_columns(rows):
        total = functools.reduce(jnp.add, rows) + eps
        return [row / total for row in rows]

    def alternate(_, rows):
        return normalise_columns([row / (jnp.sum(row, axis=0, keepdims=True) + eps) for row in rows])

    return lax.fori_loop(0, plan.iterations - 1, alternate, normalise_columns(rows))


def _parts(plan: Plan) -> int:
    """Summands into which the projection's weights are taken apart."""
    return 3 if plan.dtype == jnp.bfloat16 else 1


def _product(plan: Plan, fn: jax.Array, row: jax.Array) -> jax.Array:
    """fn [m, chunk] times row [128, chunk] transposed: one [m, 128] for each summand of fn, below each other."""
    if plan.dtype == jnp.bfloat16:
        summands, rest = [], fn
        for _ in range(3):
            # Cut off and not rounded, so that three times eight bits are all of them and nothing can be simplified.
            bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
            summands.append(lax.bitcast_convert_type(bits, jnp.float32))
            rest = rest - summands[-1]
        fn = jnp.concatenate(summands, axis=0)
        if not plan.interpreted:
            return lax.dot_general(
                fn.astype(jnp.bfloat16), row.astype(jnp.bfloat16), _TRANSPOSED, preferred_element_type=jnp.float32
            )
    return lax.dot_general(fn, row, _TRANSPOSED, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _fast_memory(plan: Plan) -> int:
    """Double-buffered blocks, the projection's weights and what the compiler needs beside them."""
    itemsize = jnp.dtype(plan.dtype).itemsize
    streams = plan.block * plan.streams * plan.width * itemsize
    rows = plan.block * plan.width * itemsize
    weights = 4 * plan.mixes * plan.streams * plan.width if plan.into else 0
    values = 4 * plan.block * plan.chunk * (4 * plan.streams + 4)
    return 2 * (streams * (1 + plan.back) + rows * (plan.back + plan.into) + weights) + values + 6 * _MIB
