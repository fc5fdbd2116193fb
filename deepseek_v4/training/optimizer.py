"""The optimizer of the paper as one Optax transform: Muon for matrices, AdamW for the rest (report 2.4, 4.2)."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_v4.parameters import ParameterSpec, is_spec, map_specs
from deepseek_v4.sharding import Placement
from deepseek_v4.training.muon import orthogonalise

MUON_ROLES = ("linear", "expert", "matrix", "hyper")
"""Roles of parameters that are matrices acting on activations."""

ADAMW_ROLES = ("embedding", "norm", "island", "adapter")
"""Roles of all other trainable parameters; embeddings include the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What the optimizer does and how its learning rate evolves; steps are counted from 0.

    ``name`` "adamw" uses AdamW for every parameter. The learning rate grows linearly over ``warmup_steps`` to
    ``learning_rate``, stays until ``decay_start`` and falls along a half cosine to ``final_learning_rate`` at
    ``total_steps``. ``weight_decay`` is decoupled and acts on every parameter. ``momentum`` and ``update_rms`` (the RMS
    of an update before the learning rate) are Muon's, ``betas`` and ``eps`` AdamW's. ``clip_norm`` limits the norm of
    the whole gradient. ``newton_schulz`` is the dtype of the operands of Muon's matmuls.
    """

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_start: int
    total_steps: int
    weight_decay: float = 0.1
    momentum: float = 0.95
    update_rms: float = 0.18
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20
    clip_norm: float | None = None
    newton_schulz: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise ValueError(f"optimizer name: expected 'muon' or 'adamw', found {self.name!r}")
        if self.newton_schulz not in ("float32", "bfloat16"):
            raise ValueError(f"newton_schulz: expected 'float32' or 'bfloat16', found {self.newton_schulz!r}")
        if not 0 <= self.warmup_steps <= self.decay_start <= self.total_steps:
            raise ValueError(
                "expected 0 <= warmup_steps <= decay_start <= total_steps, found "
                f"{self.warmup_steps}, {self.decay_start}, {self.total_steps}"
            )


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by step: step 0 takes the first part of the warmup, ``total_steps`` and later the final one."""

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1)
        progress = jnp.clip((step - config.decay_start) / max(config.total_steps - config.decay_start, 1), 0, 1)
        drop = config.learning_rate - config.final_learning_rate
        return config.learning_rate * warmup - drop * (1 - jnp.cos(math.pi * progress)) / 2

    return rate


def partition_labels(specs: Any) -> Any:
    """ "muon" or "adamw" for every leaf of a tree of descriptions, decided by its role.

    Raises ``ValueError`` for a description that is not a trainable float32 parameter.
    """

    def label(spec: ParameterSpec) -> str:
        if spec.role not in MUON_ROLES + ADAMW_ROLES or spec.dtype != jnp.float32:
            raise ValueError(
                f"optimizer: expected float32 parameters of roles {list(MUON_ROLES + ADAMW_ROLES)}, found "
                f"{spec.dtype}{list(spec.shape)} of role {spec.role!r}; train float32 masters, and leave out buffers"
            )
        return "muon" if spec.role in MUON_ROLES else "adamw"

    return map_specs(label, specs)


def make_optimizer(
    config: OptimizerConfig, specs: Any, placement: Placement | None = None
) -> optax.GradientTransformation:
    """The whole update W <- W - lr * (update + weight_decay * W) as a transform for ``optax.apply_updates``.

    ``specs`` describes the trained parameters (``Model.parameter_specs()`` with None where a leaf is frozen) and
    ``placement`` says where they live; gradients are float32 and laid out as the parameters are, and so is the state.
    """
    labels = partition_labels(specs)
    if config.name == "adamw":
        labels = jax.tree.map(lambda label: "adamw", labels)
    matrices = jax.tree.map(lambda label, spec: spec if label == "muon" else None, labels, specs)
    b1, b2 = config.betas
    transforms = {
        "muon": optax.chain(
            optax.trace(config.momentum, nesterov=True),
            orthogonalise(matrices, placement, update_rms=config.update_rms, dtype=jnp.dtype(config.newton_schulz)),
        ),
        "adamw": optax.scale_by_adam(b1, b2, config.eps),
    }
    optimizer = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.partition(transforms, labels),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config)),
    )
    if placement is None:
        return optimizer

    def init(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(optimizer.init(params), state_shardings(optimizer, specs, placement))

    return optax.GradientTransformation(init, optimizer.update)


def state_shardings(optimizer: optax.GradientTransformation, specs: Any, placement: Placement) -> Any:
    """The layout of every leaf of an optimizer's state: that of the parameter it belongs to, or on every device."""
    described = {path: spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    params = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        # Optax keeps moments in trees of the structure of the parameters: a parameter's path ends that of its moment.
        spec = next((described[path[i:]] for i in range(len(path)) if path[i:] in described), None)
        return placement.replicated() if spec is None else placement.parameter_sharding(spec)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params))
