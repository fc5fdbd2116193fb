"""The compiled programs of an engine: read a piece of prompts, move a row into a slot, decode all slots, release one.

Each is a pure function of arrays, compiled once per shape. News from the device are one small integer array per call
(and one of log-probabilities where they are asked for), whole on every process.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_v4.engine import speculation
from deepseek_v4.engine.state import State, placed, put_row, take_row
from deepseek_v4.model import Model, Params, rollback
from deepseek_v4.sampling import sample

RUNNING, DONE, NOT_FINITE = range(3)

HEADER = 3
"""Columns of ``News.tokens`` before the tokens: how many there are, the row's status, drafts that were accepted."""


class News(NamedTuple):
    """What a step tells the host: ``tokens`` int32 [B, 3 + K], and ``logprobs`` or None.

    ``logprobs`` are (chosen float32 [B, K], top ids int32 [B, K, n], their float32 [B, K, n]).
    """

    tokens: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


class Programs(NamedTuple):
    """The compiled functions of one model; shapes of states and tokens decide how often each is compiled."""

    prefill: Callable[[Params, State, dict[str, Any]], tuple[State, News]]
    insert: Callable[[State, State, Any, Any], State]
    decode: Callable[[Params, State], tuple[State, News]]
    release: Callable[[State, Any], State]


@functools.lru_cache(maxsize=16)
def programs(
    model: Model, drafts: int, top_logprobs: int | None, compiler_options: tuple[tuple[str, Any], ...] = ()
) -> Programs:
    """The programs that decode with ``drafts`` proposals per step; ``top_logprobs`` None leaves logprobs out.

    The model is closed over, not passed: hashing a static argument would cost at every call.
    """

    def bind(function, donate, **options):
        bound = functools.partial(function, model, **options)
        return jax.jit(bound, donate_argnums=donate, compiler_options=dict(compiler_options))

    return Programs(
        prefill=bind(_prefill, 1, drafts=drafts, top=top_logprobs),
        insert=bind(_insert, 0),
        decode=bind(_decode, 1, drafts=drafts, top=top_logprobs),
        release=bind(_release, 0),
    )


def _prefill(model: Model, params: Params, state: State, inputs: dict[str, Any], *, drafts: int, top: int | None):
    """Reads the next piece of some prompts: ``inputs`` has tokens [P, C], of which ``lengths`` [P] are real.

    ``start`` [P] says from which position, ``ends`` [P] which rows' prompts are then complete; these get their first
    new token, or ``forced`` [P] where that is not -1. ``rows`` are the settings of all rows.
    """
    rows = inputs["rows"]
    cache = rollback(state["cache"], inputs["start"])
    output = model.forward(params, inputs["tokens"], cache, inputs["lengths"], draft=drafts > 0, last_only=True)
    logits = model.execution.constrain(output.logits, ("batch", None, None))[:, 0]
    sampled = inputs["ends"] & (inputs["forced"] < 0)
    tokens, finite = _sample(rows, logits, sampled)
    rows, news = _advance(model, rows, tokens[:, None], sampled.astype(jnp.int32), finite, logits[:, None], top)
    rows["token"] = jnp.where(inputs["forced"] >= 0, inputs["forced"], rows["token"])
    return placed(model, {"cache": output.cache, "rows": rows}), news


def _insert(model: Model, state: State, source: State, row: jax.Array, slot: jax.Array) -> State:
    """``state`` with row ``row`` of ``source`` in its slot ``slot``."""
    return placed(model, put_row(state, take_row(source, row), slot))


def _release(model: Model, state: State, slot: jax.Array) -> State:
    """``state`` with its slot ``slot`` idle."""
    rows = state["rows"]
    done = jnp.where(jnp.arange(rows["done"].shape[0]) == slot, True, rows["done"])
    return placed(model, {**state, "rows": {**rows, "done": done}})


