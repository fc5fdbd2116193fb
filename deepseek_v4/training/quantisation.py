"""Masters as a released checkpoint would hold them: the end of quantisation-aware training.

While training, ``Execution(quantise=RELEASED)`` makes every forward pass use its weights as that storage would hold
them, with straight-through gradients to the float32 masters. Both go through ``formats.quantize``, so that the weights
of an export, decoded, are those the forward pass used, bit for bit. A layer's weights are rounded as a whole inside the
scan over layers: beside the masters there is one layer's rounded copy, and none is kept for the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from deepseek_v4.formats import quantize
from deepseek_v4.model import Model, Params
from deepseek_v4.nn.variables import Packed, Storage
from deepseek_v4.parameters import ParameterSpec, Path, flatten, map_members, nest


def export_params(model: Model, params: Params, storage: Storage) -> tuple[Model, Params]:
    """The model and parameters of a checkpoint in ``storage``, from those of a ``model`` with unquantised weights.

    Leaf by leaf, on the devices where the parameters are; ``params`` stays. The model returned uses its weights as they
    are (``execution.quantise`` is None) and can be handed to ``checkpoint.ParamsSource``. Raises ``ValueError`` if
    weights are packed already or there are adapters, which have to be merged first.
    """
    if model.storage.packed or model.adapters is not None:
        raise ValueError(
            f"export_params: expected unquantised weights without adapters, found {model.storage} and {model.adapters}"
        )
    execution = dataclasses.replace(model.execution, quantise=None)
    exported = dataclasses.replace(model, storage=storage, execution=execution)
    placement = execution.placement

    def stored(specs: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        flat, values = flatten(specs), flatten(params)
        found: dict[Path, jax.Array] = {}
        for path, spec in flat.items():
            if spec.role == "scale":
                continue
            scale_path = (*path[:-1], "scale")
            scale = flat[scale_path] if spec.kind is Packed else None
            found[path], found_scale = _store(placement, values[path], storage, spec, scale)
            if found_scale is not None:
                found[scale_path] = found_scale
        return nest(found)

    return exported, map_members(stored, exported.parameter_specs(), params)


def _store(placement, value: jax.Array, storage: Storage, spec: ParameterSpec, scale: ParameterSpec | None):
    stored = storage.format_of(spec.role)
    if stored is None:
        return value, None
    shardings = (
        None
        if placement is None
        else tuple(None if s is None else placement.parameter_sharding(s) for s in (spec, scale))
    )
    return _quantiser(stored, storage.scales, shardings)(value)


@functools.lru_cache(maxsize=64)
def _quantiser(stored: str, scales: str, shardings: tuple | None) -> Callable:
    return jax.jit(lambda value: quantize(value, stored, scales), out_shardings=shardings)
