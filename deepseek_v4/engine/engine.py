"""Continuous batching: requests join and leave fixed slots at any step, prompts are read in pieces between them.

One step of the engine dispatches pieces of prompts within a token budget and one decode step per pool, and then reads
what the step before has produced: the device is always one step ahead of the host. Prompts are read in a row of their
own, which moves into a slot when it is complete; what a piece is depends on its prompt alone. So a request's tokens are
a function of the request and of the compiled shapes, whatever else runs, in whichever slot, in whichever order.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_v4.engine.prefix import PrefixStore
from deepseek_v4.engine.requests import Request, TokenLogprob, Update
from deepseek_v4.engine.scheduling import LENGTH_STEP, Pool, next_chunk, round_up
from deepseek_v4.engine.state import State, cache_bytes, empty_state, request_rows
from deepseek_v4.engine.statistics import Statistics
from deepseek_v4.engine.steps import HEADER, NOT_FINITE, RUNNING, News, programs
from deepseek_v4.engine.stopping import StopStrings
from deepseek_v4.model import Model, Params
from deepseek_v4.tokenizer import Tokenizer

NOT_FINITE_ERROR = "the model produced a logit that is not a finite number"


@dataclasses.dataclass(eq=False)
class _Active:
    """A request on its way through the engine."""

    id: int
    request: Request
    tokens: tuple[int, ...]
    """What is read before the first new token is sampled."""
    submitted: float
    stop: StopStrings | None = None
    keys: list[bytes] = dataclasses.field(default_factory=list)
    slot: int = -1
    read: int = 0
    steps_left: int = 0
    """Decode steps after which it has reached its limit, if nothing stops it before."""
    first: float = 0.0
    new_tokens: int = 0
    finished: bool = False


class _Pool:
    """The slots of one cache length, and the rows in which their prompts are read."""

    def __init__(self, model: Model, pool: Pool, rows: int, rollback: int):
        self.length = pool.max_length
        self.slots: State = empty_state(model, pool.slots, pool.max_length, rollback)
        self.staging: State = empty_state(model, rows, pool.max_length, rollback)
        self.owners: list[_Active | None] = [None] * pool.slots
        self.reading: list[_Active | None] = [None] * rows
        self.queue: deque[_Active] = deque()
        self.turn = 0

    @property
    def busy(self) -> bool:
        return bool(self.queue) or any(self.owners)

    def free_slot(self) -> int | None:
        return next((slot for slot, owner in enumerate(self.owners) if owner is None), None)


class Engine:
    """Runs requests through a model; see the module's description for how.

    ``pools`` are the slots (their number rounded up to what the mesh's data axis divides, lengths to multiples of 128);
    a request goes to the first pool in order of length that holds it. ``chunks`` are the sizes of the pieces in which
    prompts are read; ``token_budget`` bounds the tokens of one step, decoding first, at least one piece of a waiting
    prompt in any case (None: one piece of every pool). ``drafts`` proposes that many tokens per step with the MTP
    block. ``top_logprobs`` is the most alternatives any request may ask for (None: no log-probabilities). Stop strings
    need ``tokenizer``. ``prefixes`` keeps and reuses what was computed for shared beginnings. ``compiler_options`` are
    XLA's.

    Guarantee: in the same compiled shapes a request's logits and tokens are the same bit by bit whatever else is in
    the batch, as long as every operation computes rows independently. XLA's CPU code does in float32 (tested), and the
    kernels are written so: none of them lets one row's numbers reach another's.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        pools: Sequence[Pool],
        *,
        chunks: Sequence[int] = (512,),
        token_budget: int | None = None,
        drafts: int = 0,
        top_logprobs: int | None = None,
        tokenizer: Tokenizer | None = None,
        prefixes: PrefixStore | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        if not pools:
            raise ValueError("pools: an engine needs at least one")
        for name, value in (("chunks", min(chunks, default=0)), ("token_budget", token_budget or 1)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        check_drafts(model, drafts)
        placement = model.execution.placement
        shards = 1 if placement is None else placement.size("batch")
        self.model = model
        self.params = params
        self.drafts = drafts
        self.chunks = tuple(sorted(set(chunks), reverse=True))
        self.token_budget = token_budget
        self.top_logprobs = top_logprobs
        self.pools = tuple(
            Pool(round_up(pool.slots, shards), round_up(pool.max_length, LENGTH_STEP))
            for pool in sorted(pools, key=lambda pool: pool.max_length)
        )
        self.statistics = Statistics()
        self._tokenizer = tokenizer
        self._shards = shards
        self._programs = programs(model, drafts, top_logprobs, tuple(sorted((compiler_options or {}).items())))
        self._prefixes = prefixes
        if prefixes is not None:
            prefixes.check(model, self.chunks)
        self._pools: list[_Pool] = []
        self._active: dict[int, _Active] = {}
        self._early: list[Update] = []
        self._pending: deque[tuple[int, News, tuple[_Active | None, ...]]] = deque()
        self._ids = 0
        self._replicated = None if placement is None else placement.replicated()

    # --- sizes ----------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Sequences that can decode together."""
        return sum(pool.slots for pool in self.pools)

    @property
    def max_length(self) -> int:
        """The longest prompt and continuation that fit a slot."""
        return self.pools[-1].max_length

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches, those of the rows in which prompts are read included."""
        return sum(
            (pool.slots + self._shards) * cache_bytes(self.model, pool.max_length, self.drafts) for pool in self.pools
        )

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id, which its updates carry; raises ``ValueError`` if it cannot be run."""
        index = next((i for i, pool in enumerate(self.pools) if request.total <= pool.max_length), None)
        if index is None:
            raise ValueError(
                f"{len(request.token_ids)} prompt tokens + {request.max_new_tokens} new tokens exceed this engine's "
                f"longest slot of {self.max_length}"
            )
        if request.logprobs is not None and request.logprobs > (-1 if self.top_logprobs is None else self.top_logprobs):
            raise ValueError(
                f"logprobs: {request.logprobs} alternatives were asked for, this engine was built for "
                f"top_logprobs={self.top_logprobs}"
            )
        stop = None
        if request.stop:
            if self._tokenizer is None:
                raise ValueError("stop: strings need a tokenizer, and this engine has none; give stop_ids")
            stop = StopStrings(request.stop, self._tokenizer)
            stop.push(request.generated)
        self.compile()
        tokens = request.token_ids + request.generated[:-1]
        active = _Active(self._ids, request, tokens, time.perf_counter(), stop)
        active.steps_left = request.max_new_tokens - max(1, len(request.generated))
        self._ids += 1
        self._active[active.id] = active
        self._pools[index].queue.append(active)
        return active.id

    def cancel(self, request_id: int) -> None:
        """Ends a request; its last update, "cancelled", comes with the next step. Nothing happens if it has ended."""
        if active := self._active.get(request_id):
            self._release(active)
            self._early.append(self._end(active, Update(request_id, (), "cancelled")))

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not self._active and not self._early

    def run(
        self,
        requests: Iterable[Request],
        *,
        ahead: int | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Iterator[Update]:
        """Yields the updates of many requests, ``request_id`` being their place in ``requests``.

        At most ``ahead`` of them wait in the queue (default: as many as there are slots). One that cannot be run ends
        with an "error" update and stops no other. The iterator may be closed at any time: what was running is
        cancelled. ``interrupted`` is asked before every step whether to raise ``KeyboardInterrupt``.
        """
        self.compile()
        source = enumerate(requests)
        places: dict[int, int] = {}
        ahead = self.slots if ahead is None else ahead
        exhausted = False
        try:
            while True:
                while not exhausted and sum(len(pool.queue) for pool in self._pools) < max(1, ahead):
                    place, request = next(source, (None, None))
                    if place is None or request is None:
                        exhausted = True
                        break
                    try:
                        places[self.submit(request)] = place
                    except ValueError as error:
                        yield Update(place, (), "error", error=str(error))
                if exhausted and self.idle:
                    return
                if interrupted is not None and interrupted():
                    raise KeyboardInterrupt
                for update in self.step():
                    yield dataclasses.replace(update, request_id=places[update.request_id])
        finally:
            for request_id in list(self._active):
                self.cancel(request_id)
            self._early.clear()
            self._pending.clear()

    # --- stepping -------------------------------------------------------------------------------------------------

    def compile(self) -> float:
        """Allocates the caches and compiles every program, unless that is done; returns the seconds it took.

        The programs run once over rows of no tokens, which leaves every row as it is.
        """
        if self._pools:
            return 0.0
        begin = time.perf_counter()
        pools = [_Pool(self.model, pool, self._shards, self.drafts) for pool in self.pools]
        for pool in pools:
            nobody: list[_Active | None] = [None] * self._shards
            for size in self.chunks:
                pool.staging, _ = self._programs.prefill(self.params, pool.staging, self._inputs(nobody, size))
            if self._prefixes is not None:
                pool.staging = self._prefixes.compile(pool.staging, self._put)
            zero = self._put(np.int32(0))
            pool.slots = self._programs.insert(pool.slots, pool.staging, zero, zero)
            pool.slots, news = self._programs.decode(self.params, pool.slots)
            pool.slots = self._programs.release(pool.slots, zero)
            jax.block_until_ready((pool.slots, news))
        self._pools = pools
        seconds = time.perf_counter() - begin
        self.statistics.compile_seconds += seconds
        return seconds

    def decode_alone(self, count: int) -> float:
        """Seconds of one decode step on the device: ``count`` of the first pool's, awaited together, nothing read.

        What a step takes beyond that is the host's doing. For measurements: raises ``ValueError`` unless idle.
        """
        if not self.idle:
            raise ValueError("decode_alone: requests are running")
        self.compile()
        pool = self._pools[0]
        begin = time.perf_counter()
        for _ in range(count):
            pool.slots, news = self._programs.decode(self.params, pool.slots)
        jax.block_until_ready(news)
        return (time.perf_counter() - begin) / count

    def step(self) -> list[Update]:
        """Dispatches the next work to the device and returns what the step before has produced."""
        begin, worked = time.perf_counter(), time.thread_time()
        self.compile()
        statistics = self.statistics
        statistics.steps += 1
        dispatched = self._dispatch(statistics.steps)
        updates, self._early = self._early, []
        while self._pending and (self._pending[0][0] < statistics.steps or not dispatched):
            updates.extend(self._read(*self._pending.popleft()[1:]))
        statistics.seconds += time.perf_counter() - begin
        statistics.host_seconds += time.thread_time() - worked
        return updates

    def _dispatch(self, step: int) -> bool:
        for pool in self._pools:
            self._admit(pool)
        wide = 1 + self.drafts
        decoding = [pool for pool in self._pools if any(o and o.slot >= 0 and o.steps_left > 0 for o in pool.owners)]
        budget = None if self.token_budget is None else self.token_budget - wide * sum(len(p.owners) for p in decoding)
        read = 0
        turn = step % len(self._pools)  # who is first when the budget is short
        for pool in (*self._pools[turn:], *self._pools[:turn]):
            pieces = 0
            while any(pool.reading):
                size = self._size_of(pool)
                if pieces if budget is None else read and read + size * self._shards > budget:
                    break
                pieces += 1
                read += size * self._shards
                self._prefill(pool, size, step)
                self._admit(pool)
        for pool in self._pools:
            running = [o for o in pool.owners if o and o.slot >= 0 and o.steps_left > 0]
            if running:
                for active in running:
                    active.steps_left -= 1
                pool.slots, news = self._programs.decode(self.params, pool.slots)
                self.statistics.decode_steps += 1
                self._expect(step, news, tuple(o if o and o.slot >= 0 else None for o in pool.owners))
                read += 1
        return read > 0

    def _admit(self, pool: _Pool) -> None:
        """Gives free slots to waiting requests, first come first served, and restores what is known of prompts."""
        for row, reader in enumerate(pool.reading):
            if not pool.queue:
                return
            slot = pool.free_slot()
            if reader is not None or slot is None:
                continue
            active = pool.queue.popleft()
            pool.reading[row] = active
            pool.owners[slot] = active
            if self._prefixes is not None:
                active.keys = self._prefixes.keys(active.tokens)
                pool.staging, active.read = self._prefixes.restore(
                    pool.staging, row, active.keys, len(active.tokens), self._put
                )
                self.statistics.reused_tokens += active.read

    def _size_of(self, pool: _Pool) -> int:
        """The size of the next call: that of the reader whose turn it is; others of the same size join it."""
        readers = [(row, reader) for row, reader in enumerate(pool.reading) if reader is not None]
        _, reader = min(readers, key=lambda item: (item[1].id, item[0]))
        return next_chunk(len(reader.tokens) - reader.read, self.chunks)

    def _prefill(self, pool: _Pool, size: int, step: int) -> None:
        rows = [
            reader if reader is not None and next_chunk(len(reader.tokens) - reader.read, self.chunks) == size else None
            for reader in pool.reading
        ]
        pool.staging, news = self._programs.prefill(self.params, pool.staging, self._inputs(rows, size))
        self.statistics.prefill_calls += 1
        owners: list[_Active | None] = [None] * len(rows)
        for row, active in enumerate(rows):
            if active is None:
                continue
            begin, active.read = active.read, min(active.read + size, len(active.tokens))
            self.statistics.prompt_tokens += active.read - begin
            if self._prefixes is not None and active.read - begin == self.chunks[0]:
                self._prefixes.keep(pool.staging, row, active.keys[: active.read // self.chunks[0]], self._put)
            if active.read == len(active.tokens):
                slot = pool.owners.index(active)
                pool.slots = self._programs.insert(
                    pool.slots, pool.staging, self._put(np.int32(row)), self._put(np.int32(slot))
                )
                active.slot = slot
                pool.reading[row] = None
                owners[row] = active
        if any(owners):
            self._expect(step, news, tuple(owners))

    def _inputs(self, rows: Sequence[_Active | None], size: int) -> dict[str, Any]:
        count = len(rows)
        tokens = np.zeros((count, size), np.int32)
        lengths, start = np.zeros(count, np.int32), np.zeros(count, np.int32)
        ends, forced = np.zeros(count, bool), np.full(count, -1, np.int32)
        for row, active in enumerate(rows):
            if active is None:
                continue
            piece = active.tokens[active.read : active.read + size]
            tokens[row, : len(piece)] = piece
            lengths[row], start[row] = len(piece), active.read
            ends[row] = active.read + len(piece) == len(active.tokens)
            if ends[row] and active.request.generated:
                forced[row] = active.request.generated[-1]
        requests = [None if active is None else active.request for active in rows]
        settings = request_rows(requests, self.model.config.eos_token_id)
        return self._put(
            {"tokens": tokens, "lengths": lengths, "start": start, "ends": ends, "forced": forced, "rows": settings}
        )

    def _put(self, tree: Any) -> Any:
        """Host arrays as arguments of the compiled programs: equal on every process of a mesh."""
        if self._replicated is None:
            return tree
        sharding = self._replicated
        return jax.tree.map(lambda a: jax.make_array_from_callback(np.shape(a), sharding, lambda i: a[i]), tree)

    def _expect(self, step: int, news: News, owners: tuple[_Active | None, ...]) -> None:
        for array in jax.tree.leaves(news):
            array.copy_to_host_async()
        self._pending.append((step, news, owners))

    # --- reading --------------------------------------------------------------------------------------------------

    def _read(self, news: News, owners: Sequence[_Active | None]) -> Iterator[Update]:
        told = np.asarray(news.tokens)
        logprobs = None
        if news.logprobs is not None and any(o and o.request.logprobs is not None for o in owners):
            logprobs = [np.asarray(array) for array in news.logprobs]
        now = time.perf_counter()
        for row, (active, values) in enumerate(zip(owners, told.tolist(), strict=True)):
            number, status, accepted = values[:HEADER]
            if active is None or active.finished or (number == 0 and status != NOT_FINITE):
                continue
            if status == NOT_FINITE:
                yield self._end(active, Update(active.id, (), "error", error=NOT_FINITE_ERROR))
                continue
            if active.new_tokens:
                self.statistics.row_steps += 1
                self.statistics.accepted_drafts += accepted
                self.statistics.proposed_drafts += self.drafts
            elif not active.first:
                active.first = now
                self.statistics.first_tokens += 1
                self.statistics.first_token_seconds += now - active.submitted
            yield self._update(active, values[HEADER : HEADER + number], status, _logprobs(active, logprobs, row))

    def _update(self, active: _Active, tokens: list[int], status: int, logprobs) -> Update:
        reason: str | None = None
        stopped_by: str | int | None = None
        if status != RUNNING:
            stops = (self.model.config.eos_token_id, *active.request.stop_ids)
            reason = "stop" if tokens[-1] in stops else "length"
            stopped_by = tokens[-1] if reason == "stop" else None
        if active.stop is not None and (found := active.stop.push(tokens)) is not None:
            count, stopped_by = found
            if status == RUNNING:
                self._release(active)
            tokens, reason = tokens[:count], "stop"
        active.new_tokens += len(tokens)
        self.statistics.new_tokens += len(tokens)
        kept = None if logprobs is None else logprobs[: len(tokens)]
        update = Update(active.id, tuple(tokens), reason, kept, stopped_by)
        return update if reason is None else self._end(active, update)

    def _end(self, active: _Active, update: Update) -> Update:
        active.finished = True
        del self._active[active.id]
        self.statistics.requests += 1
        if active.new_tokens > 1:
            self.statistics.sequence_seconds += time.perf_counter() - active.first
            self.statistics.sequence_tokens += active.new_tokens - 1
        for pool in self._pools:
            pool.owners = [None if owner is active else owner for owner in pool.owners]
            pool.reading = [None if reader is active else reader for reader in pool.reading]
            if active in pool.queue:
                pool.queue.remove(active)
        return update

    def _release(self, active: _Active) -> None:
        """Stops a row on the device that would go on."""
        for pool in self._pools:
            if active.slot >= 0 and active in pool.owners:
                pool.slots = self._programs.release(pool.slots, self._put(np.int32(active.slot)))


def _logprobs(active: _Active, arrays, row: int) -> tuple[TokenLogprob, ...] | None:
    wanted = active.request.logprobs
    if wanted is None or arrays is None:
        return None
    chosen, ids, best = (array[row] for array in arrays)
    return tuple(
        TokenLogprob(float(value), tuple(zip(top[:wanted].tolist(), scores[:wanted].tolist(), strict=True)))
        for value, top, scores in zip(chosen, ids, best, strict=True)
    )


def check_drafts(model: Model, drafts: int) -> None:
    """Raises ``ValueError`` if ``model`` cannot draft ``drafts`` tokens per step."""
    if drafts < 0:
        raise ValueError(f"drafts: expected 0 or more, found {drafts}")
    if drafts and model.config.drafter == "dspark":
        raise ValueError(
            "drafts: this checkpoint brings a DSpark drafter, whose structure is not documented, so it is not run; "
            "the main model runs without drafts"
        )
    if drafts and not model.drafts:
        raise ValueError("drafts: this checkpoint has no MTP block to draft with; run it without drafts")
