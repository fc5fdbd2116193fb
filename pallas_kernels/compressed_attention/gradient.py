"""Attention for training: a forward pass that keeps what its gradient needs, the gradient, and which calls have it.

Kernels without a gradient of their own, and calls that the rule here excludes, differentiate as the twin does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compressed_attention import tpu_backward, tpu_training, training_plan, xla
from pallas_kernels.compressed_attention.blocks import shape_class
from pallas_kernels.compressed_attention.cost import training_cost
from pallas_kernels.compressed_attention.tpu_common import LANES, SUBLANES
from pallas_kernels.compressed_attention.training_plan import MAX_ENTRIES, Inputs, TrainingPlan, TrainingTiles
from pallas_kernels.gradients import with_twin_gradient
from pallas_kernels.implementation import choose
from pallas_kernels.targets import Chip, current_chip
from pallas_kernels.tuned import tuned


class Gradients(NamedTuple):
    """Gradients of arguments of ``compressed_attention``, in shape and dtype as these; entries may be None."""

    q: jax.Array
    window: jax.Array
    sink: jax.Array
    entries: jax.Array | None


def attention_with_sums(
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    counts: jax.Array | None = None,
    indices: jax.Array | None = None,
    window_counts: jax.Array | None = None,
    first_entries: jax.Array | None = None,
    window_size: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``compressed_attention`` without a ring, and log(exp(sink) + sum of exp(scores)) of every query-head.

    Shapes as there, entries plain. Returns [B, S, H, c] and float32 [B, S, H]. Source: paper 2.3.
    """
    arguments: dict[str, Any] = dict(
        q=q, window=window, sink=sink, start=start, entries=entries, layer=layer, counts=counts, indices=indices,
        window_counts=window_counts, first_entries=first_entries, window_size=window_size, scale=scale,
    )  # fmt: skip
    return choose(
        "compressed_attention_training", _FORWARD, implementation, unserved_by(q, entries, indices, window_size)
    )(**arguments)


def attention_gradient(
    gradient: jax.Array,
    out: jax.Array,
    log_sums: jax.Array,
    q: jax.Array,
    window: jax.Array,
    sink: jax.Array,
    start: jax.Array,
    *,
    entries: jax.Array | None = None,
    layer: jax.Array | int = 0,
    counts: jax.Array | None = None,
    indices: jax.Array | None = None,
    window_counts: jax.Array | None = None,
    first_entries: jax.Array | None = None,
    window_size: int,
    scale: float,
    implementation: str | None = None,
) -> Gradients:
    """The gradient of ``attention_with_sums`` with respect to q, window, sink and entries.

    ``gradient`` [B, S, H, c] is that of the attention, ``out`` [B, S, H, c] and ``log_sums`` [B, S, H] are what the
    forward pass returned (the twin computes them again). Sums are float32 in an order that is the shapes' alone: the
    same bits every time, and a row's do not depend on the other rows; the sink's is the sum over rows.
    """
    arguments: dict[str, Any] = dict(
        q=q, window=window, sink=sink, start=start, entries=entries, layer=layer, counts=counts, indices=indices,
        window_counts=window_counts, first_entries=first_entries, window_size=window_size, scale=scale,
    )  # fmt: skip
    function = choose(
        "compressed_attention_gradient", _BACKWARD, implementation, unserved_by(q, entries, indices, window_size)
    )
    return function(gradient, out, log_sums, **arguments)


def unserved(q, entries, indices, window_size, *, compiled: bool = True) -> str | None:
    """Why the training kernels cannot serve arguments of these shapes and types, or None."""
    heads, width = q.shape[2:]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries are {q.dtype}, expected bfloat16 or float32"
    if window_size - 1 > TrainingTiles.queries:
        return f"a window of {window_size} tokens, at most {TrainingTiles.queries + 1}"
    if compiled and width % LANES:
        return f"head_dim {width} is not a multiple of {LANES}"
    if compiled and heads % SUBLANES:
        return f"{heads} heads are not a multiple of {SUBLANES}"
    if entries is None:
        return None
    if not isinstance(entries, jax.Array | jax.ShapeDtypeStruct) or not jnp.issubdtype(entries.dtype, jnp.floating):
        return "entries that are not plain"
    if entries.shape[2] == 0:
        return "a cache without rows"
    if entries.shape[2] > MAX_ENTRIES:
        return f"{entries.shape[2]} entries, at most {MAX_ENTRIES} with their gradients in VMEM"
    if indices is not None and indices.shape[-1] >= 1 << 15:
        return f"{indices.shape[-1]} indices of a query, fewer than {1 << 15} count in int16"
    return None


def unserved_by(q, entries, indices, window_size) -> dict[str, Callable[[Chip | None], str | None]]:
    """The rule in the form that ``choose`` takes."""
    return {
        "tpu": lambda chip: unserved(q, entries, indices, window_size),
        "tpu_interpret": lambda chip: unserved(q, entries, indices, window_size, compiled=False),
    }


