"""Embedding and output head where their tables stay cut: rows travel to tokens, pieces of the head to all devices.

In training both tables are cut along the hidden dim over axes of the batch, beside the vocabulary over model axes
(``sharding.Rules.fsdp``). Neither they nor their gradients are ever whole on a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from deepseek_v4.execution import Execution, dot_precision

LOGITS = 1 << 24
"""Logits of one device that are in memory at a time (64 MiB in float32)."""


class Scores(NamedTuple):
    """Of every token: log-sum-exp of its logits, the logit of its label (float32), the most probable token (int32)."""

    log_sum: jax.Array
    picked: jax.Array
    greedy: jax.Array


def embed(table: jax.Array, ids: jax.Array, execution: Execution) -> jax.Array:
    """Rows of ``table`` [vocab, d] for ids int32 [B, S]: [B, S, d] in the dtype of activations.

    Where the table is cut over axes of the batch, every device looks up its channels for the tokens of all of them, and
    the rows are exchanged: batch for channels. So are their gradients, which are summed in the dtype of the table.
    """
    dtype = execution.activation_dtype
    table, shards = _shards(table, execution)
    if not shards.cut:
        return execution.constrain(table[ids].astype(dtype), ("batch", None, None))

    def rows_of(shard: jax.Array, ids: jax.Array) -> jax.Array:
        """Where the tokens of all devices are in the shard: its size where they are not."""
        rows = lax.all_gather(ids, shards.cut, tiled=True) - shards.first(shard)
        return jnp.where((rows >= 0) & (rows < shard.shape[0]), rows, shard.shape[0])

    def look_up(shard: jax.Array, ids: jax.Array) -> jax.Array:
        found = shard.astype(dtype).at[rows_of(shard, ids)].get(mode="fill", fill_value=0)
        found = lax.all_to_all(found, shards.cut, 0, 2, tiled=True)
        return lax.psum(found, shards.vocab) if shards.vocab else found

    def scatter(shard: jax.Array, ids: jax.Array, gradient: jax.Array) -> jax.Array:
        gradient = lax.all_to_all(gradient, shards.cut, 2, 0, tiled=True).astype(shard.dtype)
        return shards.sum_rest(jnp.zeros_like(shard).at[rows_of(shard, ids)].add(gradient, mode="drop"))

    @jax.custom_vjp
    def run(table, ids):
        return shards.map(look_up, "table", "tokens", out="rows")(table, ids)

    def backward(saved, gradient):
        return shards.map(scatter, "table", "tokens", "rows", out="table")(*saved, gradient), None

    run.defvjp(lambda table, ids: (run(table, ids), (table, ids)), backward)
    return run(table, ids)


def scores(hidden: jax.Array, table: jax.Array, labels: jax.Array, execution: Execution) -> Scores:
    """What a loss needs of the logits hidden [B, S, d] times table [vocab, d], for labels int32 [B, S].

    A piece of the vocabulary at a time, in the backward pass too, which computes its logits again: those of all tokens
    exist together only where one piece holds them. Where the table is cut over axes of the batch, a piece is gathered
    when its turn has come, and its gradient is summed where it is kept. Operands have the dtype of ``hidden``, sums are
    float32; gradients reach ``hidden`` and ``table`` through ``log_sum`` and ``picked``.
    """
    table, shards = _shards(table, execution)

    def forward(hidden: jax.Array, shard: jax.Array, labels: jax.Array) -> tuple[Scores, jax.Array | None]:
        pieces = _Pieces.of(hidden, shard, shards)
        wanted = labels.reshape(-1, 1)

        def add(carry, index):
            highest, total, picked, greedy = carry
            logits, ids = pieces.logits(index)
            top = jnp.max(logits, axis=-1)
            raised = jnp.maximum(highest, top)
            total = total * jnp.exp(highest - raised) + jnp.sum(jnp.exp(logits - raised[:, None]), axis=-1)
            picked += jnp.sum(jnp.where(ids == wanted, logits, 0.0), axis=-1)
            # Of equals the first, as argmax has it.
            greedy = jnp.where(top > highest, ids[jnp.argmax(logits, axis=-1)], greedy)
            return (raised, total, picked, greedy), logits if pieces.count == 1 else None

        zeros = jnp.zeros(wanted.size)
        start = (zeros - jnp.inf, zeros, zeros, jnp.zeros(wanted.size, jnp.int32))
        (highest, total, picked, greedy), logits = lax.scan(add, start, jnp.arange(pieces.count))
        if shards.vocab:
            top = lax.pmax(highest, shards.vocab)
            total = lax.psum(total * jnp.exp(highest - top), shards.vocab)
            picked = lax.psum(picked, shards.vocab)
            greedy = lax.pmin(jnp.where(highest == top, greedy, jnp.iinfo(jnp.int32).max), shards.vocab)
            highest = top
        found = Scores(highest + jnp.log(total), picked, greedy)
        return Scores(*(a.reshape(labels.shape) for a in found)), logits

    def backward(hidden, shard, labels, logits, *of_tokens):
        pieces = _Pieces.of(hidden, shard, shards)
        wanted, log_sum, of_log_sum, of_picked = (a.reshape(-1, 1) for a in (labels, *of_tokens))

        def add(carry, index):
            found, ids = pieces.logits(index, logits)
            gradient = jnp.exp(found - log_sum) * of_log_sum + jnp.where(ids == wanted, of_picked, 0.0)
            return pieces.add_gradients(index, gradient, *carry), None

        start = (jnp.zeros((wanted.size, hidden.shape[-1])), jnp.zeros(shard.shape))
        (of_hidden, of_shard), _ = lax.scan(add, start, jnp.arange(pieces.count))
        if shards.vocab:
            of_hidden = lax.psum(of_hidden, shards.vocab)
        return of_hidden.reshape(hidden.shape).astype(hidden.dtype), shards.sum_rest(of_shard).astype(shard.dtype)

    def found(hidden, table, labels):
        return shards.map(forward, "rows", "table", "tokens", out=("tokens", "logits"))(hidden, table, labels)

    @jax.custom_vjp
    def run(hidden, table, labels):
        return found(hidden, table, labels)[0]

    def run_forward(hidden, table, labels):
        of_tokens, logits = found(hidden, table, labels)
        return of_tokens, (hidden, table, labels, logits, of_tokens.log_sum)

    def run_backward(saved, gradient):
        names = ("rows", "table", "tokens", "logits", *("tokens",) * 3)
        pull = shards.map(backward, *names, out=("rows", "table"))
        return *pull(*saved, gradient.log_sum, gradient.picked), None

    run.defvjp(run_forward, run_backward)
    return run(hidden, table, labels)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Mesh axes of a table: of ``vocab``, of the batch that its channels are ``cut`` over, and the ``rest`` of those.

    ``execution`` says where the arrays of ``map`` live, by name: "table" [vocab, d], "rows" [B, S, d], "tokens" [B, S],
    "logits" [1, B * S, vocab].
    """

    execution: Execution
    vocab: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()

    def map(self, function: Callable, *names: str, out: Any) -> Callable:
        """``function`` on each device's own shards; a plain call on one device."""
        placement = self.execution.placement
        if placement is None:
            return function
        specs = {
            "table": PartitionSpec(self.vocab or None, self.cut or None),
            "rows": placement.spec(("batch", None, None)),
            "tokens": placement.spec(("batch", None)),
            "logits": placement.spec((None, "batch", "vocab")),
        }
        return jax.shard_map(
            function,
            mesh=placement.mesh,
            in_specs=tuple(specs[name] for name in names),
            out_specs=jax.tree.map(specs.get, out),
            check_vma=False,
        )

    def first(self, shard: jax.Array) -> jax.Array | int:
        """The id of the first row of this device's shard."""
        return lax.axis_index(self.vocab) * shard.shape[0] if self.vocab else 0

    def sum_rest(self, gradient: jax.Array) -> jax.Array:
        """The gradient of a shard from that of this device's tokens, or of those along ``cut``."""
        return lax.psum(gradient, self.rest) if self.rest else gradient


