"""Muon's update: every logically independent matrix orthogonalised as a whole, wherever its shards live.

Sources: DeepSeek-V4 report 2.4 (hybrid Newton-Schulz, update RMS), Jordan et al. 2024 (Muon), Liu et al. 2025
(matching AdamW's update RMS, distributed Muon).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_v4.parameters import ParameterSpec, is_spec
from deepseek_v4.sharding import Placement
from pallas_kernels.newton_schulz_step import newton_schulz_step

NEWTON_SCHULZ_COEFFICIENTS = 8 * ((3.4445, -4.7750, 2.0315),) + 2 * ((2.0, -1.5, 0.5),)
"""(a, b, c) of each step: eight that grow small singular values fast, two that settle all of them at 1."""

STACK_BYTES = 1 << 27
"""Float32 bytes of one device's shards that are made whole and orthogonalised at a time: it bounds temporaries."""


def newton_schulz(
    x: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32, *, implementation: str | None = None
) -> jax.Array:
    """The nearest (semi-)orthogonal matrix of every matrix of ``x`` [..., rows, cols], in float32.

    X / ||X||_F, then steps a X + b (X X^T) X + c (X X^T)^2 X on the smaller side. ``dtype`` is that of the operands of
    the matmuls; sums and what is carried between steps are float32. Singular values below about 1e-5 of the norm end
    between 0 and 1; a zero matrix stays zero, and the scale of a matrix does not matter. ``implementation`` is that of
    ``newton_schulz_step``.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.astype(jnp.float32)
    x = x.mT if tall else x
    # Two divisions, so that squares of small gradients do not underflow.
    x = _divide(x, jnp.max(jnp.abs(x), (-2, -1), keepdims=True))
    x = _divide(x, jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))

    shape = x.shape
    x = x.reshape(-1, *shape[-2:])

    def step(x, coefficients):
        return newton_schulz_step(x, coefficients, dtype=dtype, implementation=implementation), None

    x, _ = lax.scan(step, x, jnp.asarray(NEWTON_SCHULZ_COEFFICIENTS, jnp.float32))
    x = x.reshape(shape)
    return x.mT if tall else x


def _divide(x: jax.Array, size: jax.Array) -> jax.Array:
    return x / jnp.where(size > 0, size, 1)


def orthogonalise(
    specs: Any,
    placement: Placement | None = None,
    *,
    update_rms: float = 0.18,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Replaces every update by orthogonal matrices times sqrt(max(rows, cols)) * ``update_rms``.

    ``specs`` are the descriptions of the updates, in the same structure. The last two dims of each are a matrix, or
    several (``spec.matrices``); the others count matrices. With a placement, a device makes an equal share of the
    matrices whole: shards of a matrix move along the stack (all-to-all) in pieces of ``STACK_BYTES``, and devices that
    hold the same shards divide the work. ``dtype`` is that of matmuls and moves (see ``newton_schulz``). Raises
    ``ValueError`` for updates of other shapes. (``optax.contrib.muon`` averages momentum with a bias correction, which
    weighs early gradients otherwise, and knows neither fused matrices nor shards.)
    """
    described: list[ParameterSpec] = jax.tree.leaves(specs, is_leaf=is_spec)

    def run(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        layouts = [_Layout.of(spec, placement) for spec in described]

        def local(*leaves):
            return tuple(_orthogonalise_local(leaves, layouts, update_rms, dtype))

        if placement is None or not described:
            return list(local(*leaves))
        parts = tuple(placement.parameter_sharding(spec).spec for spec in described)
        return list(
            jax.shard_map(local, mesh=placement.mesh, in_specs=parts, out_specs=parts, check_vma=False)(*leaves)
        )

    def update(updates, state, params=None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        if [leaf.shape for leaf in leaves] != [spec.shape for spec in described]:
            raise ValueError(
                f"orthogonalise: made for parameters of shapes {[spec.shape for spec in described]}, "
                f"found updates of {[leaf.shape for leaf in leaves]}"
            )
        return jax.tree.unflatten(structure, run(leaves)), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How one device's shards of a parameter relate to whole matrices; mesh axes are (name, size) pairs.

    A shard is a stack of blocks. ``local`` are the rows of the pieces of a block that need not stay together. A piece
    becomes whole by joining those of the devices along ``rows`` and ``columns``; the rows of its matrices are then
    ``whole`` (() for one matrix). Devices along ``idle`` hold the same shards.
    """

    local: tuple[int, ...]
    whole: tuple[int, ...]
    rows: tuple[tuple[str, int], ...] = ()
    columns: tuple[tuple[str, int], ...] = ()
    idle: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, spec: ParameterSpec, placement: Placement | None) -> "_Layout":
        matrices = spec.matrices or (spec.shape[-2],)
        if placement is None:
            return cls(local=matrices, whole=())
        sharding = placement.parameter_sharding(spec).spec
        sizes = dict(placement.mesh.shape)
        names = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding]
        named = [tuple((name, sizes.pop(name)) for name in axes) for axes in names]
        rows, columns = named[-2:]
        # Where leading mesh axes divide the matrices among themselves, those are whole along them.
        while rows and len(set(matrices)) == 1 and len(matrices) % rows[0][1] == 0:
            matrices = matrices[: len(matrices) // rows[0][1]]
            rows = rows[1:]
        idle = tuple((axis, size) for axis, size in sizes.items() if size > 1)
        if rows:
            return cls((sum(matrices) // _count(rows),), matrices, rows, columns, idle)
        return cls(matrices, (), rows, columns, idle)


def _count(axes: tuple[tuple[str, int], ...]) -> int:
    return math.prod(size for _, size in axes)


def _names(axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(name for name, _ in axes)


def _orthogonalise_local(leaves, layouts: Sequence[_Layout], update_rms: float, dtype) -> list[jax.Array]:
    """Orthogonalises one device's shards of every parameter, equal ones together: fewer programs, fewer moves."""
    stacks: dict[Any, list[tuple[int, int]]] = {}
    pieces = []
    for i, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True)):
        pieces.append(_split_rows(leaf.reshape(-1, *leaf.shape[-2:]), layout.local))
        for j, piece in enumerate(pieces[i]):
            # Large stacks stay apart: joining them would copy them.
            alone = (i, j) if piece.size * 4 > STACK_BYTES else None
            key = (piece.shape[1:], dataclasses.replace(layout, local=()), alone)
            stacks.setdefault(key, []).append((i, j))
    for (_, layout, _), members in stacks.items():
        joined = [pieces[i][j] for i, j in members]
        done = _orthogonalise_stack(_concatenate(joined, 0), layout, update_rms, dtype)
        ends = itertools.accumulate(piece.shape[0] for piece in joined)
        for (i, j), piece, end in zip(members, joined, ends, strict=True):
            pieces[i][j] = done[end - piece.shape[0] : end].astype(jnp.float32)
    return [_join_rows(found, leaf.shape[-2]).reshape(leaf.shape) for found, leaf in zip(pieces, leaves, strict=True)]


