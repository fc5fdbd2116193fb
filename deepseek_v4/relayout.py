"""Arrays that move from one layout over a mesh to another, and the layouts in which their gradients come back."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4.formats import as_bytes, from_bytes


def mesh_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def narrower(stored: jax.typing.DTypeLike, used: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which a weight has to travel that is stored in one dtype and multiplied in another."""
    return min(jnp.dtype(stored), jnp.dtype(used), key=lambda dtype: dtype.itemsize)


def narrowed(value: jax.Array, used: jax.typing.DTypeLike) -> jax.Array:
    """A weight in the dtype in which it has to travel."""
    dtype = narrower(value.dtype, used)
    if dtype != value.dtype:
        # Rounded first, to the same value: XLA's TPU compiler (libtpu 0.0.42) moves a bare conversion of a slice of a
        # stack of layers out of their loop, and then keeps all layers twice.
        info = jnp.finfo(dtype)
        value = jax.lax.reduce_precision(value, info.nexp, info.nmant)
    return value.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(value: jax.Array, whole: NamedSharding, cut: NamedSharding, moved: jnp.dtype) -> jax.Array:
    """``value`` with layout ``whole``; it travels in dtype ``moved``. Its gradient arrives with layout ``cut``."""
    part = jax.lax.with_sharding_constraint(narrowed(value, moved), cut)
    return jax.lax.with_sharding_constraint(part, whole).astype(value.dtype)


def _gather_forward(value, whole, cut, moved):
    return gather_weight(value, whole, cut, moved), None


def _gather_backward(whole, cut, moved, _, gradient):
    # Where a dim that is split already is cut further, XLA's partitioner (0.10.2) may go wrong on a gradient that a
    # reshape brings there from a split batch dim: half of it came out as zeros. In two steps it does not.
    if any(entry and entry != further for entry, further in zip(whole.spec, cut.spec, strict=False)):
        gradient = jax.lax.with_sharding_constraint(gradient, whole)
    return (jax.lax.with_sharding_constraint(gradient, cut),)


gather_weight.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def move(x: jax.Array, there: NamedSharding, here: NamedSharding) -> jax.Array:
    """x laid out as ``there``, its gradient as ``here``."""
    return jax.lax.with_sharding_constraint(x, there)


move.defvjp(
    lambda x, there, here: (move(x, there, here), None),
    lambda there, here, _, gradient: (jax.lax.with_sharding_constraint(gradient, here),),
)


@dataclasses.dataclass(frozen=True)
class ExpertShards:
    """Inside ``shard_map``: the experts of this device's group, joined along the mesh axes ``names``.

    ``specs`` are the layouts of (weight, scale) of w1, w2, w3, then of their adapters (a, b) or None. Plain weights and
    adapters travel in ``dtype``, in which they are multiplied, packed ones with their scales as they are.
    """

    names: tuple[str, ...]
    specs: tuple[Any, ...]
    dtype: jnp.dtype

    def gather(self, weights: Any, adapters: Any, layer: jax.Array | int | None) -> tuple[Any, Any]:
        """(weights, adapters) whole, of a stack the one layer."""

        def pair(arrays: Any, specs: Any, packed: bool) -> Any:
            def join(array: jax.Array, spec: PartitionSpec) -> jax.Array:
                if array.ndim == 4:
                    array, spec = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), spec[1:]
                return self._join(array if packed else narrowed(array, self.dtype), spec)

            return tuple(None if a is None else join(a, spec) for a, spec in zip(arrays, specs, strict=True))

        joined = tuple(pair(w, spec, w[1] is not None) for w, spec in zip(weights, self.specs[:3], strict=True))
        if adapters is None:
            return joined, None
        return joined, tuple(a and pair(a, spec, False) for a, spec in zip(adapters, self.specs[3:], strict=True))

    def scatter(self, matrices: Any, adapters: Any) -> tuple[Any, Any]:
        """Gradients of what is whole, summed over the devices that share it, as those of the shards."""

        def sum_up(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
            dim = self._cut_dim(spec)
            if dim is None:
                return gradient
            return jax.lax.psum_scatter(gradient, self.names, scatter_dimension=dim, tiled=True)

        def pair(gradients: Any, specs: Any) -> Any:
            return gradients and tuple(map(sum_up, gradients, specs))

        return (
            tuple(sum_up(d, spec[0]) for d, spec in zip(matrices, self.specs, strict=False)),
            None if adapters is None else tuple(map(pair, adapters, self.specs[3:])),
        )

    def _cut_dim(self, spec: PartitionSpec) -> int | None:
        return next((dim for dim, entry in enumerate(spec) if set(self.names) & set(mesh_names(entry))), None)

    def _join(self, shard: jax.Array, spec: PartitionSpec) -> jax.Array:
        dim = self._cut_dim(spec)
        if dim is None:
            return shard

        return from_bytes(jax.lax.all_gather(as_bytes(shard), self.names, axis=dim, tiled=True), shard.dtype)


def scatter_tokens(x: jax.Array, names: Sequence[str]) -> jax.Array:
    """x [B, S, ...] summed over mesh axes inside ``shard_map``, each device its share of the S tokens.

    Along a leading dim and axis by axis: of all axes of a slice at once, and of rows that are one, the compiler for
    TPUs (libtpu 0.0.42) makes all-reduces, of all tokens.
    """
    shards = jax.lax.axis_size(tuple(names))
    blocks = jnp.moveaxis(x.reshape(x.shape[0], shards, -1, *x.shape[2:]), 1, 0)
    for name in names:
        blocks = jax.lax.psum_scatter(blocks, name, scatter_dimension=0, tiled=True)
    return blocks[0]
