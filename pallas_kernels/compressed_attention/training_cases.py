"""The named training shapes of attention with its log sums and of its gradient (``pallas_kernels.registry``)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compressed_attention.cost import training_cost
from pallas_kernels.compressed_attention.gradient import attention_gradient, attention_with_sums, unserved
from pallas_kernels.registry import MIB, Case, Operation
from pallas_kernels.shapes import MODELS, ModelShape
from pallas_kernels.targets import Chip

LENGTHS = (4096, 8192)
"""Tokens of a training sequence."""

_CI = {"flash/csa/train/4096", "pro/hca/train/8192"}


def _case(model: ModelShape, kind: str, length: int, backward: bool) -> Case:
    ratio = {"csa": model.csa_ratio, "hca": model.hca_ratio, "swa": 0}[kind]
    total = length // ratio if ratio else 0
    topk = min(model.topk, total) if kind == "csa" else 0
    bf16, i32 = jnp.bfloat16, jnp.int32
    heads = jax.ShapeDtypeStruct((1, length, model.heads, model.head_dim), bf16)
    arguments: dict[str, Any] = {
        "q": heads,
        "window": jax.ShapeDtypeStruct((1, model.window - 1 + length, model.head_dim), bf16),
        "sink": jax.ShapeDtypeStruct((model.heads,), jnp.float32),
        "start": jax.ShapeDtypeStruct((1,), i32),
        "window_size": model.window,
        "scale": model.head_dim**-0.5,
    }
    if ratio:
        arguments["entries"] = jax.ShapeDtypeStruct((1, 1, total, model.head_dim), bf16)
        arguments["counts"] = jax.ShapeDtypeStruct((1, length), i32)
    if topk:
        arguments["indices"] = jax.ShapeDtypeStruct((1, length, topk), i32)
    if backward:
        sums = jax.ShapeDtypeStruct((1, length, model.heads), jnp.float32)
        arguments |= {"gradient": heads, "out": heads, "log_sums": sums}
    name = f"{model.name}/{kind}/train/{length}"

    def values(rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """A sequence from its beginning; every token selects among the entries it sees."""
        found = {"start": np.zeros(1, np.int32)}
        if not ratio:
            return found
        counts = (np.arange(length, dtype=np.int32) + 1) // ratio
        found["counts"] = counts[None]
        if topk:
            # The entries of the smallest random numbers, those that are not visible last.
            order = np.argsort(rng.random((length, total)) + (np.arange(total) >= counts[:, None]), axis=1)[:, :topk]
            found["indices"] = np.where(order < counts[:, None], order, -1).astype(np.int32)[None]
        return found

    return Case(
        name=name,
        arguments=arguments,
        cost=training_cost(
            batch=1,
            length=length,
            heads=model.heads,
            width=model.head_dim,
            window=model.window,
            entries=total,
            indices=topk,
            causal_ratio=ratio,
            backward=backward,
        ),
        protected=("q", "gradient", "out") if backward else ("q",),
        temporaries_limit=_temporaries(model, length, total, topk, backward) + MIB,
        representative=name in _CI,
        values=values,
    )


def _temporaries(model: ModelShape, length: int, total: int, topk: int, backward: bool) -> int:
    """What a pass keeps in memory beside arguments and results.

    Window rows and entries in whole blocks, their gradients as float32 sums of up to two cores, how often every query
    selects every entry (int16, up to three times on the way from words with a bit each), and numbers per query, in
    tiles of 128, of up to two cores, before and after they change places; never keys per query.
    """
    rows = length + 128 + total
    sums = 4 * 3 * rows * model.head_dim if backward else 0
    selections = 6 * length * total + 2 * 4 * length * 128 if topk else 0
    return 2 * rows * model.head_dim + sums + selections + 2 * 2 * 4 * length * 128 + 64 * length


def _cases(backward: bool) -> Callable[[], tuple[Case, ...]]:
    return lambda: tuple(
        _case(model, kind, length, backward) for model in MODELS for kind in ("csa", "hca", "swa") for length in LENGTHS
    )


def _unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    if chip.platform == "cuda":
        return "there is none"
    return unserved(arguments["q"], arguments.get("entries"), arguments.get("indices"), arguments["window_size"])


OPERATIONS = (
    Operation("compressed_attention_training", attention_with_sums, _cases(backward=False), _unserved),
    Operation("compressed_attention_gradient", attention_gradient, _cases(backward=True), _unserved),
)