def _orthogonalise_stack(x: jax.Array, layout: _Layout, update_rms: float, dtype) -> jax.Array:
    """Orthogonalises a stack [m, r, c] of equal blocks, at most ``STACK_BYTES`` at a time: in ``dtype``."""
    count, movers = x.shape[0], _count(layout.rows) * _count(layout.columns)
    idle = _dividers(layout.idle, -(-count // movers))
    sharers = movers * _count(idle)
    most = max(1, STACK_BYTES // (4 * x.shape[1] * x.shape[2]))
    size = -(-count // (-(-count // most) * sharers)) * sharers

    def run(x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        if idle:
            share = size // _count(idle)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(_names(idle)) * share, share)
        moves = [(_names(axes), dim) for axes, dim in ((layout.rows, 1), (layout.columns, 2)) if axes]
        for axes, dim in moves:
            x = lax.all_to_all(x, axes, 0, dim, tiled=True)
        matrices = _split_rows(x, layout.whole or (x.shape[1],))
        scaled = [newton_schulz(m, dtype) * (math.sqrt(max(m.shape[1:])) * update_rms) for m in matrices]
        x = _join_rows(scaled, x.shape[1]).astype(dtype)
        for axes, dim in reversed(moves):
            x = lax.all_to_all(x, axes, dim, 0, tiled=True)
        if idle:
            x = lax.all_gather(x, _names(idle), tiled=True)
        return x

    turns = -(-count // size)
    padded = jnp.pad(x, ((0, turns * size - count), (0, 0), (0, 0)))
    if turns == 1:
        return run(padded)[:count]
    return lax.map(run, padded.reshape(turns, size, *x.shape[1:])).reshape(padded.shape)[:count]


def _dividers(axes: tuple[tuple[str, int], ...], count: int) -> tuple[tuple[str, int], ...]:
    """The mesh axes worth dividing ``count`` matrices over: each leaves less to do, and at most half is padding."""
    chosen: tuple[tuple[str, int], ...] = ()
    for axis in sorted(axes, key=lambda axis: axis[1], reverse=True):
        before, after = _count(chosen), _count((*chosen, axis))
        if after <= 2 * count and -(-count // after) < -(-count // before):
            chosen = (*chosen, axis)
    return chosen


def _split_rows(x: jax.Array, rows: tuple[int, ...]) -> list[jax.Array]:
    """Blocks [m, sum(rows), c] as stacks of matrices: one if their rows are equal (m * len(rows)), else one each."""
    if len(set(rows)) == 1:
        return [x.reshape(-1, rows[0], x.shape[-1])]
    return jnp.split(x, list(itertools.accumulate(rows))[:-1], axis=1)


def _join_rows(stacks: Sequence[jax.Array], rows: int) -> jax.Array:
    """The inverse of ``_split_rows``: blocks of so many rows."""
    return _concatenate(stacks, 1).reshape(-1, rows, stacks[0].shape[-1])


def _concatenate(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)
