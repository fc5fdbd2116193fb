"""Results that need what every device found, each made by one device and then given to all of them."""

import math
from collections.abc import Callable

import jax
from jax import lax

FEW = 1 << 18
"""Numbers of all devices' parts that all devices get in one exchange; with more, two exchanges move fewer bytes."""


def joined(join: Callable, parts: jax.Array, axes: tuple[str, ...], *rest: jax.Array) -> jax.Array:
    """``join(parts, *rest)`` of the parts of all devices of the mesh axes ``axes``, in their order, on all of them.

    ``parts`` [R, ...] are those of this device (inside ``shard_map``), ``rest`` [R, ...] the same everywhere. ``join``
    takes parts [devices, r, ...] and rest [r, ...] of any r rows and treats each on its own. Few parts go to all
    devices; of many, each device gets and joins a share of the rows, if they divide, and all get the results.
    """
    devices = lax.axis_size(axes)
    if math.prod(parts.shape) * devices <= FEW or parts.shape[0] % devices:
        return join(lax.all_gather(parts, axes), *rest)
    share = parts.shape[0] // devices
    first = lax.axis_index(axes) * share
    parts = lax.all_to_all(parts.reshape(devices, share, *parts.shape[1:]), axes, split_axis=0, concat_axis=0)
    rest = tuple(lax.dynamic_slice_in_dim(a, first, share) for a in rest)
    return lax.all_gather(join(parts, *rest), axes, tiled=True)
