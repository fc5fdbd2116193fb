"""How tokens reach experts that live on other devices of their group, and how the results come back.

Inside ``shard_map``: every device of an expert group has its own tokens and its own experts. In the *gather* form every
device sees all tokens of the group, runs its experts, and partial sums are scattered back; few tokens, as in decoding,
are best moved so. In the *dispatch* form a row travels to each of its experts and back, in rounds of a bounded number
of rows per receiver: an even load takes the fewest, the worst imbalance more of them, and no row is ever dropped. The
result of the second has the bits of one device: a row's arithmetic is the same wherever it runs, and a token's choices
are added where it lives, in their order.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.formats import ACTIVATION_BLOCK, as_bytes, dequantize_fp8_rows, encode_e8m0, quantize_fp8_rows

MOST_GATHERED = 1024
"""Tokens of a group up to which all devices get all of them: at 4096 channels 24 MB come and go per device."""

MOST_ROWS = 16384
"""Rows that a device receives at a time, at most: enough for weights to be read far faster than they are used."""

Form = Literal["gather", "dispatch"]

Precision = Literal["exact", "fp8", "fp8-bfloat16"]
"""What dispatched rows are rounded to on their way: see ``EXCHANGES``."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel in an expert group.

    ``form`` None chooses by size. Dispatched rows travel in ``sent``: "activations", the dtype they have, or "fp8",
    E4M3 with a scale per 128 channels, which rounds nothing where activations are simulated so; their gradients in the
    dtype of activations. Results come back as ``returned``: "float32", the sums they are, or "bfloat16", half the
    bytes. ``rows`` are the most that a device receives at a time.
    """

    form: Form | None = None
    sent: Literal["activations", "fp8"] = "activations"
    returned: Literal["float32", "bfloat16"] = "float32"
    rows: int = MOST_ROWS

    def form_for(self, tokens: int) -> Form:
        """The form for a group of so many tokens."""
        return self.form or ("gather" if tokens <= MOST_GATHERED else "dispatch")

    def sent_bytes(self, width: int) -> int:
        """Bytes of a dispatched row of bfloat16 activations."""
        return 2 * width if self.sent == "activations" else width + -(-width // ACTIVATION_BLOCK)

    def returned_bytes(self, width: int) -> int:
        """Bytes of a row that comes back."""
        return width * jnp.dtype(self.returned).itemsize


BY_SIZE = Exchange()
"""Chosen by size, and nothing rounded."""

EXCHANGES: Mapping[Precision, Exchange] = {
    "exact": BY_SIZE,
    "fp8": Exchange(sent="fp8"),
    "fp8-bfloat16": Exchange(sent="fp8", returned="bfloat16"),
}
"""The exchanges that scripts offer. Few tokens, which are gathered, are rounded by none of them."""


def exchange_of(precision: Precision, expert_parallel: bool) -> Exchange:
    """The exchange of a precision; raises ``ValueError`` where rows would be rounded that do not travel."""
    if precision != "exact" and not expert_parallel:
        raise ValueError(f"expert precision {precision!r}: no rows travel to experts without expert-parallel")
    return EXCHANGES[precision]


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: Sequence[str],
    native: bool,
) -> jax.Array:
    """``lax.ragged_all_to_all``, or where a backend has none (``native`` False) the same bits by an all-gather."""
    axis_name = tuple(axis_name)
    if native:
        return lax.ragged_all_to_all(
            operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis_name
        )
    everyone = lax.all_gather(operand, axis_name)
    described = lax.all_gather(jnp.stack([input_offsets, send_sizes, output_offsets]), axis_name)
    first, size, begin = jnp.moveaxis(described[:, :, lax.axis_index(axis_name)], 1, 0)
    place = jnp.arange(output.shape[0], dtype=jnp.int32)
    inside = (place >= begin[:, None]) & (place < (begin + size)[:, None])
    source = jnp.argmax(inside, axis=0)
    row = jnp.clip(first[source] + place - begin[source], 0, operand.shape[0] - 1)
    written = jnp.any(inside, axis=0).reshape(-1, *(1,) * (output.ndim - 1))
    return jnp.where(written, everyone[source, row], output)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The dispatch form among the devices along ``axes``: the ``Exchange`` that ``expert_mlp`` takes.

    Assignments are sorted by expert, so that those for one device lie together. The rows that a device is to receive
    queue up by sender, and a round moves the next ``exchange.rows`` of every queue.
    """

    axes: tuple[str, ...]
    exchange: Exchange
    native: bool

    def forward(self, run: Callable, x: jax.Array, ids: jax.Array, routing: jax.Array, experts: int) -> jax.Array:
        """See ``pallas_kernels.grouped_matmul.gradient.Exchange``."""
        queues = self._queues(ids, experts)
        packed, weights = self._pack(x[queues.token]), queues.sorted(routing)
        returned = jnp.dtype(self.exchange.returned)

        def turn(carry):
            index, results = carry
            at = queues.round(index)
            rows, local_ids, local = self._receive(at, packed, weights, x.dtype, x.shape[-1])
            out = run(rows, local_ids, local).astype(returned)
            return index + 1, self._send_back(at, out, results)

        start = (jnp.zeros((), jnp.int32), jnp.zeros((ids.size, x.shape[-1]), returned))
        _, results = lax.while_loop(lambda carry: carry[0] < queues.rounds, turn, start)
        return queues.summed(results)

    def backward(
        self,
        run: Callable,
        totals: Any,
        gradient: jax.Array,
        x: jax.Array,
        ids: jax.Array,
        routing: jax.Array,
        experts: int,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """See ``pallas_kernels.grouped_matmul.gradient.Exchange``."""
        queues = self._queues(ids, experts)
        packed, weights = self._pack(x[queues.token]), queues.sorted(routing)
        gradients = gradient[queues.token]
        returned = jnp.dtype(self.exchange.returned)

        def turn(carry):
            index, results, of_weights, totals = carry
            at = queues.round(index)
            rows, local_ids, local = self._receive(at, packed, weights, x.dtype, x.shape[-1])
            arrived = self._send(at, gradients)
            drows, drouting, totals = run(totals, arrived, rows, local_ids, local)
            results = self._send_back(at, drows.astype(returned), results)
            return index + 1, results, self._send_back(at, drouting, of_weights), totals

        start = (
            jnp.zeros((), jnp.int32),
            jnp.zeros((ids.size, x.shape[-1]), returned),
            jnp.zeros((ids.size, 1), jnp.float32),
            totals,
        )
        _, results, of_weights, totals = lax.while_loop(lambda carry: carry[0] < queues.rounds, turn, start)
        return queues.summed(results), of_weights[queues.place].reshape(ids.shape), totals

    def _queues(self, ids: jax.Array, experts: int) -> "_Queues":
        assignment = jnp.arange(ids.size, dtype=jnp.int32)
        flat, assignment = lax.sort((ids.reshape(-1), assignment), num_keys=1, is_stable=True)
        place = jnp.zeros(ids.size, jnp.int32).at[assignment].set(jnp.arange(ids.size, dtype=jnp.int32))
        group = lax.axis_size(self.axes)
        every = jnp.arange(group * experts, dtype=jnp.int32)
        counts = jnp.sum(flat[None, :] == every[:, None], axis=1, dtype=jnp.int32)
        counts = lax.all_gather(counts.reshape(group, experts), self.axes)
        # Never more than all rows of the group, were they all for one device.
        rows = min(self.exchange.rows, group * ids.shape[0] * min(ids.shape[1], experts))
        return _Queues(assignment, place, counts, lax.axis_index(self.axes), rows, ids.shape[1])

    def _send(self, at: "_Round", operand: jax.Array) -> jax.Array:
        output = jnp.zeros((at.rows, *operand.shape[1:]), operand.dtype)
        return ragged_all_to_all(operand, output, *at.there, axis_name=self.axes, native=self.native)

    def _send_back(self, at: "_Round", operand: jax.Array, output: jax.Array) -> jax.Array:
        return ragged_all_to_all(operand, output, *at.back, axis_name=self.axes, native=self.native)

    def _receive(self, at: "_Round", packed: jax.Array, weights: jax.Array, dtype: jnp.dtype, width: int):
        """The rows of a round with their experts, local ids [R, 1], and routing weights [R, 1]."""
        return self._unpack(self._send(at, packed), dtype, width), at.experts[:, None], self._send(at, weights)

    def _pack(self, rows: jax.Array) -> jax.Array:
        if self.exchange.sent == "activations":
            return rows
        codes, scale = quantize_fp8_rows(rows, ACTIVATION_BLOCK)
        return jnp.concatenate([as_bytes(codes), as_bytes(encode_e8m0(scale))], axis=-1)

    def _unpack(self, packed: jax.Array, dtype: jnp.dtype, width: int) -> jax.Array:
        if self.exchange.sent == "activations":
            return packed
        codes, scale = packed[:, :width], packed[:, width:]
        return dequantize_fp8_rows(lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), scale, ACTIVATION_BLOCK, dtype)


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round on one device: the offsets and sizes of ``ragged_all_to_all`` there and back, and who has arrived.

    ``experts`` [rows] are the local experts of the rows received, and the number of local experts where there is none.
    """

    rows: int
    there: tuple[jax.Array, ...]
    back: tuple[jax.Array, ...]
    experts: jax.Array


@dataclasses.dataclass(frozen=True)
class _Queues:
    """Who sends how many rows to whom, as every device of the group knows it.

    ``assignment`` [N*K] sorted by expert (token * K + choice), ``place`` its inverse; ``counts`` [group, group,
    experts] rows by sender, receiver and its experts; ``me`` this device; ``rows`` of a round.
    """

    assignment: jax.Array
    place: jax.Array
    counts: jax.Array
    me: jax.Array
    rows: int
    choices: int

    @property
    def token(self) -> jax.Array:
        """The token of every sorted assignment."""
        return self.assignment // self.choices

    @property
    def sizes(self) -> jax.Array:
        """Rows by sender and receiver."""
        return jnp.sum(self.counts, axis=-1)

    @property
    def rounds(self) -> jax.Array:
        """How many it takes until the longest queue is empty."""
        return jnp.max(-(-jnp.sum(self.sizes, axis=0) // self.rows))

    def sorted(self, routing: jax.Array) -> jax.Array:
        """Routing weights [N, K] by sorted assignment: float32 [N*K, 1]."""
        return routing.astype(jnp.float32).reshape(-1)[self.assignment][:, None]

    def summed(self, results: jax.Array) -> jax.Array:
        """Results [N*K, D] by sorted assignment, added in the order of a token's choices: float32 [N, D]."""
        chosen = results[self.place].astype(jnp.float32)
        return jnp.sum(chosen.reshape(-1, self.choices, results.shape[-1]), axis=1)

    def round(self, index: jax.Array) -> _Round:
        """Round ``index``: rows index * rows to (index + 1) * rows of every queue."""
        low = index * self.rows
        sizes = self.sizes
        source = jnp.cumsum(sizes, axis=1) - sizes  # where a sender's rows for a receiver begin
        queue = jnp.cumsum(sizes, axis=0) - sizes  # where a receiver's rows from a sender begin
        begin = jnp.clip(low - queue, 0, sizes)
        size = jnp.clip(low + self.rows - queue, 0, sizes) - begin
        source = source + begin
        arrival = jnp.clip(queue - low, 0, self.rows)
        me = self.me
        ends = jnp.cumsum(self.counts[:, me].reshape(-1))  # by sender and expert
        position = low + jnp.arange(self.rows, dtype=jnp.int32)
        segment = jnp.sum(position[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        experts = self.counts.shape[-1]
        return _Round(
            self.rows,
            (source[me], size[me], arrival[me], size[:, me]),
            (arrival[:, me], size[:, me], source[:, me], size[me]),
            jnp.where(segment < ends.size, segment % experts, experts),
        )
