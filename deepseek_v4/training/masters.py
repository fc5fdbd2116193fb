"""float32 masters of a checkpoint's parameters, the starting point of training all of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_v4.formats import dequantize
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Weight
from deepseek_v4.parameters import ParameterSpec, Path, flatten, map_specs, nest


def to_masters(params: Params, master: Model) -> Params:
    """A checkpoint's ``params`` (any storage) as those of ``master`` (``MASTER`` storage): every weight in float32.

    Packed weights are decoded exactly: float32 holds every product of a code and its scale. Leaf by leaf, each
    released as soon as it is decoded, so that the peak is the masters plus one leaf; ``params`` is consumed.
    """
    specs = master.parameter_specs()

    def decode(params: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
        flat: dict[Path, jax.Array] = flatten(params)
        decoded: dict[Path, jax.Array] = {}
        for path, spec in flatten(specs).items():
            scale = flat.pop((*path[:-1], "scale"), None)
            decoded[path] = _decode(master, spec, flat.pop(path), scale)
        return nest(decoded)

    return {
        "shell": decode(params["shell"], specs["shell"]),
        "groups": tuple(
            tuple(decode(member, spec) for member, spec in zip(members, described, strict=True))
            for members, described in zip(params["groups"], specs["groups"], strict=True)
        ),
        "drafts": tuple(decode(*pair) for pair in zip(params["drafts"], specs["drafts"], strict=True)),
    }


def _decode(master: Model, spec: ParameterSpec, value: jax.Array, scale: jax.Array | None) -> jax.Array:
    if spec.kind is not Weight:
        return value
    placement = master.execution.placement
    sharding = value.sharding if placement is None else placement.parameter_sharding(spec)

    def run(value, scale):
        return value.astype(jnp.float32) if scale is None else dequantize(value, scale, jnp.float32)

    decoded = jax.jit(run, out_shardings=sharding)(value, scale)
    decoded.block_until_ready()
    return decoded


def abstract(model: Model) -> Params:
    """``Model.abstract_params`` with a sharding on every leaf, also on one device."""
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
        placement = model.execution.placement
        sharding = single if placement is None else placement.parameter_sharding(spec)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    return map_specs(leaf, model.parameter_specs())
