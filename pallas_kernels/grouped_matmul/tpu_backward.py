"""TPU kernel: the gradient of the expert MLP to its rows and routing weights, through weights as they are stored.

Blocks of rows, tiles of the width, transfers and decoding are those of ``tpu``. A grid step decodes a tile of W1, W3
and W2 once for five products: gate and up again, the gradient of the hidden activations (W2's tile, contracted over the
other dim), and what those of gate and up add to the rows' (W1's and W3's). To keep gate and up instead would spare two
products and no byte of weights, and move 8 bytes per row and column of M, held from the forward pass on.

Where weights are trained, the same pass leaves the rows of its blocks in HBM, and the gradients of gate and up and the
inputs of W2 with them, 2 bytes per number: what ``tpu_weight_gradient`` makes those of the matrices from.

A token's experts are added in ascending order of expert, and a row's arithmetic involves no other row. The gradients
of routing weights stay in VMEM until all are there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_v4.nn.swiglu import clamped_swiglu
from pallas_kernels import tpu_decode
from pallas_kernels.grouped_matmul import tpu_weights
from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.grouped_matmul.cost import kept_row_bytes, kernel_gradient_bytes
from pallas_kernels.grouped_matmul.tpu import simulate_fp8
from pallas_kernels.grouped_matmul.tpu_call import blocks_of, call
from pallas_kernels.grouped_matmul.tpu_plan import LANES, Plan, in_parts, kind_of, plan_of
from pallas_kernels.grouped_matmul.tpu_rows import RowTraffic, row_halves, row_words
from pallas_kernels.grouped_matmul.tpu_weight_gradient import BlockRows, WeightTiles, default_tiles, weight_gradients
from pallas_kernels.grouped_matmul.unserved import unserved_inputs
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned

_TRANSPOSED = (((1,), (1,)), ((), ()))
_PLAIN = (((1,), (0,)), ((), ()))

_MIB = 1 << 20

_BYTES_PER_NUMBER = 16
"""Of a row in VMEM: words of x and gradient as they arrive, both as they are multiplied, two float32 sums."""


@dataclasses.dataclass(frozen=True)
class GradientTiles:
    """Block sizes, the numbers that a tuner sweeps.

    ``width``: columns of M per grid step. ``rows``: most rows of one expert that share one read of its weights, the
    first of which the rows take at most ``row_memory`` bytes of VMEM. ``products``: rows multiplied at a time, the
    least that holds an expert's mean share and a tenth more. ``columns`` of the hidden size per product.
    ``assignments``: most of one kernel call (they live in SMEM).
    """

    width: int = 256
    rows: tuple[int, ...] = (512, 256, 128)
    row_memory: int = 34 * _MIB
    products: tuple[int, ...] = (128, 256)
    columns: int = 1024
    assignments: int = 65536

    def rows_for(self, hidden: int) -> int:
        """The most rows of a block of this hidden size."""
        return next((r for r in self.rows if r * hidden * _BYTES_PER_NUMBER <= self.row_memory), self.rows[-1])


CANDIDATES = (
    GradientTiles(),
    *(
        GradientTiles(rows=rows, products=(product,), columns=columns)
        for rows in ((512, 256, 128), (256, 128), (128,))
        for product in (128, 256)
        for columns in (512, 1024)
        if product <= rows[0]
    ),
)
"""What a tuner may try."""


def shape_class(weight: jax.Array, scale: jax.Array | None) -> str:
    """The class of shapes that share tiles, whatever the number of tokens: format and size of an expert."""
    return f"{kind_of(weight, scale)} {weight.shape[-2]} wide"


def unserved(chip: Chip | None, x: jax.Array, w1: tuple, w2: tuple) -> str | None:
    """Why the kernel cannot serve a call, or None: bfloat16 rows and dims in whole tiles."""
    if (reason := unserved_inputs(x, w1, adapted=False)) is not None:
        return reason
    hidden, width = w2[0].shape[-2], w1[0].shape[-2]
    tile = _tiles(chip, w1).width * (1 if chip is None else chip.cores)
    if hidden % 512 or width % tile:
        return f"hidden size {hidden} and expert width {width} must be multiples of 512 and {tile}"
    return None


def _tiles(chip: Chip | None, w1: tuple) -> GradientTiles:
    return tuned("expert_mlp_gradient", chip, shape_class(*w1), GradientTiles())


def expert_mlp_gradient(
    gradient,
    x,
    expert_ids,
    expert_weights,
    w1,
    w2,
    w3,
    *,
    limit,
    layer,
    tiles: GradientTiles | None = None,
    interpret=False,
    cores=None,
):
    """See ``pallas_kernels.grouped_matmul.expert_mlp_gradient``; ``tiles`` and ``cores`` default to the chip's."""
    (w1, w2, w3), layer = _stacked((w1, w2, w3), layer)
    chip = None if interpret else current_chip()
    tiles = tiles or _tiles(chip, w1)

    def run(gradient, x, expert_ids, expert_weights):
        plan = _plan(tiles, x, expert_ids, w1, limit=limit, simulate=False, chip=chip, cores=cores)
        found, _, _ = _call(plan, gradient, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret)
        return found

    rows = (gradient, x, expert_ids, expert_weights)
    return in_parts(run, rows, _most_rows(tiles, expert_ids))