def _shards(table: jax.Array, execution: Execution) -> tuple[jax.Array, _Shards]:
    """A table as it is used, and its layout: whole along channels, unless axes of the batch cut those and nothing else.

    (A hidden size that the axes do not divide has the vocabulary cut instead.)
    """
    placement = execution.placement
    if placement is None:
        return table, _Shards(execution)
    vocab, batch = placement.mesh_axes("vocab"), placement.mesh_axes("batch")
    cut = placement.mesh_axes("fsdp")
    if cut and placement.stored_spec(("vocab", "embed"), table.shape) != PartitionSpec(vocab or None, cut):
        table, cut = execution.constrain(table, ("vocab", None)), ()
    return table, _Shards(execution, vocab, cut, tuple(axis for axis in batch if axis not in cut))


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """One device's share of a head in pieces of ``size`` rows, the last of which begins before the one before it ends.

    x [N, d] are the device's tokens, ``shard`` [V, d / cut] its part of the table.
    """

    x: jax.Array
    shard: jax.Array
    shards: _Shards
    size: int

    @classmethod
    def of(cls, hidden: jax.Array, shard: jax.Array, shards: _Shards) -> "_Pieces":
        """As large as ``LOGITS`` allows, and in whole tiles."""
        x = hidden.reshape(-1, hidden.shape[-1])
        most = max(1, LOGITS // max(1, x.shape[0]))
        return cls(x, shard, shards, min(shard.shape[0], most // 128 * 128 or most))

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.shard.shape[0] // self.size)

    def logits(self, index: jax.Array, known: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """float32 [N, size] with the ids [size] of their columns: -inf and -1 for those that an earlier piece has too.

        ``known`` [1, N, size] are those of a single piece, if they were kept.
        """
        row = self._start(index) + jnp.arange(self.size)
        new = row >= index * self.size
        ids = jnp.where(new, self.shards.first(self.shard) + row, -1)
        if known is not None:
            return known[0], ids
        found = jnp.einsum(
            "nd,vd->nv",
            self.x,
            self._weights(index),
            precision=dot_precision(self.x.dtype),
            preferred_element_type=jnp.float32,
        )
        return (found if self.count == 1 else jnp.where(new, found, -jnp.inf)), ids

    def add_gradients(
        self, index: jax.Array, gradient: jax.Array, of_x: jax.Array, of_shard: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """float32 gradients of ``x`` and ``shard`` with those added that come from a piece's logits [N, size]."""
        product = functools.partial(
            jnp.einsum, precision=dot_precision(self.x.dtype), preferred_element_type=jnp.float32
        )
        of_x += product("nv,vd->nd", gradient, self._weights(index))
        of_rows = product("nv,nd->vd", gradient, self.x)
        if self.shards.cut:
            of_rows = lax.psum_scatter(of_rows, self.shards.cut, scatter_dimension=1, tiled=True)
        start = self._start(index)
        held = lax.dynamic_slice_in_dim(of_shard, start, self.size)
        return of_x, lax.dynamic_update_slice_in_dim(of_shard, held + of_rows, start, 0)

    def _start(self, index: jax.Array) -> jax.Array:
        return jnp.minimum(index * self.size, self.shard.shape[0] - self.size)

    def _weights(self, index: jax.Array) -> jax.Array:
        """Rows of the head, [size, d], in the dtype in which they are multiplied and travel."""
        rows = lax.dynamic_slice_in_dim(self.shard, self._start(index), self.size).astype(self.x.dtype)
        return lax.all_gather(rows, self.shards.cut, axis=1, tiled=True) if self.shards.cut else rows
