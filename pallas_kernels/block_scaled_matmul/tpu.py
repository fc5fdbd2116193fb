"""Dense linears with E4M3 weights on TPU: a tile of whole weight rows is decoded in VMEM and multiplied at once.

A grid step takes a tile of rows of x and a tile of outputs, with all of their K inputs: nothing is accumulated across
steps, and up to ``Tiles.rows`` rows share one read and one decoding of the weight.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import FP8_BLOCK, decode_scale
from pallas_kernels import tpu_decode
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

_MIB = 1 << 20

_TRANSPOSED = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes, the numbers that a tuner sweeps.

    ``rows``: most rows of x per step; ``row_elements`` and ``weight_elements``: most elements of a tile of x and of the
    weight; ``outputs``: widths of a tile to choose from; ``product``: rows of x per matrix product.
    """

    rows: int = 1024
    row_elements: int = 8 << 20
    weight_elements: int = 4 << 20
    outputs: tuple[int, ...] = (512, 384, 256, 128)
    product: int = 256


DEFAULT_TILES = Tiles()

CANDIDATES = (
    DEFAULT_TILES,
    *(
        Tiles(rows, weight_elements=elements << 20, product=product)
        for rows in (512, 1024, 2048)
        for elements in (1, 2, 4)
        for product in (128, 256, 512)
        if (rows, elements, product) != (1024, 4, 256)
    ),
)
"""What a tuner may try: an output is one product over all inputs with each of them."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: x [M, groups * K] with weights [N, K]."""

    rows: int
    inputs: int
    outputs: int
    groups: int
    row_tile: int
    product: int
    output_tile: int
    native_fp8: bool

    @property
    def row_tiles(self) -> int:
        """Tiles of rows; the last one may be partial."""
        return -(-self.rows // self.row_tile)


def block_scaled_matmul(x, weight, scale, *, groups, layer, tiles: Tiles | None = None, interpret=False):
    """See ``pallas_kernels.block_scaled_matmul.block_scaled_matmul``; ``tiles`` default to the chip's."""
    chip = None if interpret else current_chip()
    if layer is None:
        weight, scale = weight[None], scale[None]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    outputs, inputs = weight.shape[1:]
    leading = x.shape[: -1 if groups == 1 else -2]
    tiles = tiles or tuned("block_scaled_matmul", chip, "all", DEFAULT_TILES)
    plan = _plan(math.prod(leading), inputs, outputs, groups, chip, tiles)
    scale = decode_scale(lax.dynamic_index_in_dim(scale, layer, keepdims=False))
    out = _call(plan, x.reshape(plan.rows, groups * inputs), weight, scale, layer, interpret)
    return out.reshape(*leading, outputs) if groups == 1 else out.reshape(*leading, groups, outputs // groups)


def _plan(rows: int, inputs: int, outputs: int, groups: int, chip: Chip | None, tiles: Tiles) -> Plan:
    row_tile = min(tiles.rows, -(-rows // 16) * 16)
    while row_tile > tiles.product and row_tile * inputs > tiles.row_elements:
        row_tile = max(tiles.product, row_tile // 2 // 16 * 16)
    product = min(tiles.product, row_tile)
    row_tile = -(-row_tile // product) * product
    fitting = [t for t in tiles.outputs if outputs // groups % t == 0]
    output_tile = next((t for t in fitting if t * inputs <= tiles.weight_elements), fitting[-1])
    native = chip is not None and "float8_e4m3fn" in chip.peak
    return Plan(rows, inputs, outputs, groups, row_tile, product, output_tile, native)


def _call(plan: Plan, x, weight, scale, layer, interpret):
    per_group = plan.outputs // plan.groups // plan.output_tile
    tiles = plan.outputs // plan.output_tile

    # The first dim of the grid is what the cores of a chip share: rows, or outputs where one tile holds all rows.
    def place(i, j):
        return (i, j) if plan.row_tiles > 1 else (j, i)

    def of_rows(i, j, layer):
        m, n = place(i, j)
        return m, n // per_group

    def of_outputs(i, j, layer):
        return layer[0], place(i, j)[1], 0

    rows = -(-plan.rows // plan.row_tile) * plan.row_tile
    call = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=place(plan.row_tiles, tiles),
            in_specs=[
                pl.BlockSpec((plan.row_tile, plan.inputs), of_rows),
                pl.BlockSpec((None, plan.output_tile, plan.inputs), of_outputs),
                pl.BlockSpec(memory_space=pltpu.SMEM),
            ],
            out_specs=pl.BlockSpec((plan.row_tile, plan.output_tile), lambda i, j, layer: place(i, j)),
            scratch_shapes=[pltpu.VMEM((plan.output_tile // 2, plan.inputs), jnp.uint32)],
        ),
        out_shape=jax.ShapeDtypeStruct((plan.rows, plan.outputs), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem_limit(plan)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * plan.outputs * plan.inputs,
            bytes_accessed=plan.outputs * plan.inputs * plan.row_tiles
            + 2 * plan.rows * (plan.inputs * plan.groups + plan.outputs),
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="block_scaled_matmul",
    )
    return call(layer.reshape(1), x, weight, scale)


def _kernel(plan: Plan, _, x, weight, scale, out, decoded):
    first = pl.program_id(1 if plan.row_tiles > 1 else 0) * (plan.output_tile // FP8_BLOCK)
    tpu_decode.decode_fp8(weight, lambda i, j: scale[first + i, j], decoded, native=plan.native_fp8)

    def multiply(i, _):
        at = pl.ds(pl.multiple_of(i * plan.product, plan.product), plan.product)
        matrix = tpu_decode.paired_rows(decoded, 0, plan.output_tile)
        product = lax.dot_general(x[at, :], matrix, _TRANSPOSED, preferred_element_type=jnp.float32)
        out[at, :] = product.astype(jnp.bfloat16)

    lax.fori_loop(0, plan.row_tile // plan.product, multiply, None)


def _vmem_limit(plan: Plan) -> int:
    """Double-buffered operands, the decoded tile and what the compiler needs beside them."""
    weight = plan.output_tile * plan.inputs * (2 + 2)
    rows = 2 * 2 * plan.row_tile * (plan.inputs + plan.output_tile)
    return weight + rows + 4 * plan.product * plan.output_tile + 8 * _MIB