def expert_mlp_weight_gradient(
    gradient,
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
    totals,
    tiles: GradientTiles | None = None,
    weight_tiles: WeightTiles | None = None,
    interpret=False,
    cores=None,
):
    """See ``pallas_kernels.grouped_matmul.expert_mlp_weight_gradient``; the sizes default to the chip's."""
    (w1, w2, w3), layer = _stacked((w1, w2, w3), layer)
    chip = None if interpret else current_chip()
    tiles = tiles or _tiles(chip, w1)
    weight_tiles = weight_tiles or tuned("expert_mlp_weight_gradient", chip, shape_class(*w1), default_tiles(chip))

    def run(gradient, x, expert_ids, expert_weights):
        nonlocal totals
        plan = _plan(tiles, x, expert_ids, w1, limit=limit, simulate=bool(simulate_activations), chip=chip, cores=cores)
        arguments = (gradient, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret)
        found, blocks, rows = _call(plan, *arguments, keep=True)
        options = {"tiles": weight_tiles, "cores": plan.cores, "interpret": interpret}
        totals = weight_gradients(rows, blocks.expert, blocks.size, plan.experts, totals, **options)
        return found

    rows = (gradient, x, expert_ids, expert_weights)
    return *in_parts(run, rows, _most_rows(tiles, expert_ids)), totals


def _stacked(weights, layer):
    """The weights as a stack of layers, and the index of the one in use."""
    if layer is None:
        weights = tuple(tuple(None if a is None else a[None] for a in w) for w in weights)
    return weights, jnp.asarray(0 if layer is None else layer, jnp.int32)


def _plan(tiles: GradientTiles, x, expert_ids, w1, *, limit, simulate, chip, cores) -> Plan:
    return plan_of(
        x,
        expert_ids,
        w1,
        limit=limit,
        simulate=simulate,
        rows=tiles.rows_for(x.shape[1]),
        products=tiles.products,
        tile=tiles.width,
        down=tiles.columns,
        chip=chip,
        cores=cores,
    )


