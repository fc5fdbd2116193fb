"""The expert MLP on TPU: one pass over the weights of the experts that have rows, everything in between in VMEM.

Assignments are sorted by expert and cut into blocks of rows that never mix experts. A grid step takes one block and one
tile of the experts' width M: it decodes that tile of W1, W3 and W2 into VMEM, computes gate, up and the hidden
activation of the block's rows, and adds their share of the down projection to an accumulator; after the last tile the
rows are added to the output. Rows come and go one transfer each (x as 32-bit words, the output as float32), so nothing
is sorted, padded or expanded in HBM. A token's experts are summed in ascending order of expert, and each row's
arithmetic involves no other row: a token's result does not depend on what else is in the batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.formats import E4M3_MAX
from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul import tpu_weights
from pallas_kernels.grouped_matmul.cost import kernel_bytes
from pallas_kernels.grouped_matmul.tpu_call import blocks_of, call
from pallas_kernels.grouped_matmul.tpu_plan import LANES, Plan, in_parts, kind_of, plan_of
from pallas_kernels.grouped_matmul.tpu_rows import RowTraffic, row_halves, row_words
from pallas_kernels.grouped_matmul.unserved import unserved_inputs
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

_TRANSPOSED = (((1,), (1,)), ((), ()))
"""Rows [R, K] times weights [N, K]: both contract their minor dim, as weights are stored."""

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block sizes, the numbers that a tuner sweeps.

    ``width``: columns of M per grid step. ``rows``: most rows of one expert that share one read of its weights.
    ``decode_tokens``: calls of at most so many tokens multiply ``decode_product`` rows at a time, longer ones the least
    of ``products`` that holds an expert's mean share of the rows and a tenth more. ``down``: output columns per
    product. ``assignments``: most of one kernel call (they live in SMEM).
    """

    width: int = 256
    rows: int = 256
    decode_tokens: int = 256
    decode_product: int = 16
    products: tuple[int, ...] = (64, 128)
    down: int = 1024
    assignments: int = 65536


DEFAULT_TILES = Tiles()

CANDIDATES = (
    DEFAULT_TILES,
    *(
        Tiles(width=width, rows=rows, down=down)
        for width in (256, 512)
        for rows in (128, 256, 512)
        for down in (512, 1024)
        if (width, rows, down) != (256, 256, 1024)
    ),
)
"""What a tuner may try. The width decides in which parts the hidden activations are added up."""


def shape_class(weight: jax.Array, scale: jax.Array | None) -> str:
    """The class of shapes that share tiles, whatever the number of tokens: format and size of an expert."""
    return f"{kind_of(weight, scale)} {weight.shape[-2]} wide"


def unserved(chip: Chip | None, x: jax.Array, w1: tuple, w2: tuple, *, adapted: bool = False) -> str | None:
    """Why the kernel cannot serve a call, or None: bfloat16 rows, dims in whole tiles, and no adapters."""
    if (reason := unserved_inputs(x, w1, adapted=adapted)) is not None:
        return reason
    hidden, width = w2[0].shape[-2], w1[0].shape[-2]
    tile = tuned("expert_mlp", chip, shape_class(*w1), DEFAULT_TILES).width * (1 if chip is None else chip.cores)
    if hidden % 512 or width % tile:
        return f"hidden size {hidden} and expert width {width} must be multiples of 512 and {tile}"
    return None


