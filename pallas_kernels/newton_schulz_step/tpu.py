"""Newton-Schulz steps on TPU: three calls of one blocked product of float32 matrices, which ends in a sum.

XLA's own float32 product is as fast as it can be, but takes its compiler 20 to 30 seconds of CPU time and up to a
megabyte of code for every shape (libtpu 0.0.42), of which an optimizer has dozens; a call of this takes one second.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.targets import Chip

_LANES = 128

_SIZES = (512, 384, 256, 128)
"""Sides of a block to choose from: six passes over blocks of 512 take longer than to read them, on every chip."""


def unserved(chip: Chip | None, x: jax.Array, dtype: jax.typing.DTypeLike) -> str | None:
    """Why the kernel cannot serve matrices x [m, rows, cols], or None."""
    if chip is not None and chip.platform != "tpu":
        return "there is no kernel for GPUs"
    if jnp.dtype(dtype) != jnp.float32 or x.dtype != jnp.float32:
        return f"operands are {jnp.dtype(dtype)}, which XLA's own product serves; the kernel multiplies float32"
    rows, columns = x.shape[-2:]
    if x.size == 0 or columns % _LANES or (rows > _LANES and rows % _LANES):
        return f"matrices are {rows} x {columns}, expected columns, and rows beyond {_LANES}, in multiples of {_LANES}"
    return None


def newton_schulz_step(x, coefficients, *, dtype, interpret=False):
    """See ``pallas_kernels.newton_schulz_step``."""
    del dtype
    a, b, c = coefficients
    gram = _product(x, x, transposed=True, interpret=interpret)
    polynomial = _product(gram, gram, gram, jnp.stack([b, c]), interpret=interpret)
    return _product(polynomial, x, x, jnp.stack([a, jnp.ones_like(a)]), interpret=interpret)


def _product(a, b, addend=None, factors=None, *, transposed=False, interpret=False):
    """a [m, r, k] times b [m, k, c] ([m, c, k] if ``transposed``), or factors[0] addend + factors[1] a b."""
    count, rows, depth = a.shape
    columns = b.shape[1 if transposed else 2]
    row, column, step = (_block(size) for size in (rows, columns, depth))

    def spec(*block, index):
        return pl.BlockSpec((1, *block), index)

    right = (
        spec(column, step, index=lambda m, i, j, k: (m, j, k))
        if transposed
        else spec(step, column, index=lambda m, i, j, k: (m, k, j))
    )
    result = spec(row, column, index=lambda m, i, j, k: (m, i, j))
    specs, operands = [spec(row, step, index=lambda m, i, j, k: (m, i, k)), right], [a, b]
    if addend is not None:
        specs += [result, pl.BlockSpec(memory_space=pltpu.SMEM)]
        operands += [addend, factors]
    return pl.pallas_call(
        functools.partial(_multiply, transposed),
        grid=(count, rows // row, columns // column, depth // step),
        in_specs=specs,
        out_specs=result,
        out_shape=jax.ShapeDtypeStruct((count, rows, columns), jnp.float32),
        scratch_shapes=[pltpu.VMEM((row, column), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(*3 * ("parallel",), "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * rows * columns * depth,
            bytes_accessed=4 * (sum(o.size for o in operands) + count * rows * columns),
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="newton_schulz_product",
    )(*operands)


def _block(size: int) -> int:
    """The largest block that divides a side; a side without one is one block."""
    return next((block for block in _SIZES if size % block == 0), size)


def _multiply(transposed, a, b, *refs):
    *added, out, total = refs
    step = pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        total[...] = jnp.zeros_like(total)

    sides = (((1,), (1 if transposed else 0,)), ((), ()))
    total[...] += lax.dot_general(
        a[0], b[0], sides, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    @pl.when(step == pl.num_programs(3) - 1)
    def end():
        if added:
            addend, factors = added
            out[0] = factors[0] * addend[0] + factors[1] * total[...]
        else:
            out[0] = total[...]
