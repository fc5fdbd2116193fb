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

from deepseek_v4.formats import E4M3_MAX, decode_scale
from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul.blocks import merge_repeats, sort_into_blocks
from pallas_kernels.grouped_matmul.cost import kernel_bytes
from pallas_kernels.grouped_matmul.unserved import unserved_inputs
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

LANES = 128

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
    return f"{_kind(weight, scale)} {weight.shape[-2]} wide"


def _kind(weight: jax.Array, scale: jax.Array | None) -> str:
    return "bf16" if scale is None else "fp4" if weight.dtype == jnp.uint8 else "fp8"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    kind: str
    tokens: int
    choices: int
    experts: int
    hidden: int
    width: int
    limit: float
    simulate: bool
    rows: int
    product: int
    tile: int
    down: int
    cores: int
    native_fp8: bool

    @property
    def tiles(self) -> int:
        """Tiles of M that one core works through."""
        return self.width // (self.tile * self.cores)

    @property
    def packed(self) -> bool:
        """Whether two inputs share a byte."""
        return self.kind == "fp4"


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
    tokens, choices = expert_ids.shape
    weight, scale = w1
    tiles = tiles or tuned("expert_mlp", chip, shape_class(weight, scale), DEFAULT_TILES)
    most = max(1, tiles.assignments // choices)
    if tokens > most:
        parts = [
            expert_mlp(
                x[i : i + most],
                expert_ids[i : i + most],
                expert_weights[i : i + most],
                w1,
                w2,
                w3,
                limit=limit,
                simulate_activations=simulate_activations,
                layer=layer,
                tiles=tiles,
                interpret=interpret,
                cores=cores,
            )
            for i in range(0, tokens, most)
        ]
        return jnp.concatenate(parts)
    decode = tokens <= tiles.decode_tokens
    share = 1.1 * tokens * choices / weight.shape[1]
    products = (tiles.decode_product,) if decode else tiles.products
    product = next((p for p in products if p >= share), products[-1])
    hidden = w2[0].shape[2]
    plan = Plan(
        kind=_kind(weight, scale),
        tokens=tokens,
        choices=choices,
        experts=weight.shape[1],
        hidden=hidden,
        width=weight.shape[2],
        limit=float(limit),
        simulate=bool(simulate_activations),
        rows=min(tiles.rows, -(-tokens // product) * product),
        product=product,
        tile=tiles.width,
        down=next(d for d in (tiles.down, 512, 256) if hidden % d == 0),
        cores=cores or (1 if chip is None else chip.cores),
        native_fp8=chip is not None and "float8_e4m3fn" in chip.peak,
    )
    return _call(plan, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret)


def row_words(x: jax.Array) -> jax.Array:
    """bfloat16 [T, D] to uint32 [T, D/2], the second half of a row above the first: rows that one transfer can take."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    half = x.shape[1] // 2
    return bits[:, :half] | (bits[:, half:] << 16)


def _call(plan: Plan, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret):
    ids, merged = merge_repeats(expert_ids, expert_weights.astype(jnp.float32), plan.experts)
    blocks = sort_into_blocks(ids, merged, experts=plan.experts, rows=plan.rows)
    tokens = blocks.assignment // plan.choices
    prefetch = (layer.reshape(1), blocks.expert, blocks.first, blocks.size, tokens, blocks.routing)
    hidden, tile, cores, tiles = plan.hidden, plan.tile, plan.cores, plan.tiles

    def column(core, j):
        return core * tiles + j

    def input_side(core, block, j, layer, expert, *_):
        return layer[0], expert[block], column(core, j), 0

    def output_side(core, block, j, layer, expert, *_):
        return layer[0], expert[block], 0, column(core, j)

    def whole(core, block, j, layer, expert, *_):
        return layer[0], expert[block], 0, 0

    def scales(core, block, j, layer, expert, *_):
        return expert[block], 0, 0

    packing = 2 if plan.packed else 1
    first_spec = pl.BlockSpec((None, None, tile, hidden // packing), input_side)
    second_spec = pl.BlockSpec((None, None, hidden, tile // packing), output_side)
    operands, specs = [], []
    for (weight, scale), spec, scale_map in (
        (w1, first_spec, input_side),
        (w3, first_spec, input_side),
        (w2, second_spec, whole),
    ):
        operands.append(weight)
        specs.append(spec)
        if plan.kind == "fp4":
            stored, exchanged = tpu_decode.scales_as_laid_out(scale)
            operands.append(stored)
            rows, groups = tile if scale_map is input_side else hidden, scale.shape[-1]
            if exchanged:
                specs.append(pl.BlockSpec((None, None, groups, rows), _exchange(scale_map)))
            else:
                specs.append(pl.BlockSpec((None, None, rows, groups), scale_map))
        elif plan.kind == "fp8":
            of_layer = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
            operands.append(decode_scale(of_layer))
            specs.append(pl.BlockSpec((None, *of_layer.shape[1:]), scales, memory_space=pltpu.SMEM))
    scratch = [
        pltpu.VMEM((plan.rows, hidden // 2), jnp.uint32),  # rows of x as they arrive
        pltpu.VMEM((plan.rows, hidden), jnp.bfloat16),  # and as they are multiplied
        pltpu.VMEM((plan.rows, LANES), jnp.float32),  # their routing weights, the same in every lane
        pltpu.VMEM((plan.rows, hidden), jnp.float32),  # down projection so far
        pltpu.VMEM((plan.rows, hidden), jnp.float32),  # rows of the output
        pltpu.SemaphoreType.DMA((3,)),
    ]
    if plan.kind != "bf16":
        scratch += [
            pltpu.VMEM((tile // 2, hidden), jnp.uint32),
            pltpu.VMEM((tile // 2, hidden), jnp.uint32),
            pltpu.VMEM((hidden // 2, tile), jnp.uint32),
        ]
    if plan.packed:
        scratch += [
            pltpu.VMEM((tile // 2, _round_up(hidden // 32, LANES)), jnp.uint32),
            pltpu.VMEM((hidden // 2, _round_up(plan.width // 32, LANES)), jnp.uint32),
        ]
    out = jnp.zeros((cores, plan.tokens, hidden), jnp.float32)
    inputs = (*prefetch, *operands, tpu_decode.even_odd_permutation(), row_words(x), out)
    specs += [
        pl.BlockSpec((tpu_decode.CHUNK, tpu_decode.CHUNK), lambda *_: (0, 0)),
        pl.BlockSpec(memory_space=pltpu.HBM),
        pl.BlockSpec(memory_space=pltpu.HBM),
    ]
    call = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(cores, jnp.maximum(blocks.used, 1), tiles),
            in_specs=specs,
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_vmem_limit(plan)
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * plan.tokens * min(plan.choices, plan.experts) * hidden * plan.width,
            bytes_accessed=kernel_bytes(
                kind=plan.kind,
                tokens=plan.tokens,
                choices=plan.choices,
                hidden=hidden,
                width=plan.width,
                experts=plan.experts,
            ),
            transcendentals=plan.tokens * min(plan.choices, plan.experts) * plan.width,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=f"expert_mlp_{plan.kind}",
    )
    result = call(*inputs)
    return result[0] if cores == 1 else jnp.sum(result, axis=0)


def _kernel(plan: Plan, layer, expert, first, size, tokens, routing, *refs):
    read_rows = tpu_decode.plain_rows if plan.kind == "bf16" else tpu_decode.paired_rows
    per_weight = 1 if plan.kind == "bf16" else 2
    weights = [refs[i * per_weight : (i + 1) * per_weight] for i in range(3)]
    permutation, x, _, out, words, rows, scales, total, sums, semaphores, *decoded = refs[3 * per_weight :]
    core, block, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    blocks, last_tile = pl.num_programs(1), plan.tiles - 1
    count = size[block]
    arrive, read, write = (semaphores.at[i] for i in range(3))

    def transfers(which, copy, action):
        """Starts or awaits one transfer per row of block ``which``."""

        def step(row, _):
            getattr(copy(row, tokens[first[which] + row]), action)()

        lax.fori_loop(0, size[which], step, None)

    def fetch(row, token):
        return pltpu.make_async_copy(x.at[pl.ds(token, 1)], words.at[pl.ds(row, 1)], arrive)

    def read_sums(row, token):
        return pltpu.make_async_copy(out.at[core, pl.ds(token, 1)], sums.at[pl.ds(row, 1)], read)

    def write_sums(row, token):
        return pltpu.make_async_copy(sums.at[pl.ds(row, 1)], out.at[core, pl.ds(token, 1)], write)

    products = pl.cdiv(count, plan.product)

    def each_product(body):
        def step(i, _):
            body(pl.ds(pl.multiple_of(i * plan.product, plan.product), plan.product))

        lax.fori_loop(0, products, step, None)

    @pl.when(tile == 0)
    def begin_block():
        @pl.when(block == 0)
        def fetch_first():
            transfers(0, fetch, "start")

        def put_routing(row, _):
            scales[pl.ds(row, 1), :] = jnp.full((1, LANES), routing[first[block] + row], jnp.float32)

        lax.fori_loop(0, count, put_routing, None)
        transfers(block, fetch, "wait")

        def unpack(at):
            half = plan.hidden // 2
            for offset, bits in ((0, words[at, :] << 16), (half, words[at, :] & jnp.uint32(0xFFFF0000))):
                value = lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
                if plan.packed:
                    value = tpu_decode.split_even_odd(value, permutation[...])
                rows[at, offset : offset + half] = value
            total[at, :] = jnp.zeros((plan.product, plan.hidden), jnp.float32)

        each_product(unpack)

        @pl.when(block + 1 < blocks)
        def fetch_next():
            transfers(block + 1, fetch, "start")

    # The sums are read once the previous block's are written, which leaves the rest of this block to hide both.
    @pl.when(tile == min(1, last_tile))
    def begin_sums():
        @pl.when(block > 0)
        def await_previous():
            transfers(block - 1, write_sums, "wait")

        transfers(block, read_sums, "start")

    def activate(at, gate, up):
        weight = jnp.concatenate([scales[at, :]] * (plan.tile // LANES), axis=1)
        hidden = (clamped_swiglu(gate, up, plan.limit) * weight).astype(jnp.bfloat16)
        if plan.simulate:
            hidden = _simulate_fp8(hidden)
        return tpu_decode.split_even_odd(hidden, permutation[...]) if plan.packed else hidden

    w1, w3, w2 = _decode(plan, weights, decoded, core * plan.tiles + tile, tile == 0)

    def multiply(at):
        gate = _product(rows[at, :], read_rows(w1, 0, plan.tile))
        up = _product(rows[at, :], read_rows(w3, 0, plan.tile))
        hidden = activate(at, gate, up)

        def down(i, _):
            start = pl.multiple_of(i * plan.down, plan.down)
            total[at, pl.ds(start, plan.down)] += _product(hidden, read_rows(w2, start, plan.down))

        lax.fori_loop(0, plan.hidden // plan.down, down, None)

    each_product(multiply)

    @pl.when(tile == last_tile)
    def end_block():
        transfers(block, read_sums, "wait")

        def add(at):
            sums[at, :] += total[at, :]

        each_product(add)
        transfers(block, write_sums, "start")

        @pl.when(block + 1 == blocks)
        def await_last():
            transfers(block, write_sums, "wait")


def _exchange(index_map):
    """An index map of blocks [.., N, G] for an array whose last two dims are exchanged."""

    def exchanged(*indices):
        *leading, rows, groups = index_map(*indices)
        return *leading, groups, rows

    return exchanged


def _product(rows, matrix):
    return lax.dot_general(rows, matrix, _TRANSPOSED, preferred_element_type=jnp.float32)


def _decode(plan: Plan, weights, decoded, column, new_expert):
    """This tile of W1, W3 and W2 as refs of bfloat16 [tile, D], [tile, D], [D, tile], or of pairs of rows as words."""
    if plan.kind == "bf16":
        return tuple(weight for (weight,) in weights)
    tile_blocks = plan.tile // LANES
    if plan.kind == "fp8":
        for i, ((weight, scale), words) in enumerate(zip(weights, decoded, strict=True)):
            start = column * tile_blocks

            def scale_at(row, chunk, scale=scale, start=start, second=i == 2):
                return scale[row, start + chunk] if second else scale[start + row, chunk]

            tpu_decode.decode_fp8(weight, scale_at, words, native=plan.native_fp8)
    else:
        *words, in_scales, out_scales = decoded
        for (weight, scale), out in zip(weights[:2], words[:2], strict=True):
            tpu_decode.fp4_scale_words(scale, in_scales, plan.hidden // 32 % LANES != 0)
            tpu_decode.decode_fp4(weight, in_scales, 0, out)

        @pl.when(new_expert)
        def spread_scales():
            tpu_decode.fp4_scale_words(weights[2][1], out_scales, plan.width // 32 % LANES != 0)

        tpu_decode.decode_fp4(weights[2][0], out_scales, column * (plan.tile // 32), words[2])
    return tuple(decoded[:3])


def _simulate_fp8(x):
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


def _vmem_limit(plan: Plan) -> int:
    """Scratch, double-buffered weights and what the compiler needs beside them."""
    weight_bytes = {"fp4": 0.5, "fp8": 1, "bf16": 2}[plan.kind]
    blocks = 2 * 3 * plan.tile * plan.hidden * weight_bytes
    decoded = 0 if plan.kind == "bf16" else 3 * plan.tile * plan.hidden * 2
    scales = 0
    if plan.packed:
        lanes = _round_up(plan.hidden // 32, LANES)
        out_lanes = _round_up(plan.width // 32, LANES)
        scales = (2 * 2 + 2) * plan.tile * lanes + (2 + 2) * plan.hidden * out_lanes
    rows = plan.rows * (plan.hidden * (2 + 2 + 4 + 4) + 4 * LANES)
    return int(blocks + decoded + scales + rows) + 12 * _MIB


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
