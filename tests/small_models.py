"""Small models for tests: configs of every layer kind, and one set of random weights seen from three sides.

The weights come from ``released.py`` under their released names; ``parameters`` arranges them as the model's ``params``
and ``decoded`` turns them into the float64 arrays of the oracle, without the code of ``deepseek_v4`` for formats.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from released import Tensors, released_tensors

from deepseek_v4 import Config, Execution, Model
from deepseek_v4.config import YarnScaling
from deepseek_v4.nn.variables import RELEASED, Storage
from deepseek_v4.parameters import flatten, nest


def compiled(function: Callable) -> Callable:
    """``jax.jit`` without LLVM's optimisations: the same arithmetic, in a third of the compile time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


FLASH_LIKE = (0, 0, 4, 128, 4, 128, 4)
PRO_LIKE = (128, 128, 4, 128, 4, 128, 4)
ODD = (128, 128, 4, 128, 4, 4)


def small_config(
    ratios: tuple[int, ...] = FLASH_LIKE, *, mtp: bool = True, num_hash_layers: int = 3, **changes: Any
) -> Config:
    """A model with one layer per entry of ``ratios``, and an MTP block; ``changes`` replace any field.

    Sizes are small but not degenerate: more heads than groups, two FP8 blocks along the hidden width, more entries
    than ``index_topk`` after a hundred tokens, a SwiGLU limit that clamps often, a YaRN ramp with interior points.
    """
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 256,
        "num_hidden_layers": len(ratios),
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 128,
        "compress_ratios": (*ratios, 0) if mtp else tuple(ratios),
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": YarnScaling(16.0, 32.0, 1.0, 65536),
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 24,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "num_hash_layers": num_hash_layers,
        "moe_intermediate_size": 64,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 0.75,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1048576,
        "num_nextn_predict_layers": int(mtp),
        "drafter": "mtp" if mtp else None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return Config(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A model, its parameters, and the same weights under released names, as stored and decoded to float64."""

    model: Model
    params: dict[str, Any]
    tensors: Tensors
    decoded: Tensors

    @property
    def config(self) -> Config:
        return self.model.config


def small_model(
    config: Config, storage: Storage = RELEASED, *, seed: int = 0, dtype: str = "float32", simulate=(), **options: Any
) -> SmallModel:
    """Random weights in ``storage`` and the model to run them; ``options`` go to ``released_tensors``."""
    tensors = released_tensors(config, storage, seed, **options)
    model = Model(config, storage, Execution(dtype=dtype, simulate=frozenset(simulate)))
    return SmallModel(model, parameters(model, tensors), tensors, decoded(tensors))


def parameters(model: Model, tensors: Tensors) -> dict[str, Any]:
    """``params`` of the model from tensors under released names."""

    def leaf(prefix: str, path: tuple[str, ...], spec) -> np.ndarray:
        if path[:2] == ("ffn", "experts"):
            rest = ".".join(path[2:])
            experts = range(model.config.n_routed_experts)
            return np.stack([_stored(tensors[f"{prefix}ffn.experts.{e}.{rest}"]) for e in experts])
        return _stored(tensors[prefix + ".".join(path)])

    def tree(specs, prefixes: list[str] | None, prefix: str = ""):
        values = {}
        for path, spec in flatten(specs).items():
            value = leaf(prefix, path, spec) if prefixes is None else np.stack([leaf(p, path, spec) for p in prefixes])
            if value.shape != spec.shape or value.dtype != spec.dtype:
                raise ValueError(f"{prefix}{path}: {value.dtype}{value.shape}, expected {spec.dtype}{spec.shape}")
            values[path] = jnp.asarray(value)
        return nest(values)

    specs = model.parameter_specs()
    groups = tuple(
        tuple(
            tree(member, [f"layers.{group.layer_index(repeat, j)}." for repeat in range(group.repeats)])
            for j, member in enumerate(members)
        )
        for group, members in zip(model.groups, specs["groups"], strict=True)
    )
    drafts = tuple(tree(block, None, f"mtp.{i}.") for i, block in enumerate(specs["drafts"]))
    return {"shell": tree(specs["shell"], None), "groups": groups, "drafts": drafts}


def _stored(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int8:
        return array.view(np.uint8)
    return array.astype(np.int32) if array.dtype == np.int64 else array


_NIBBLES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(tensors: Tensors) -> Tensors:
    """Every tensor but the scales, as float64 (``tid2eid`` stays an integer), scales multiplied in."""
    values: Tensors = {}
    for name, array in tensors.items():
        if name.endswith(".weight") and name[: -len("weight")] + "scale" in tensors:
            scale = tensors[name[: -len("weight")] + "scale"]
            if scale.dtype == ml_dtypes.float8_e8m0fnu:
                scale = 2.0 ** (scale.view(np.uint8).astype(np.float64) - 127)
            if array.dtype == np.int8:
                codes = array.view(np.uint8)
                weight = np.empty((codes.shape[0], codes.shape[1] * 2))
                weight[:, 0::2], weight[:, 1::2] = _NIBBLES[codes & 15], _NIBBLES[codes >> 4]
                values[name] = weight * np.repeat(scale, 32, axis=1)
            else:
                blocks = np.kron(scale.astype(np.float64), np.ones((128, 128)))
                values[name] = array.astype(np.float64) * blocks[: array.shape[0], : array.shape[1]]
        elif not name.endswith(".scale"):
            values[name] = array if array.dtype == np.int64 else array.astype(np.float64)
    return values