def with_training_kernels(kernel: Callable, interpret: Any = False) -> Callable:
    """``f(**arguments)`` that runs ``kernel``, or the training kernels where a gradient is asked for and they serve.

    Packed documents, which ``kernel`` does not serve, run on the training kernels in any case. Where they do not serve
    (a ring, packed words, more entries than fit: ``unserved``) the gradient is the twin's, recomputed.
    """

    def call(*, ring, window_counts=None, first_entries=None, **arguments):
        q, entries = arguments["q"], arguments["entries"]
        of_shapes = (q, entries, arguments["indices"], arguments["window_size"])
        if ring is not None or unserved(*of_shapes, compiled=not interpret) is not None:
            return with_twin_gradient(kernel, xla.compressed_attention)(ring=ring, **arguments)
        static = {name: arguments.pop(name) for name in ("window_size", "scale")}
        varied = {name: arguments.pop(name) for name in ("q", "window", "sink", "entries")}
        rest = {**arguments, "window_counts": window_counts, "first_entries": first_entries}
        forward = functools.partial(_forward, **static, interpret=interpret)

        @jax.custom_vjp
        def run(varied, rest):
            if window_counts is not None:
                return forward(**varied, **rest)[0]
            return kernel(**varied, ring=None, **{name: rest[name] for name in arguments}, **static)

        def save(varied, rest):
            out, sums = forward(**varied, **rest)
            return out, (out, sums, varied, rest)

        def pull(saved, gradient):
            out, sums, varied, rest = saved
            found = _backward(gradient, out, sums, **varied, **rest, **static, interpret=interpret)
            return found._asdict(), None

        run.defvjp(save, pull)
        return run(varied, rest)

    return call


def _prepared(arguments, tiles, cores, interpret) -> tuple[TrainingPlan, Inputs]:
    a = arguments
    chip = None if interpret else current_chip()
    tiles = tiles or tuned("compressed_attention_training", chip, shape_class(a["q"].shape[2]), TrainingTiles())
    plan = training_plan.plan_of(
        a["q"],
        a["entries"],
        a["indices"],
        window_size=a["window_size"],
        scale=a["scale"],
        tiles=tiles,
        cores=cores or (1 if chip is None else chip.cores),
        interpret=interpret,
    )
    names = ("window", "start", "entries", "layer", "counts", "indices", "window_counts", "first_entries")
    return plan, training_plan.inputs_of(plan, *(a[name] for name in names))


def _estimate(plan: TrainingPlan, *, backward: bool) -> pl.CostEstimate:
    """What the kernels do: every visible block of entries for every query, as if all were visible."""
    cost = training_cost(
        batch=plan.batch,
        length=plan.length,
        heads=plan.heads,
        width=plan.width,
        window=plan.view,
        entries=plan.rows,
        indices=0,
        causal_ratio=0,
        backward=backward,
        itemsize=plan.dtype.itemsize,
    )
    return pl.CostEstimate(
        flops=cost.total_operations,
        bytes_accessed=cost.bytes_moved,
        transcendentals=cost.total_operations // ((10 if backward else 4) * plan.width),
    )


def _padded(plan: TrainingPlan, a: jax.Array) -> jax.Array:
    """[B, S, H, c] in whole blocks of queries."""
    missing = plan.blocks * plan.query_block - plan.length
    return jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else a


def _forward(*, tiles: TrainingTiles | None = None, cores: int | None = None, interpret: Any = False, **arguments):
    plan, inputs = _prepared(arguments, tiles, cores, interpret)
    estimate = _estimate(plan, backward=False)
    q = _padded(plan, arguments["q"])
    out, sums = tpu_training.attention(plan, q, arguments["sink"], inputs, cost=estimate, interpret=interpret)
    sums = jnp.moveaxis(sums, 0, 2).reshape(plan.batch, -1, plan.heads)
    return out[:, : plan.length], sums[:, : plan.length]


def _backward(
    gradient,
    out,
    log_sums,
    *,
    tiles: TrainingTiles | None = None,
    cores: int | None = None,
    interpret: Any = False,
    **arguments,
) -> Gradients:
    plan, inputs = _prepared(arguments, tiles, cores, interpret)
    window, sink, entries = arguments["window"], arguments["sink"], arguments["entries"]
    missing = plan.blocks * plan.query_block - plan.length
    sums = jnp.pad(log_sums, ((0, 0), (0, missing), (0, 0)))
    sums = jnp.moveaxis(sums.reshape(plan.batch, -1, plan.cores, plan.heads // plan.cores), 2, 0)
    dq, dsink, dwindow, dentries = tpu_backward.attention_gradient(
        plan,
        _padded(plan, gradient.astype(plan.dtype)),
        _padded(plan, out),
        sums,
        _padded(plan, arguments["q"]),
        sink,
        inputs,
        cost=_estimate(plan, backward=True),
        interpret=interpret,
    )
    first = plan.query_block - (plan.window_size - 1)
    dwindow = dwindow[:, first : first + window.shape[1]].astype(window.dtype)
    if entries is not None and dentries is not None:
        dentries = dentries[:, : entries.shape[2]].astype(entries.dtype)
        if entries.shape[0] == 1:
            dentries = dentries[None]
        else:
            dentries = lax.dynamic_update_index_in_dim(jnp.zeros_like(entries), dentries, arguments["layer"], 0)
    return Gradients(dq[:, : plan.length], dwindow, jnp.sum(dsink, axis=0).astype(sink.dtype), dentries)


def _twin_gradient(gradient, out, log_sums, *, q, window, sink, entries, **rest) -> Gradients:
    def attend(q, window, sink, entries):
        return xla.compressed_attention(q=q, window=window, sink=sink, entries=entries, ring=None, **rest)

    _, pull = jax.vjp(attend, q, window, sink, entries)
    return Gradients(*pull(gradient))


def _twin_with_sums(**arguments):
    return xla.attention_with_sums(**arguments, ring=None)


_INTERPRETED = pltpu.InterpretParams()
_FORWARD: dict[str, Callable] = {
    "xla": _twin_with_sums,
    "tpu": _forward,
    "tpu_interpret": functools.partial(_forward, interpret=_INTERPRETED),
}
_BACKWARD: dict[str, Callable] = {
    "xla": _twin_gradient,
    "tpu": _backward,
    "tpu_interpret": functools.partial(_backward, interpret=_INTERPRETED),
}
