"""Assignments of tokens to experts, sorted by expert and cut into blocks of rows that never mix experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sorted assignments and the blocks they are cut into.

    ``expert``, ``first`` and ``size`` [B] int32: the expert of a block, its first sorted position and its rows (0 for
    a block not in use); ``used`` int32: blocks in use, which come first. ``assignment`` int32 and ``routing`` float32
    [N*K]: token * K + choice and routing weight by sorted position; the assignments that no expert here serves come
    last and belong to no block.
    """

    expert: jax.Array
    first: jax.Array
    size: jax.Array
    used: jax.Array
    assignment: jax.Array
    routing: jax.Array

    def table(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Whether each row of each block is in use, and its assignment (any, where it is not): [B, rows]."""
        position = jnp.arange(rows, dtype=jnp.int32)
        used = position < self.size[:, None]
        return used, self.assignment[jnp.where(used, self.first[:, None] + position, 0)]


def merge_repeats(expert_ids: jax.Array, expert_weights: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Every expert at most once per token: repeats and ids outside 0..experts-1 become ``experts``.

    The routing weight of a repeat joins that of the first occurrence.
    """
    same = expert_ids[:, :, None] == expert_ids[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    repeated = jnp.any(same & earlier, axis=-1)
    merged = jnp.sum(jnp.where(same, expert_weights[:, None, :], 0.0), axis=-1)
    outside = (expert_ids < 0) | (expert_ids >= experts)
    return jnp.where(repeated | outside, experts, expert_ids), merged


def most_blocks(assignments: int, experts: int, rows: int) -> int:
    """The most blocks of ``rows`` rows that any routing of so many assignments can need."""
    touched = min(experts, assignments)
    return (assignments + touched * (rows - 1)) // rows


def sort_into_blocks(expert_ids: jax.Array, expert_weights: jax.Array, *, experts: int, rows: int) -> Blocks:
    """Blocks of at most ``rows`` rows for expert ids [N, K] and their weights; ids of ``experts`` go nowhere.

    The order within an expert is that of the assignments. Counts and look-ups are comparisons summed over: a few fused
    passes, where searches and gathers are many launches.
    """
    assignment = jnp.arange(expert_ids.size, dtype=jnp.int32)
    flat, assignment, routing = lax.sort(
        (expert_ids.reshape(-1), assignment, expert_weights.astype(jnp.float32).reshape(-1)),
        num_keys=1,
        is_stable=True,
    )
    every = jnp.arange(experts, dtype=jnp.int32)
    start = jnp.sum(flat[None, :] < every[:, None], axis=1, dtype=jnp.int32)
    end = jnp.sum(flat[None, :] <= every[:, None], axis=1, dtype=jnp.int32)
    of_expert = (end - start + rows - 1) // rows
    before = jnp.sum(jnp.where(every[None, :] < every[:, None], of_expert[None, :], 0), axis=1, dtype=jnp.int32)
    index = jnp.arange(most_blocks(expert_ids.size, experts, rows), dtype=jnp.int32)
    chosen = (before <= index[:, None]) & (index[:, None] < before + of_expert)

    def look_up(values):
        return jnp.sum(jnp.where(chosen, values, 0), axis=1, dtype=jnp.int32)

    first = look_up(start + (index[:, None] - before) * rows)
    size = jnp.clip(look_up(end) - first, 0, rows)
    return Blocks(look_up(every), first, size, jnp.sum(of_expert), assignment, routing)