def _most_rows(tiles: GradientTiles, expert_ids) -> int:
    return max(1, tiles.assignments // expert_ids.shape[1])


def _call(
    plan: Plan, gradient, x, expert_ids, expert_weights, w1, w2, w3, layer, interpret, keep=False
) -> tuple[tuple[jax.Array, jax.Array], Blocks, BlockRows | None]:
    """((dx, drouting), the blocks, and if they are to be kept the rows that gradients of weights are made from)."""
    hidden = plan.hidden
    blocks = blocks_of(plan, expert_ids, expert_weights)
    token, choice = jnp.divmod(blocks.assignment, plan.choices)
    of_routing = jax.ShapeDtypeStruct((plan.cores, -(-expert_ids.size // LANES), LANES), jnp.float32)
    of_rows, of_first, *kept = call(
        functools.partial(_kernel, plan, keep),
        plan,
        blocks,
        token << _choice_bits(plan) | choice,
        jnp.concatenate([row_words(x), row_words(gradient.astype(x.dtype))], axis=1),
        (w1, w2, w3),
        layer,
        scratch=[
            pltpu.VMEM((plan.rows, hidden), jnp.uint32),  # rows of x and of the gradient as they arrive
            pltpu.VMEM((plan.rows, hidden), jnp.bfloat16),  # and as they are multiplied: of x
            pltpu.VMEM((plan.rows, hidden), jnp.bfloat16),  # and of the gradient
            pltpu.VMEM((plan.rows, LANES), jnp.float32),  # their routing weights, the same in every lane
            pltpu.VMEM((plan.rows, LANES), jnp.float32),  # gradients of the routing weights so far, one part per lane
            pltpu.VMEM((plan.rows, hidden), jnp.float32),  # gradients of the rows so far
            pltpu.VMEM((plan.rows, hidden), jnp.float32),  # rows of the result
            pltpu.SemaphoreType.DMA((5 if keep else 3,)),
        ],
        results=[
            (of_routing, pl.BlockSpec((None, *of_routing.shape[1:]), lambda core, *_: (core, 0, 0))),
            *(_kept_rows(plan, blocks) if keep else ()),
        ],
        flops=10 * plan.served * hidden * plan.width,
        moved=kernel_gradient_bytes(**plan.sizes) + (plan.served * kept_row_bytes(hidden, plan.width) if keep else 0),
        vmem_bytes=_vmem_bytes(plan) + (2 * 3 * 2 * plan.rows * plan.tile if keep else 0),
        name="expert_mlp_weight_gradient" if keep else "expert_mlp_gradient",
        interpret=interpret,
    )
    # Cores in their order: the sum of two float32 numbers, whatever the batch.
    of_rows, of_first = (functools.reduce(jnp.add, list(of_core)) for of_core in (of_rows, of_first))
    of_first = of_first.reshape(-1)[: expert_ids.size].reshape(expert_ids.shape)
    found = of_rows, _of_every_choice(expert_ids, of_first, plan.experts)
    return found, blocks, BlockRows(*kept) if keep else None


def _kept_rows(plan: Plan, blocks: Blocks) -> list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """The results of ``BlockRows``: whole rows, which the kernel sends itself, and a tile's columns of M."""
    count, rows = blocks.expert.size, plan.rows
    whole = (jax.ShapeDtypeStruct((count, rows, plan.hidden), jnp.bfloat16), pl.BlockSpec(memory_space=pltpu.HBM))
    tile = pl.BlockSpec((None, rows, plan.tile), lambda core, block, j, *_: (block, 0, core * plan.tiles + j))
    return [whole, whole, *[(jax.ShapeDtypeStruct((count, rows, plan.width), jnp.bfloat16), tile)] * 3]


def _of_every_choice(expert_ids, of_first, experts: int):
    """Gradients of routing weights [N, K] from those of an expert's first occurrence; those of the others are zero."""
    same = (expert_ids[:, :, None] == expert_ids[:, None, :]) & ((expert_ids >= 0) & (expert_ids < experts))[:, None, :]
    return jnp.sum(jnp.where(same, of_first[:, None, :], 0.0), axis=-1)


def _choice_bits(plan: Plan) -> int:
    """Bits of a prefetched place that are the choice; those above are the token. A kernel divides by shifts alone."""
    return (plan.choices - 1).bit_length()


def _kernel(plan: Plan, keep: bool, layer, expert, first, size, place, routing, *refs):
    per_weight = tpu_weights.operands_per_weight(plan)
    weights = [refs[i * per_weight : (i + 1) * per_weight] for i in range(3)]
    permutation, source, _, result, of_routing, *others = refs[3 * per_weight :]
    kept, scratch = (BlockRows(*others[:5]), others[5:]) if keep else (None, others)
    words, x, gradient, scales, parts, total, sums, semaphores, *decoded = scratch
    core, tile = pl.program_id(0), pl.program_id(2)
    hidden, last_tile = plan.hidden, plan.tiles - 1
    traffic = RowTraffic(
        plan,
        first,
        size,
        lambda position: place[position] >> _choice_bits(plan),
        source,
        words,
        result.at[core],
        sums,
        semaphores,
    )

    @pl.when((pl.program_id(1) == 0) & (tile == 0))
    def begin():
        of_routing[...] = jnp.zeros_like(of_routing)

    def put_routing(row, position):
        scales[pl.ds(row, 1), :] = jnp.full((1, LANES), routing[position], jnp.float32)

    def unpack(at):
        half = hidden // 2
        for start, target in ((0, x), (half, gradient)):
            for offset, value in zip((0, half), row_halves(words[at, start : start + half]), strict=True):
                if plan.packed and target is x:
                    value = tpu_decode.split_even_odd(value, permutation[...])
                target[at, offset : offset + half] = value
        total[at, :] = jnp.zeros((plan.product, hidden), jnp.float32)
        parts[at, :] = jnp.zeros((plan.product, LANES), jnp.float32)

    pl.when(tile == 0)(lambda: traffic.begin_block(put_routing, unpack))
    pl.when(tile == min(1, last_tile))(traffic.begin_sums)

    def keep_rows(act):
        """``act`` on the transfers of this block's rows, which the first core makes."""
        for i, (rows, target) in enumerate(((x, kept.x), (gradient, kept.gradient))):
            copy = pltpu.make_async_copy(rows, target.at[pl.program_id(1)], semaphores.at[3 + i])
            pl.when(core == 0)(functools.partial(act, copy))

    if keep:
        pl.when(tile == 0)(lambda: keep_rows(lambda copy: copy.start()))

    w1, w3, w2 = tpu_weights.decode(plan, weights, decoded, core * plan.tiles + tile, tile == 0)

    def multiply(at):
        gate, up = (_product(x[at, :], tpu_weights.read(plan, w, plan.tile, hidden), _TRANSPOSED) for w in (w1, w3))
        of_hidden = _product(gradient[at, :], tpu_weights.read(plan, w2, hidden, plan.tile), _PLAIN)
        if plan.packed:
            of_hidden = tpu_decode.join_even_odd(of_hidden)
        active, pull = jax.vjp(functools.partial(clamped_swiglu, limit=plan.limit), gate, up)
        along = of_hidden * active
        parts[at, :] += functools.reduce(jnp.add, [along[:, i : i + LANES] for i in range(0, plan.tile, LANES)])
        weight = jnp.concatenate([scales[at, :]] * (plan.tile // LANES), axis=1)
        of_gate, of_up = (d.astype(jnp.bfloat16) for d in pull(of_hidden * weight))
        if keep:
            inputs = (active * weight).astype(jnp.bfloat16)
            kept.of_gate[at, :], kept.of_up[at, :] = of_gate, of_up
            kept.hidden[at, :] = simulate_fp8(inputs) if plan.simulate else inputs

        def add_columns(i, _):
            start = pl.multiple_of(i * plan.down, plan.down)
            columns = [tpu_weights.read(plan, w, plan.tile, plan.down, column=start) for w in (w1, w3)]
            added = _product(of_gate, columns[0], _PLAIN) + _product(of_up, columns[1], _PLAIN)
            total[at, pl.ds(start, plan.down)] += added

        lax.fori_loop(0, hidden // plan.down, add_columns, None)

    traffic.each_product(multiply)

    def add(at):
        def add_columns(i, _):
            columns = pl.ds(pl.multiple_of(i * tpu_decode.CHUNK, tpu_decode.CHUNK), tpu_decode.CHUNK)
            value = total[at, columns]
            traffic.add_to_sums(at, columns, tpu_decode.join_even_odd(value) if plan.packed else value)

        lax.fori_loop(0, hidden // tpu_decode.CHUNK, add_columns, None)
        parts[at, :] = jnp.broadcast_to(jnp.sum(parts[at, :], axis=1, keepdims=True), (plan.product, LANES))

    def put_of_routing(row, position):
        bits, here = _choice_bits(plan), place[position]
        number = (here >> bits) * plan.choices + (here & ((1 << bits) - 1))
        line = pl.ds(number >> (LANES.bit_length() - 1), 1)
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        of_routing[line, :] = jnp.where(lane == (number & (LANES - 1)), parts[pl.ds(row, 1), :], of_routing[line, :])

    @pl.when(tile == last_tile)
    def end():
        traffic.end_block(add)
        traffic.each_row(put_of_routing)
        if keep:
            keep_rows(lambda copy: copy.wait())


def _product(a, b, dims):
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _vmem_bytes(plan: Plan) -> int:
    """Of rows and routing weights, and what the compiler needs beside them and the weights."""
    rows = plan.rows * (plan.hidden * _BYTES_PER_NUMBER + 2 * 4 * LANES)
    return rows + 2 * 4 * plan.tokens * plan.choices + 10 * _MIB
