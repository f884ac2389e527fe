"""The thread that runs an engine for an AsyncEngine."""

from __future__ import annotations

import concurrent.futures
import itertools
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal

from fastllama.errors import QueueFullError, RequestError
from fastllama.runtime.calls import check_request_id
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.sequence import Request
from fastllama.runtime.prompts import Prepared
from fastllama.runtime.serving.mailbox import wake
from fastllama.runtime.serving.order import Order
from fastllama.runtime.serving.statistics import Health, Snapshot, Statistics

BEYOND_REPAIR = 8  # faults of the bookkeeping in a row after which the engine ends; it restarts after each earlier one


class Worker:
    """Owns an engine and runs it on a thread of its own, until it is ended. Does not know its AsyncEngine.

    max_queue_size: requests that may wait to be scheduled. engine: None after the thread has ended.
    """

    def __init__(self, engine: Engine, max_queue_size: int) -> None:
        self.max_queue_size = max_queue_size
        self.orders: dict[str, Order] = {}  # unfinished ones by id; changed under the lock
        self.engine: Engine | None = engine
        # Each is called by the thread; None ends it. A SimpleQueue's put is reentrant, as a call from __del__ needs.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Guards the orders and all below, up to the ids. Reentrant: garbage collection may call `end` inside.
        self._lock = threading.RLock()
        self._refusal: str | None = None  # why new requests are refused
        self._stopped = False  # later commands are not executed
        self._num_queued = 0
        self._ids = map(str, itertools.count())
        self._statistics = Statistics()
        self._by_generation: dict[Generation, Order] = {}
        self._drains: list[concurrent.futures.Future[None]] = []
        self._num_preemptions = self._num_host_hit_tokens = 0
        self._first_drafts = engine.num_drafts
        self._step_start: float | None = None
        self._num_faults = 0  # of the bookkeeping, in a row
        self._broken: BaseException | None = None
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "fastllama-tokenizer")
        self.thread = threading.Thread(target=self._run, args=(engine,), name="fastllama-engine", daemon=True)
        self._access = engine.access
        self._access.claim(self.thread, partial(self.end, "the LLM was closed"))
        try:
            self.thread.start()
        except BaseException:  # no more threads, or Ctrl-C, after which it may run
            self.end("it was not started")
            self._access.give_up()
            raise

    # Methods for any thread.

    def add(self, order: Order, given: Prepared | Callable[[], Prepared]) -> None:
        """Queue a request, or a callable that prepares it on another thread. Raises what AsyncEngine raises."""
        self._accept(order)
        if isinstance(given, Prepared):
            self._commands.put(partial(self._add, order, given))
        else:
            self._commands.put(self._expire)  # so that the thread sees its deadline
            with suppress(RuntimeError):  # the thread has ended meanwhile, and with it the order
                self._tokenizing.submit(self._prepare, order, given)

    def check_room(self) -> None:
        """Raise QueueFullError, and count it, if max_queue_size requests wait."""
        with self._statistics.lock:
            self._check_room()

    def fork(self, origin: Order, order: Order, params: SamplingParams | None) -> None:
        """Queue a fork of a request."""
        self._accept(order)
        self._commands.put(partial(self._fork, origin, order, params))

    def new_id(self) -> str:
        """Returns an id that no unfinished request has."""
        engine = self.engine
        return next(
            number
            for number in self._ids
            if number not in self.orders and (engine is None or engine.find(number) is None)
        )

    def leave(self, order: Order) -> None:
        """Abort a request whose stream is no longer read. May be called from anywhere, __del__ too."""
        if not order.ended:
            self._commands.put(partial(self._abort, order, "its stream was closed"))

    def abort(self, request_id: str, why: str) -> None:
        """End the request of this id, if there is one."""
        order = self.orders.get(request_id)
        if order is not None:
            self._commands.put(partial(self._abort, order, why))

    def abort_all(self, why: str) -> None:
        """End all requests queued so far."""
        with self._lock:
            self._commands.put(partial(self._abort_each, list(self.orders.values()), why))

    def call(self, function: Callable[[Engine], None]) -> concurrent.futures.Future[None]:
        """Call a function with the engine between two steps; the future gets its exception, if any."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._check_open()
            self._commands.put(partial(self._call, function, done))
        return done

    def drain(self) -> concurrent.futures.Future[None]:
        """Refuse new requests; the future is done when all others have ended."""
        drained: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._refusal = self._refusal or "drains"
            if self._stopped:
                drained.set_result(None)
            else:
                self._commands.put(partial(self._drains.append, drained))
        return drained

    def end(self, why: str) -> None:
        """Abort all requests, refuse new ones, and end the thread. May be called twice, and in a forked process."""
        if self._access.forked:
            return
        with self._lock:
            if not self._stopped:
                self._refusal, self._stopped = "was shut down", True
                self._commands.put(partial(self._abort_each, list(self.orders.values()), why))
                self._commands.put(None)

    def health(self) -> Health:
        """See AsyncEngine.health."""
        engine, start = self.engine, self._step_start
        return Health(
            alive=self.thread.is_alive(),
            step_seconds=None if start is None else time.monotonic() - start,
            failures_in_a_row=max(self._num_faults, 0 if engine is None else engine.failures_in_a_row),
            error=None if self._broken is None else repr(self._broken),
        )

    def snapshot(self) -> Snapshot:
        """Counters and histograms up to now."""
        engine = self.engine
        with self._statistics.lock:
            return self._statistics.snapshot(
                num_queued=self._num_queued,
                num_running=0 if engine is None else engine.scheduler.num_running,
                num_pages=0 if engine is None else engine.pool.num_pages,
                num_available_pages=0 if engine is None else engine.pool.num_available,
            )

    def _accept(self, order: Order) -> None:
        with self._lock, self._statistics.lock:
            self._check_open()
            check_request_id(order.request_id, self.orders)
            self._check_room()
            self._statistics.num_accepted += 1
            self._num_queued += 1
            self.orders[order.request_id] = order

    def _check_room(self) -> None:
        """Under the statistics' lock."""
        if self._num_queued >= self.max_queue_size:
            self._statistics.num_rejected += 1
            raise QueueFullError(f"{self._num_queued} requests wait; legal: at most max_queue_size")

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise RuntimeError(f"this AsyncEngine {self._refusal}; make a new one")

    def _prepare(self, order: Order, prepare: Callable[[], Prepared]) -> None:
        """Tokenize a prompt, on the tokenizer's thread."""
        try:
            self._commands.put(partial(self._add, order, prepare()))
        except BaseException as error:
            self._commands.put(partial(self._end, order, error))

    # Methods for the engine's thread.

    def _run(self, engine: Engine) -> None:
        try:
            while self._turn(engine):
                pass
        except BaseException as error:  # while ending requests after a fault
            self._refuse_for(error)
            raise
        finally:
            with self._lock:
                self._stopped = True
            self.engine = None
            self._tokenizing.shutdown(wait=False, cancel_futures=True)
            for order in list(self.orders.values()) if self._broken is not None else ():
                self._end(order, self._broken)
            self._abort_each(list(self.orders.values()), "the engine has ended")
            while not self._commands.empty():
                if (command := self._commands.get()) is not None:
                    command()
            self._resolve_drains()
            self._access.give_up()

    def _refuse_for(self, error: BaseException) -> None:
        """Refuse new requests because of a permanent fault."""
        with self._lock:
            self._broken, self._refusal = error, f"has failed permanently: {error!r}"

    def _turn(self, engine: Engine) -> bool:
        """Execute pending commands and one step. Returns False if that was the last."""
        going = True
        try:
            going = self._run_commands(engine)
            self._expire()
            self._step_start = time.monotonic()
            if self._advance(engine):
                self._num_faults = 0
        except BaseException as error:  # of the bookkeeping: it may concern any request
            self._num_faults += 1
            if self._num_faults == BEYOND_REPAIR:
                self._broken = error
            self._fail_all(engine, error)
        finally:
            self._step_start = None
        self._broken = self._broken or engine.device_error
        if self._broken is not None:
            self._refuse_for(self._broken)
            self._fail_all(engine, self._broken)
            return False
        if not self.orders:
            self._resolve_drains()
        return going

    def _resolve_drains(self) -> None:
        while self._drains:
            if (drained := self._drains.pop()).set_running_or_notify_cancel():
                drained.set_result(None)

    def _run_commands(self, engine: Engine) -> bool:
        """Execute pending commands; waits for one if the engine is idle. Returns False if the thread is to end."""
        idle = not engine.has_work and not (self._drains and not self.orders)
        while True:
            try:
                command = self._commands.get(block=idle, timeout=self._patience() if idle else None)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = False

    def _patience(self) -> float | None:
        """Seconds until the earliest deadline of a request being tokenized; None without one."""
        deadlines = [order.deadline for order in list(self.orders.values()) if order.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _add(self, order: Order, given: Prepared) -> None:
        if order.ended or self.engine is None:  # while it was tokenized
            return
        try:
            generation = self.engine.add(given, arrival=order.arrival, request_id=order.request_id)
        except BaseException as error:
            self._end(order, error)
            if not isinstance(error, (TypeError, ValueError)):  # a fault
                raise
        else:
            self._added(order, generation)

    def _fork(self, origin: Order, order: Order, params: SamplingParams | None) -> None:
        if origin.generation is None and not origin.ended:
            origin.on_added.append(partial(self._fork, origin, order, params))
            return
        if order.ended or self.engine is None:
            return
        try:
            if origin.generation is None:
                raise ValueError(f"request {origin.request_id!r} has ended; legal: an unfinished one")
            generation = self.engine.fork(origin.generation, params, request_id=order.request_id)
        except ValueError as error:
            self._end(order, error)
        else:
            self._added(order, generation)

    def _added(self, order: Order, generation: Generation) -> None:
        order.generation = generation
        self._by_generation[generation] = order
        while order.on_added:
            order.on_added.pop(0)()

    def _call(self, function: Callable[[Engine], None], done: concurrent.futures.Future[None]) -> None:
        if not done.set_running_or_notify_cancel():  # its caller no longer waits
            return
        try:
            if self.engine is None:
                raise RuntimeError("this AsyncEngine has ended; make a new one")
            function(self.engine)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _abort(self, order: Order, why: str, reason: Literal["abort", "deadline"] = "abort") -> None:
        if order.ended:
            return
        if order.generation is None or reason == "abort":
            order.failure = RequestError(f"request {order.request_id!r} was aborted: {why}", reason=reason)
        if order.generation is not None and self.engine is not None:
            self.engine.abort(order.generation, reason)
            wake([order.publish(self._statistics)])
        self._end(order)

    def _abort_each(self, orders: list[Order], why: str) -> None:
        for order in orders:
            self._abort(order, why)

    def _expire(self) -> None:
        now = time.monotonic()
        for order in list(self.orders.values()):
            if order.deadline is not None and order.deadline <= now:
                self._abort(order, "its deadline has passed", "deadline")

    def _advance(self, engine: Engine) -> bool:
        """Run one step and send its output; returns whether it changed anything."""
        touched = engine.step()
        for order in self._by_generation.values():
            if not order.begun and order.generation is not None:
                request = order.generation.request
                if request.first_scheduled is not None:
                    self._begin(order, request, request.first_scheduled)
        readers = []
        for order in [self._by_generation[each] for each in touched if each in self._by_generation]:
            readers.append(order.publish(self._statistics))
            if order.generation is not None and order.generation.finished:
                self._end(order)
        with self._statistics.lock:
            seen, self._num_preemptions = self._num_preemptions, engine.scheduler.num_preemptions
            self._statistics.num_preemptions += max(0, self._num_preemptions - seen)
            seen, self._num_host_hit_tokens = self._num_host_hit_tokens, engine.pool.num_host_hit_tokens
            self._statistics.num_host_hit_tokens += max(0, self._num_host_hit_tokens - seen)
            drafted, accepted = engine.num_drafts
            self._statistics.num_draft_tokens = drafted - self._first_drafts[0]
            self._statistics.num_accepted_tokens = accepted - self._first_drafts[1]
        wake(readers)
        return bool(touched)

    def _begin(self, order: Order, request: Request, begun: float) -> None:
        self._leave_queue(order)
        with self._statistics.lock:
            self._statistics.queue_seconds.observe(begun - order.arrival)
            self._statistics.num_prompt_tokens += len(request.prompt_token_ids)
            self._statistics.num_cached_tokens += request.num_cached_tokens or 0

    def _leave_queue(self, order: Order) -> None:
        if not order.begun:
            order.begun = True
            with self._lock:
                self._num_queued -= 1

    def _end(self, order: Order, error: BaseException | None = None) -> None:
        """Drop a request; error: what it failed with."""
        if order.ended:
            return
        generation = order.generation
        if generation is not None:
            self._by_generation.pop(generation, None)
            error = error or generation.error
        self._leave_queue(order)
        with self._lock:
            self.orders.pop(order.request_id, None)
        with self._statistics.lock:
            self._statistics.request_seconds.observe(time.monotonic() - order.arrival)
            self._statistics.num_failed += error is not None
        order.end(error)
        while order.on_added:
            order.on_added.pop(0)()

    def _fail_all(self, engine: Engine, error: BaseException) -> None:
        """End every request with this error."""
        for order in list(self.orders.values()):
            if order.generation is not None:
                with suppress(Exception):  # the engine restarts itself, and may raise for each request
                    engine.abort(order.generation)
            self._end(order, error)
