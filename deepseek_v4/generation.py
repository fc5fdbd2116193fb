"""Generates continuations of many prompts in batches: chunked prefill, then one token per row and step.

Two programs are compiled, one for a chunk of prompts and one for a decode step, whatever the prompts are. Rows stop
each on their own; the device runs one step ahead of the host, which only reads tokens.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import DictKey

from deepseek_v4.model import Model, Params, rollback
from deepseek_v4.sampling import Sampling, check_sampling, sample

State = dict[str, Any]
"""What the compiled steps pass on: ``cache``, and per row the last ``token``, its ``count``, and ``done``."""

_LENGTH_STEP = 128  # cache lengths are multiples of this: few shapes, whole windows of every layer kind


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue; ``stream`` names its random numbers together with ``seed`` (see ``sampling``)."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.seed)
        if not self.token_ids:
            raise ValueError("token_ids: empty; a model continues at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {self.max_new_tokens}")


@dataclasses.dataclass(frozen=True)
class Step:
    """New tokens of request ``index`` (its place in the input), and why it ended if it did.

    ``finish_reason`` is None while it goes on, "stop" after a stop token (which is the last of ``token_ids``),
    "length" after ``max_new_tokens``, or "error" if the model produced a logit that is not a finite number.
    """

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclasses.dataclass
class Statistics:
    """Work done so far; seconds are wall-clock and leave compilation out."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, over all sequences of a batch."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def sequence_rate(self) -> float:
        """New tokens per second of one sequence."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0


class Generator:
    """Runs requests through a model in batches of ``batch_size`` rows with one cache of ``max_length`` tokens per row.

    ``batch_size`` is rounded up to what the mesh's data axis divides, ``max_length`` to a multiple of 128;
    ``prefill_chunk`` is the number of prompt tokens per row and call. ``stop_ids`` end a row. A row's tokens do not
    depend on the other rows of its batch. Raises ``ValueError`` for sizes below 1.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        batch_size: int,
        max_length: int,
        prefill_chunk: int = 512,
        stop_ids: Sequence[int] | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        placement = model.execution.placement
        self.model = model
        self.params = params
        self.batch_size = round_up(batch_size, 1 if placement is None else placement.size("batch"))
        self.max_length = round_up(max_length, _LENGTH_STEP)
        self.prefill_chunk = prefill_chunk
        self.statistics = Statistics()
        self._stop_ids = np.asarray((model.config.eos_token_id,) if stop_ids is None else tuple(stop_ids), np.int32)
        self._state: State | None = None

    def compile(self) -> float:
        """Allocates the cache and compiles both programs, unless that is done; returns the seconds it took.

        They run once over rows of no tokens, which leaves every row as it is.
        """
        begin = time.perf_counter()
        if self._state is None:
            batch = self.batch_size
            empty = np.zeros((batch, self.prefill_chunk), np.int32)
            nothing = np.zeros(batch, np.int32)
            settings = self._settings([])
            state = begin_batch(self.model, self._empty_state(), np.ones(batch, bool))
            state, _ = prefill_step(self.model, self.params, state, empty, nothing, nothing > 0, settings)
            state, news = decode_step(self.model, self.params, state, settings)
            jax.block_until_ready(news)
            self._state = state
        seconds = time.perf_counter() - begin
        self.statistics.compile_seconds += seconds
        return seconds

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yields the tokens of every request as they come, and its end once.

        Requests are run in batches, in their order; the steps of the rows of one batch interleave. Raises
        ``ValueError`` if a request does not fit into ``max_length``. The generator can be closed at any time.
        """
        self.compile()
        batch: list[Request] = []
        first = 0
        for request in requests:
            if len(request.token_ids) + request.max_new_tokens > self.max_length:
                raise ValueError(
                    f"request {first + len(batch)}: {len(request.token_ids)} prompt tokens + {request.max_new_tokens} "
                    f"new tokens exceed this generator's max_length of {self.max_length}"
                )
            batch.append(request)
            if len(batch) == self.batch_size:
                yield from self._run_batch(batch, first)
                first += len(batch)
                batch = []
        if batch:
            yield from self._run_batch(batch, first)

    def _run_batch(self, requests: list[Request], first: int) -> Iterator[Step]:
        assert self._state is not None
        settings = self._settings(requests)
        running = len(requests)
        reasons: list[str | None] = [None] * running

        def read(news) -> Iterator[Step]:
            nonlocal running
            tokens, valid, done, finite = jax.device_get(news)
            self.statistics.new_tokens += int(np.sum(valid & finite))
            for row in np.flatnonzero(valid):
                if reasons[row] is not None:
                    continue
                token = int(tokens[row])
                if not finite[row]:
                    reasons[row] = "error"
                elif done[row]:
                    reasons[row] = "stop" if token in self._stop_ids else "length"
                running -= reasons[row] is not None
                yield Step(first + int(row), (token,) if finite[row] else (), reasons[row])

        begin = time.perf_counter()
        batch = self.batch_size
        self._state = begin_batch(self.model, self._state, np.arange(batch) >= running)
        lengths = np.array([len(r.token_ids) for r in requests] + [0] * (batch - running))
        chunk = self.prefill_chunk
        steps: list[Step] = []
        for start in range(0, int(lengths.max()), chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            for row, request in enumerate(requests):
                part = request.token_ids[start : start + chunk]
                tokens[row, : len(part)] = part
            taken = np.clip(lengths - start, 0, chunk)
            ends = (lengths > start) & (lengths <= start + chunk)
            self._state, news = prefill_step(
                self.model, self.params, self._state, tokens, taken.astype(np.int32), ends, settings
            )
            if ends.any():
                steps.extend(read(news))
        jax.block_until_ready(self._state["token"])
        self.statistics.prompt_tokens += int(lengths.sum())
        self.statistics.prompt_seconds += time.perf_counter() - begin
        yield from steps

        ahead: deque = deque()
        begin = time.perf_counter()
        while running:
            self._state, news = decode_step(self.model, self.params, self._state, settings)
            ahead.append(news)
            if len(ahead) == 2:
                steps = list(read(ahead.popleft()))
                self.statistics.decode_steps += 1
                self.statistics.decode_seconds += time.perf_counter() - begin
                yield from steps
                begin = time.perf_counter()
        if ahead:
            jax.block_until_ready(ahead)

    def _empty_state(self) -> State:
        # Committed to its devices like everything the compiled steps return, or they would be compiled twice.
        batch, placement = self.batch_size, self.model.execution.placement
        rows = {"token": np.zeros(batch, np.int32), "count": np.zeros(batch, np.int32), "done": np.ones(batch, bool)}
        cache = self.model.init_cache(batch, self.max_length)
        if placement is None:
            (device,) = jax.tree.leaves(self.params)[0].devices()
            return jax.device_put({"cache": cache, **rows}, device)
        return {"cache": cache, **jax.device_put(rows, placement.sharding(("batch",)))}

    def _settings(self, requests: Sequence[Request]) -> dict[str, Any]:
        padding = self.batch_size - len(requests)
        rows = [(r.temperature, r.top_p, r.seed, r.stream) for r in requests] + [(0.0, 1.0, 0, 0)] * padding
        limits = [r.max_new_tokens for r in requests] + [0] * padding
        return {
            "sampling": Sampling.of(rows),
            "limits": np.asarray(limits, np.int32),
            "stop_ids": self._stop_ids,
        }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def begin_batch(model: Model, state: State, done) -> State:
    """Every row at the start of a new sequence: at position 0 nothing is read of what its cache held before."""
    zeros = jnp.zeros_like(state["count"])
    cache = rollback(state["cache"], jnp.zeros_like(state["cache"]["position"]))
    return _placed(model, {"cache": cache, "token": zeros, "count": zeros, "done": done})


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_step(model: Model, params: Params, state, tokens, lengths, ends, settings):
    """Runs one chunk of prompts: tokens [B, C], of which ``lengths`` [B] are real; ``ends`` [B] marks last chunks.

    Rows whose prompt ends here get their first new token. Returns the state and (token, valid, done, finite) [B].
    """
    output = model.forward(params, tokens, state["cache"], lengths, last_only=True)
    return _choose(model, state, output, ends, settings)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(model: Model, params: Params, state, settings):
    """Runs the last token of every row that is not done and chooses its next one; returns as ``prefill_step``."""
    running = ~state["done"]
    output = model.forward(params, state["token"][:, None], state["cache"], running.astype(jnp.int32), last_only=True)
    return _choose(model, state, output, running, settings)


def _choose(model: Model, state, output, valid, settings):
    logits = model.execution.constrain(output.logits, ("batch", None, None))[:, 0]
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    # A row that is not asked for may hold anything: it must not reach the arithmetic of the others' sampling either.
    token = sample(jnp.where((valid & finite)[:, None], logits, 0.0), settings["sampling"], state["count"])
    token = jnp.where(valid, token, state["token"])
    count = state["count"] + valid
    stopped = jnp.isin(token, settings["stop_ids"]) | (count >= settings["limits"]) | ~finite
    done = state["done"] | (valid & stopped)
    state = {"cache": output.cache, "token": token, "count": count, "done": done}
    return _placed(model, state), (token, valid, done, finite)


def _placed(model: Model, state: State) -> State:
    """The state in the layout it came in, so that a step's result is what the next step was compiled for."""
    placement = model.execution.placement
    if placement is None:
        return state

    def place(path, array):
        stacked = any(key in (DictKey("groups"), DictKey("drafts")) for key in path)
        axes = (None, "batch") if stacked else ("batch",)
        return lax.with_sharding_constraint(array, placement.sharding(axes + (None,) * (array.ndim - len(axes))))

    return jax.tree.map_with_path(place, state)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
