"""Rows of tokens between HBM and the blocks of a TPU kernel: each its own transfer, hidden behind other work.

Rows of bfloat16 travel as 32-bit words, sums as float32: types of which one transfer can take a row. The rows of the
next block arrive while this one is multiplied; its sums are read once those of the block before are written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu_plan import Plan


def row_words(x: jax.Array) -> jax.Array:
    """bfloat16 [T, D] to uint32 [T, D/2], the second half of a row above the first: rows that one transfer can take."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    half = x.shape[1] // 2
    return bits[:, :half] | (bits[:, half:] << 16)


def row_halves(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint32 [R, D/2] to the first and the second half of the rows, bfloat16."""
    first, second = (
        lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
        for bits in (words << 16, words & jnp.uint32(0xFFFF0000))
    )
    return first, second


@dataclasses.dataclass(frozen=True)
class RowTraffic:
    """The transfers of one grid step, and their order.

    ``first`` and ``size`` of every block and ``token``, that of a sorted position, are prefetched; ``source`` [T, W]
    and ``result`` float32 [T, C], zeros at first, are in HBM, ``arrived`` [rows, W] and ``sums`` [rows, C] in VMEM.
    ``semaphores`` are three. Where tokens have one choice, there is nothing to add to.
    """

    plan: Plan
    first: Any
    size: Any
    token: Callable
    source: Any
    arrived: Any
    result: Any
    sums: Any
    semaphores: Any

    @property
    def count(self) -> jax.Array:
        """Rows of this block."""
        return self.size[pl.program_id(1)]

    @property
    def adds(self) -> bool:
        """Whether a token has several rows, whose results are added."""
        return self.plan.choices > 1

    def each_product(self, body: Callable) -> None:
        """``body(slice of rows)`` for the rows in use, as many at a time as are multiplied together."""
        product = self.plan.product

        def step(i, _):
            body(pl.ds(pl.multiple_of(i * product, product), product))

        lax.fori_loop(0, pl.cdiv(self.count, product), step, None)

    def each_row(self, body: Callable) -> None:
        """``body(row, sorted position)`` for the rows in use."""
        first = self.first[pl.program_id(1)]
        lax.fori_loop(0, self.count, lambda row, _: body(row, first + row), None)

    def begin_block(self, put: Callable, unpack: Callable) -> None:
        """In a block's first step: ``put(row, position)`` for its rows; ``unpack(rows)`` once they have arrived."""
        block = pl.program_id(1)

        @pl.when(block == 0)
        def fetch_first():
            self._start(0, self._fetch)

        self.each_row(put)
        self._await(block, self.arrived, 0)
        self.each_product(unpack)

        @pl.when(block + 1 < pl.num_programs(1))
        def fetch_next():
            self._start(block + 1, self._fetch)

    def begin_sums(self) -> None:
        """In a block's second step, or its only one: that leaves the rest of the block to hide both transfers."""
        block = pl.program_id(1)

        @pl.when(block > 0)
        def await_previous():
            self._await(block - 1, self.sums, 2)

        if self.adds:
            self._start(block, self._read)

    def end_block(self, add: Callable) -> None:
        """In a block's last step: ``add(rows)`` calls ``add_to_sums`` for all of their columns."""
        block = pl.program_id(1)
        if self.adds:
            self._await(block, self.sums, 1)
        self.each_product(add)
        self._start(block, self._write)

        @pl.when(block + 1 == pl.num_programs(1))
        def await_last():
            self._await(block, self.sums, 2)

    def add_to_sums(self, rows, columns, value: jax.Array) -> None:
        """Adds ``value`` to what the tokens of these rows have so far."""
        self.sums[rows, columns] = self.sums[rows, columns] + value if self.adds else value

    def _start(self, block, copy: Callable) -> None:
        """Starts one transfer per row of a block."""
        first = self.first[block]
        lax.fori_loop(0, self.size[block], lambda row, _: copy(row, self.token(first + row)).start(), None)

    def _await(self, block, memory, semaphore: int) -> None:
        """Awaits the transfers of a block's rows to or from ``memory``.

        A semaphore counts bytes: one wait stands for many rows, and a wait per bit of their number for all of them.
        """
        count = self.size[block]

        def wait(many):
            rows = memory.at[pl.ds(0, many)]
            pltpu.make_async_copy(rows, rows, self.semaphores.at[semaphore]).wait()

        for bit in range(self.plan.rows.bit_length()):
            pl.when((count >> bit) & 1 == 1)(functools.partial(wait, 1 << bit))

    def _fetch(self, row, token):
        source, target = self.source.at[pl.ds(token, 1)], self.arrived.at[pl.ds(row, 1)]
        return pltpu.make_async_copy(source, target, self.semaphores.at[0])

    def _read(self, row, token):
        source, target = self.result.at[pl.ds(token, 1)], self.sums.at[pl.ds(row, 1)]
        return pltpu.make_async_copy(source, target, self.semaphores.at[1])

    def _write(self, row, token):
        source, target = self.sums.at[pl.ds(row, 1)], self.result.at[pl.ds(token, 1)]
        return pltpu.make_async_copy(source, target, self.semaphores.at[2])