def _decode(model: Model, params: Params, state: State, *, drafts: int, top: int | None):
    """The next tokens of every row that is not done: one, or with drafts up to 1 + ``drafts``."""
    rows, cache = state["rows"], state["cache"]
    running = ~rows["done"]
    if not drafts:
        lengths = running.astype(jnp.int32)
        output = model.forward(params, rows["token"][:, None], cache, lengths, last_only=True)
        logits = model.execution.constrain(output.logits, ("batch", None, None))
        tokens, finite = _sample(rows, logits[:, 0], running)
        rows, news = _advance(model, rows, tokens[:, None], lengths, finite, logits, top)
        return placed(model, {"cache": output.cache, "rows": rows}), news

    start = cache["position"]
    proposal = speculation.propose(model, params, cache, rows, drafts)
    tried = jnp.concatenate([rows["token"][:, None], proposal.tokens], axis=1)
    output = model.forward(params, tried, proposal.cache, running * (1 + drafts), draft=True)
    assert output.cache is not None
    logits = model.execution.constrain(output.logits, ("batch", None, None))
    finite = jnp.all(jnp.isfinite(logits), axis=(1, 2))
    safe = jnp.where((running & finite)[:, None, None], logits, 0.0)
    tokens, number = speculation.verify(safe, proposal, rows["sampling"], rows["count"])
    number = jnp.where(running, number, 0)
    rows, news = _advance(model, rows, tokens, number, finite, logits, top)
    cache = rollback(output.cache, start + number)
    return placed(model, {"cache": cache, "rows": rows}), news


def _sample(rows, logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    # A row that is not asked for may hold anything: it must not reach the arithmetic of the others' sampling either.
    safe = jnp.where((wanted & finite)[:, None], logits, 0.0)
    return sample(safe, rows["sampling"], rows["count"]), finite


def _advance(model: Model, rows, tokens, number, finite, logits, top: int | None):
    """Appends the first ``number`` [B] of tokens [B, K] to rows, up to the first that ends a row; rows and news.

    ``logits`` [B, K, V] are those the tokens were chosen from; rows of which one is not ``finite`` [B] end.
    """
    index = jnp.arange(tokens.shape[1])
    offered = index < number[:, None]
    stops = jnp.any(tokens[..., None] == rows["stop_ids"][:, None, :], axis=-1)
    ends = offered & (stops | (rows["count"][:, None] + index + 1 >= rows["limit"][:, None]))
    accepted = jnp.maximum(number - 1, 0)
    number = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, number)
    wrong = (number > 0) & ~finite
    number = jnp.where(wrong, 0, number)
    done = rows["done"] | jnp.any(ends, axis=1) | wrong
    last = jnp.take_along_axis(tokens, jnp.maximum(number - 1, 0)[:, None], axis=1)[:, 0]
    status = jnp.where(wrong, NOT_FINITE, jnp.where(done, DONE, RUNNING))
    told = jnp.concatenate([jnp.stack([number, status, accepted], axis=1), tokens], axis=1).astype(jnp.int32)
    news = News(told, None if top is None else _logprobs(rows, tokens, logits, top))
    placement = model.execution.placement
    if placement is not None:
        news = lax.with_sharding_constraint(news, placement.replicated())
    rows = {
        **rows,
        "token": jnp.where(number > 0, last, rows["token"]),
        "count": rows["count"] + number,
        "done": done,
    }
    return rows, news


def _logprobs(rows, tokens, logits, top: int):
    def compute():
        normalised = jax.nn.log_softmax(logits, axis=-1)
        best, ids = lax.top_k(normalised, max(top, 1))
        chosen = jnp.take_along_axis(normalised, tokens[..., None], axis=-1)[..., 0]
        return chosen, ids[..., :top].astype(jnp.int32), best[..., :top]

    def nothing():
        shape = (*tokens.shape, top)
        return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return lax.cond(jnp.any(rows["logprobs"] & ~rows["done"]), compute, nothing)
