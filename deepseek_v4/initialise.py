"""Seeded random parameters in any storage format."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_v4.config import Config
from deepseek_v4.formats import dequantize, quantize_fp4_weight, quantize_fp8_weight
from deepseek_v4.nn.variables import Packed
from deepseek_v4.parameters import ParameterSpec, Path, flatten, nest

_STANDARD_DEVIATION = 0.02
_HYPER_SCALE = 0.01  # gating scales of the hyper-connections start small (mHC paper)


def initialise(config: Config, specs: Mapping[str, Any], seed: int | jax.Array) -> dict[str, Any]:
    """Random parameters for a nested dict of descriptions (one layer, the shell, or a draft block).

    Matrices are normal with standard deviation 0.02 and quantised to their storage format, norms are one, balance
    biases, sinks, position biases and static mixing terms zero, gating scales 0.01, hash tables uniform over experts
    without repetition in a row. The value of a leaf depends on its path and ``seed`` alone.
    """
    flat: dict[Path, ParameterSpec] = flatten(specs)
    values: dict[Path, jax.Array] = {}
    for path, spec in flat.items():
        if spec.role == "scale":
            continue
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
        if spec.kind is Packed:
            scale_path = (*path[:-1], "scale")
            values[path], values[scale_path] = _packed(key, spec, flat[scale_path])
        else:
            values[path] = _plain(key, path, spec, config)
    return nest({path: values[path] for path in flat})


def _packed(key: jax.Array, spec: ParameterSpec, scale: ParameterSpec) -> tuple[jax.Array, jax.Array]:
    shape = spec.shape
    if spec.dtype == jnp.uint8:
        return quantize_fp4_weight(jax.random.normal(key, (*shape[:-1], shape[-1] * 2)) * _STANDARD_DEVIATION)
    codes, exponent = quantize_fp8_weight(jax.random.normal(key, shape) * _STANDARD_DEVIATION)
    if scale.dtype == jnp.float32:
        exponent = dequantize(exponent, None, jnp.float32)
    return codes, exponent


def _plain(key: jax.Array, path: Path, spec: ParameterSpec, config: Config) -> jax.Array:
    if spec.role in ("linear", "expert", "matrix", "embedding", "hyper"):
        return (jax.random.normal(key, spec.shape) * _STANDARD_DEVIATION).astype(spec.dtype)
    if spec.role == "norm":
        return jnp.ones(spec.shape, spec.dtype)
    if spec.role == "token_table":
        keys = jax.random.split(key, spec.shape[0])
        permuted = jax.vmap(lambda k: jax.random.permutation(k, config.n_routed_experts)[: spec.shape[1]])(keys)
        return permuted.astype(spec.dtype)
    if path[-1].endswith("_scale"):
        return jnp.full(spec.shape, _HYPER_SCALE, spec.dtype)
    return jnp.zeros(spec.shape, spec.dtype)