def expert_mlp(
    x,
    expert_ids,
    expert_weights,
    w1,
    w2,
    w3,
    *,
    limit,
    simulate_activations,
    layer,
    tiles: Tiles | None = None,
    interpret=False,
    cores=None,
):
    """See ``pallas_kernels.grouped_matmul.expert_mlp``; ``tiles`` and the ``cores`` that split the width default to
    the chip's.
    """
    if layer is None:
        w1, w2, w3 = (tuple(None if a is None else a[None] for a in w) for w in (w1, w2, w3))
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    chip = None if interpret else current_chip()
    tiles = tiles or tuned("expert_mlp", chip, shape_class(*w1), DEFAULT_TILES)

    def run(x, expert_ids, expert_weights):
        plan = plan_of(
            x,
            expert_ids,
            w1,
            limit=limit,
            simulate=bool(simulate_activations),
            rows=tiles.rows,
            products=(tiles.decode_product,) if x.shape[0] <= tiles.decode_tokens else tiles.products,
            tile=tiles.width,
            down=tiles.down,
            chip=chip,
            cores=cores,
        )
        return _call(plan, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret)

    return in_parts(run, (x, expert_ids, expert_weights), max(1, tiles.assignments // expert_ids.shape[1]))


def _call(plan: Plan, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret):
    hidden = plan.hidden
    blocks = blocks_of(plan, expert_ids, expert_weights)
    (result,) = call(
        functools.partial(_kernel, plan),
        plan,
        blocks,
        blocks.assignment // plan.choices,
        row_words(x),
        (w1, w2, w3),
        layer,
        scratch=[
            pltpu.VMEM((plan.rows, hidden // 2), jnp.uint32),  # rows of x as they arrive
            pltpu.VMEM((plan.rows, hidden), jnp.bfloat16),  # and as they are multiplied
            pltpu.VMEM((plan.rows, LANES), jnp.float32),  # their routing weights, the same in every lane
            pltpu.VMEM((plan.rows, hidden), jnp.float32),  # down projection so far
            pltpu.VMEM((plan.rows, hidden), jnp.float32),  # rows of the output
            pltpu.SemaphoreType.DMA((3,)),
        ],
        flops=6 * plan.served * hidden * plan.width,
        moved=kernel_bytes(**plan.sizes),
        # Of rows, and what the compiler needs beside them and the weights.
        vmem_bytes=plan.rows * (hidden * (2 + 2 + 4 + 4) + 4 * LANES) + 12 * _MIB,
        name="expert_mlp",
        interpret=interpret,
    )
    return result[0] if plan.cores == 1 else jnp.sum(result, axis=0)


def _kernel(plan: Plan, layer, expert, first, size, tokens, routing, *refs):
    per_weight = tpu_weights.operands_per_weight(plan)
    weights = [refs[i * per_weight : (i + 1) * per_weight] for i in range(3)]
    permutation, x, _, out, words, rows, scales, total, sums, semaphores, *decoded = refs[3 * per_weight :]
    core, tile = pl.program_id(0), pl.program_id(2)
    last_tile = plan.tiles - 1
    traffic = RowTraffic(plan, first, size, lambda position: tokens[position], x, words, out.at[core], sums, semaphores)

    def put_routing(row, position):
        scales[pl.ds(row, 1), :] = jnp.full((1, LANES), routing[position], jnp.float32)

    def unpack(at):
        half = plan.hidden // 2
        for offset, value in zip((0, half), row_halves(words[at, :]), strict=True):
            if plan.packed:
                value = tpu_decode.split_even_odd(value, permutation[...])
            rows[at, offset : offset + half] = value
        total[at, :] = jnp.zeros((plan.product, plan.hidden), jnp.float32)

    pl.when(tile == 0)(lambda: traffic.begin_block(put_routing, unpack))
    pl.when(tile == min(1, last_tile))(traffic.begin_sums)

    def activate(at, gate, up):
        weight = jnp.concatenate([scales[at, :]] * (plan.tile // LANES), axis=1)
        hidden = (clamped_swiglu(gate, up, plan.limit) * weight).astype(jnp.bfloat16)
        if plan.simulate:
            hidden = simulate_fp8(hidden)
        return tpu_decode.split_even_odd(hidden, permutation[...]) if plan.packed else hidden

    w1, w3, w2 = tpu_weights.decode(plan, weights, decoded, core * plan.tiles + tile, tile == 0)

    def multiply(at):
        gate, up = (_product(rows[at, :], tpu_weights.read(plan, w, plan.tile, plan.hidden)) for w in (w1, w3))
        hidden = activate(at, gate, up)

        def down(i, _):
            start = pl.multiple_of(i * plan.down, plan.down)
            matrix = tpu_weights.read(plan, w2, plan.down, plan.tile, row=start)
            total[at, pl.ds(start, plan.down)] += _product(hidden, matrix)

        lax.fori_loop(0, plan.hidden // plan.down, down, None)

    traffic.each_product(multiply)

    def add(at):
        traffic.add_to_sums(at, slice(None), total[at, :])

    pl.when(tile == last_tile)(lambda: traffic.end_block(add))


def _product(rows, matrix):
    return lax.dot_general(rows, matrix, _TRANSPOSED, preferred_element_type=jnp.float32)


def simulate_fp8(x):
    """bfloat16 [R, C] through E4M3 with one power-of-two scale per 128 columns, rounded up, as ``simulate_fp8``."""
    groups = []
    for i in range(0, x.shape[1], LANES):
        value = x[:, i : i + LANES].astype(jnp.float32)
        amax = jnp.maximum(jnp.max(jnp.abs(value), axis=1, keepdims=True), 1e-4)
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        # 448 = 1.75 * 2^8: the exponent of the ratio, plus one if the mantissa is beyond 1.75. No division.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
        scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
        inverse = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
        codes = jnp.clip(value * inverse, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
        groups.append((codes.astype(jnp.float32) * scale).astype(jnp.bfloat16))
    return jnp.concatenate(groups, axis=1)
