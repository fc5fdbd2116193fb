"""The declaration of the hyper-connection operations: V4 shapes, costs, fallback rule (``pallas_kernels.registry``)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hyper_connection import gpu, post_mix, pre_mix, seam, tpu
from pallas_kernels.hyper_connection.cost import mix_cost
from pallas_kernels.registry import MIB, Case, Operation
from pallas_kernels.shapes import DECODE_ROWS, MODELS, PREFILL_QUERIES, ModelShape
from pallas_kernels.targets import Chip

_PREFILL = (PREFILL_QUERIES, 4 * PREFILL_QUERIES)
_CI = {"flash/decode/64", "pro/prefill/2048"}


def _case(model: ModelShape, tokens: int, back: bool, into: bool) -> Case:
    n, d, mixes = model.streams, model.hidden, (2 + model.streams) * model.streams
    decode = tokens <= max(DECODE_ROWS)
    leading = (tokens, 1) if decode else (1, tokens)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    arguments: dict[str, Any] = {"streams": array(*leading, n, d, dtype=jnp.bfloat16)}
    if back:
        arguments["y"] = array(*leading, d, dtype=jnp.bfloat16)
        arguments |= {"post": array(*leading, n), "comb": array(*leading, n, n)}
    if into:
        arguments |= {"fn": array(mixes, n * d), "scale": array(3), "base": array(mixes)}
        arguments |= {"sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6}
    name = f"{model.name}/{'decode' if decode else 'prefill'}/{tokens}"
    # Coefficients are turned around outside the kernel, where small dims in front of the lanes are padded to tiles.
    return Case(
        name=name,
        arguments=arguments,
        cost=mix_cost(tokens=tokens, streams=n, width=d, back=back, into=into),
        protected=("streams",),
        temporaries_limit=4 * tokens * 128 * 8 + MIB,
        representative=name in _CI,
    )


def _cases(back: bool, into: bool) -> Callable[[], tuple[Case, ...]]:
    """Decode and prefill of both models."""
    return lambda: tuple(_case(model, tokens, back, into) for model in MODELS for tokens in (*DECODE_ROWS, *_PREFILL))


def unserved(chip: Chip, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel serves these arguments on ``chip``, or None."""
    module = gpu if chip.platform == "cuda" else tpu
    return module.unserved(chip, arguments["streams"])


OPERATIONS = (
    Operation("pre_mix", pre_mix, _cases(back=False, into=True), unserved),
    Operation("post_mix", post_mix, _cases(back=True, into=False), unserved),
    Operation("seam", seam, _cases(back=True, into=True), unserved),
)
