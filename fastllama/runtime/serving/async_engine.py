"""The asyncio face: requests from any number of tasks, answered by one thread that owns the engine."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import abc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from fastllama.errors import QueueFullError, check_range
from fastllama.io.chat import Message
from fastllama.runtime.generation import Generation
from fastllama.runtime.llm import LLM
from fastllama.runtime.outputs import CompletionOutput, FinishReason, RequestDelta
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.serving.mailbox import Mailbox, wake
from fastllama.runtime.serving.statistics import Snapshot, Statistics


@dataclass
class _Told:
    """What the reader of a request has been sent of one sample."""

    num_tokens: int = 0
    num_logprobs: int = 0
    time: float = 0.0  # of its last token
    finished: bool = False


@dataclass(eq=False)
class _Order:
    """A request between its reader and the engine; all but the mailbox belongs to the engine's thread."""

    prompt_token_ids: tuple[int, ...]
    prompt: str | None
    params: SamplingParams
    arrival: float
    deadline: float | None
    mailbox: Mailbox = field(default_factory=Mailbox)
    generation: Generation | None = None
    begun: bool = False
    told: dict[int, _Told] = field(default_factory=dict)


class RequestStream:
    """The deltas of one request, for one task: `async for delta in stream`.

    To close it, to cancel the task that waits for its next delta, or to let go of it aborts the request. What came
    while nobody read is one delta.
    Raises RequestError, with its cause, where the request failed.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        self._mailbox, self._abort = mailbox, abort
        self._closed = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        while not self._closed:
            reader = asyncio.get_running_loop().create_future()
            delta = self._mailbox.take(reader)
            if delta is not None:
                return delta
            try:
                await reader
            except asyncio.CancelledError:
                self.close()
                raise
        raise StopAsyncIteration

    def close(self) -> None:
        """Abort the request, if it has not ended; nothing more is read. May be called twice."""
        self._closed = True
        wake([self._mailbox.end()])
        self._abort()

    async def aclose(self) -> None:
        """The same, for contextlib.aclosing."""
        self.close()

    def __del__(self) -> None:
        self._abort()


class AsyncEngine:
    """Serves an LLM to asyncio: any task of any loop adds requests, one thread of its own runs them all together.

    llm: nobody else uses it until the engine is shut down; it stays open.
    max_queue_size: requests that may wait until they begin; those that come beside them are rejected.

    A request that raises ends by itself: the others go on, and its pages come back. Nobody who does not read slows
    the others down: deltas that nobody has read are one. `async with` shuts down at its end.
    """

    def __init__(self, llm: LLM, *, max_queue_size: int = 1024) -> None:
        check_range("max_queue_size", max_queue_size, 1)
        self._llm, self._engine = llm, llm.engine
        self.max_queue_size = max_queue_size
        # Each is called by the engine's thread; None ends it. Its put may interrupt itself, as __del__ can.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the three below
        self._refusal: str | None = None
        self._stopped = False
        self._num_queued = 0
        self._statistics = Statistics()
        self._orders: dict[Generation, _Order] = {}
        self._drains: list[asyncio.Future[None]] = []
        self._num_preemptions = self._num_host_hit_tokens = 0
        self._first_drafts = self._drafts()
        self._thread = threading.Thread(target=self._run, name="fastllama-engine", daemon=True)
        self._thread.start()

    def add_request(
        self,
        prompt: str | abc.Sequence[int] | abc.Sequence[Message],
        params: SamplingParams | None = None,
        *,
        deadline: float | None = None,
    ) -> RequestStream:
        """Queue a prompt: a text, token ids, or the messages of a chat.

        deadline: seconds from now, after which what has not finished does with "deadline", between two steps.
        Raises at once, and queues nothing: QueueFullError if max_queue_size requests wait, ValueError or TypeError for
        what can never run, RuntimeError when the engine drains or was shut down.
        """
        arrival = time.monotonic()
        if params is None:
            params = self._llm.default_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {params!r:.99}; legal: SamplingParams")
        if deadline is not None:
            check_range("deadline", deadline, 0)
            deadline += arrival
        ids, params = self._llm.prepare(prompt, params)
        self._engine.check_request(ids, params)
        order = _Order(tuple(ids), prompt if isinstance(prompt, str) else None, params, arrival, deadline)
        with self._lock, self._statistics.lock:
            if self._refusal is not None:
                raise RuntimeError(f"this AsyncEngine {self._refusal}; make a new one")
            if self._num_queued >= self.max_queue_size:
                self._statistics.num_rejected += 1
                raise QueueFullError(f"{self._num_queued} requests wait; legal: at most max_queue_size")
            self._statistics.num_accepted += 1
            self._num_queued += 1
            self._commands.put(partial(self._add, order))
        return RequestStream(order.mailbox, partial(self._commands.put, partial(self._abort, order)))

    def abort_all(self) -> None:
        """End all requests that were added before, with "abort"."""
        self._commands.put(self._abort_every)

    async def drain(self) -> None:
        """Refuse new requests from now on, and wait until all others have ended. May be called twice."""
        drained = asyncio.get_running_loop().create_future()
        with self._lock:
            self._refusal = self._refusal or "drains"
            if self._stopped:
                return
            self._commands.put(partial(self._drains.append, drained))
        await drained

    async def shutdown(self) -> None:
        """Abort all requests, refuse new ones, and end the thread. May be called twice."""
        with self._lock:
            self._refusal = "was shut down"
            if not self._stopped:
                self._stopped = True
                self._commands.put(self._abort_every)
                self._commands.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    def statistics(self) -> Snapshot:
        """Counters and histograms up to now. Any thread may ask."""
        pool, scheduler = self._engine.pool, self._engine.scheduler
        with self._statistics.lock:
            return self._statistics.snapshot(
                num_queued=self._num_queued,
                num_running=scheduler.num_running,
                num_pages=pool.num_pages,
                num_available_pages=pool.num_available,
            )

    # From here on: the engine's thread.

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._obey()
                self._expire()
                self._advance()
            except BaseException as error:  # in the bookkeeping: which requests it is about, nobody knows
                self._fail_all(error)
            if not self._orders:
                wake(self._drains)
                self._drains.clear()

    def _obey(self) -> bool:
        """Do what was commanded, and wait for it where there is nothing else to do. False if that is to end."""
        idle = not self._engine.has_work and not self._drains
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = False

    def _add(self, order: _Order) -> None:
        try:
            order.generation = self._engine.add_request(
                order.prompt_token_ids, order.params, prompt=order.prompt, arrival=order.arrival
            )
        except BaseException as error:
            self._end(order, error)
            raise
        self._orders[order.generation] = order

    def _abort(self, order: _Order, reason: FinishReason = "abort") -> None:
        if order.generation in self._orders:
            self._engine.abort(order.generation, reason)
            wake([self._tell(order)])

    def _abort_every(self) -> None:
        for order in list(self._orders.values()):
            self._abort(order)

    def _expire(self) -> None:
        now = time.monotonic()
        for order in [order for order in self._orders.values() if order.deadline is not None and order.deadline <= now]:
            self._abort(order, "deadline")

    def _advance(self) -> None:
        """One step, and its tidings."""
        start = time.monotonic()
        touched = self._engine.step(isolate=True)
        for order in self._orders.values():
            if not order.begun and order.generation is not None:
                num_cached = order.generation.request.num_cached_tokens
                if num_cached is not None:
                    self._begin(order, start, num_cached)
        readers = [self._tell(self._orders[generation]) for generation in touched if generation in self._orders]
        with self._statistics.lock:
            seen, self._num_preemptions = self._num_preemptions, self._engine.scheduler.num_preemptions
            self._statistics.num_preemptions += max(0, self._num_preemptions - seen)
            seen, self._num_host_hit_tokens = self._num_host_hit_tokens, self._engine.pool.num_host_hit_tokens
            self._statistics.num_host_hit_tokens += max(0, self._num_host_hit_tokens - seen)
            drafted, accepted = self._drafts()
            self._statistics.num_draft_tokens = drafted - self._first_drafts[0]
            self._statistics.num_accepted_tokens = accepted - self._first_drafts[1]
        wake(readers)

    def _drafts(self) -> tuple[int, int]:
        """Draft tokens verified, and those accepted, since the LLM was made: these no engine counts anew."""
        speculation = self._engine.speculation
        return (0, 0) if speculation is None else (speculation.num_drafted, speculation.num_accepted)

    def _begin(self, order: _Order, start: float, num_cached: int) -> None:
        self._leave_queue(order)
        with self._statistics.lock:
            self._statistics.queue_seconds.observe(start - order.arrival)
            self._statistics.num_prompt_tokens += len(order.prompt_token_ids)
            self._statistics.num_cached_tokens += num_cached

    def _leave_queue(self, order: _Order) -> None:
        if not order.begun:
            order.begun = True
            with self._lock:
                self._num_queued -= 1

    def _tell(self, order: _Order) -> asyncio.Future[None] | None:
        """Put what a request gained into its mailbox; the reader to wake."""
        generation = order.generation
        assert generation is not None
        now, statistics, first = time.monotonic(), self._statistics, not order.told
        pieces = []
        with statistics.lock:
            for seq in generation.request.sequences:
                piece = self._piece(order, generation, seq, now)
                if piece is not None:
                    pieces.append(piece)
            if first and generation.first_token_time is not None:
                statistics.first_token_seconds.observe(generation.first_token_time - order.arrival)
        prompt_logprobs = generation.all_prompt_logprobs() if first else None
        metrics = generation.metrics() if generation.finished and generation.error is None else None
        reader = order.mailbox.put(pieces, prompt_logprobs=prompt_logprobs, metrics=metrics)
        if generation.finished:
            self._end(order, generation.error)
        return reader

    def _end(self, order: _Order, error: BaseException | None = None) -> None:
        """Forget a request; an error is what it failed with, and wakes its reader."""
        if order.generation is not None:
            del self._orders[order.generation]
        self._leave_queue(order)
        with self._statistics.lock:
            self._statistics.request_seconds.observe(time.monotonic() - order.arrival)
            self._statistics.num_failed += error is not None
        if error is not None:
            wake([order.mailbox.end(error)])

    def _piece(self, order: _Order, generation: Generation, seq: Sequence, now: float) -> CompletionOutput | None:
        """What one sample gained; None if that is nothing. How a request ended that raised, its error says."""
        sample, told = generation.sample(seq), order.told.setdefault(seq.index, _Told())
        token_ids = tuple(seq.token_ids[seq.num_prompt_tokens + told.num_tokens :])
        logprobs = tuple(sample.logprobs[told.num_logprobs :])
        text = sample.stream.take() if sample.stream is not None else ""
        ends = seq.finish_reason is not None and not told.finished
        if ends:
            self._statistics.num_finished[seq.finish_reason or "abort"] += 1
        if token_ids:
            self._statistics.num_generated_tokens += len(token_ids)
            if told.num_tokens:
                count = len(token_ids)
                self._statistics.inter_token_seconds.observe((now - told.time) / count, times=count)
            told.time = now
        told.num_tokens += len(token_ids)
        told.num_logprobs += len(logprobs)
        told.finished = told.finished or ends
        shows_end = ends and generation.error is None
        if not (token_ids or text or shows_end):
            return None
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            finish_reason=seq.finish_reason if shows_end else None,
            stop_reason=seq.stop_reason if shows_end else None,
            logprobs=logprobs if order.params.logprobs is not None else None,
        )

    def _fail_all(self, error: BaseException) -> None:
        """End every request with this cause."""
        for generation, order in list(self._orders.items()):
            with suppress(Exception):  # the engine mends itself, and each of its requests may have a fault in this
                self._engine.abort(generation)
            self._end(order, error)
