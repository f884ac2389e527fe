"""State shared by the endpoints: the served model, its engine, the running requests and their shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import format_exception
from typing import TYPE_CHECKING, Literal, TypeVar

import fastllama
from fastllama.errors import QueueFullError, RequestError
from fastllama.serve.errors import ApiError, ClientGoneError, deadline_exceeded, from_exception, unavailable
from fastllama.serve.exchange import Exchange
from fastllama.serve.health import Canary, verdict
from fastllama.serve.jobs import Job
from fastllama.serve.keys import Keyring
from fastllama.serve.log import AccessLog
from fastllama.serve.metrics import Metrics
from fastllama.serve.model import ServedModel
from fastllama.serve.running import RunningJob

if TYPE_CHECKING:
    from fastllama.runtime.serving.async_engine import AsyncEngine
    from fastllama.runtime.serving.statistics import Snapshot

logger = logging.getLogger("fastllama")

T = TypeVar("T")
PROBES = ("/health", "/ready", "/metrics")  # polled every few seconds: only failures are logged
GRACE_SECONDS = 5.0  # after a request's deadline, which is checked between steps: then it is cut within a step
NUM_THREADS = 4  # that translate: a prompt of 4096 tokens takes 70 ms, during which short ones pass it
HUNG_SECONDS = 1.0  # for responses to requests that a hanging step keeps from ending
CUT_SECONDS = 5.0  # for responses to requests that have ended: stalled readers get no longer


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of one request: seconds of waiting and running, seconds and bytes of its body.

    all_bodies_bytes: of all bodies being read. ping_seconds: a stream without an event for this long is sent a comment,
    so that proxies do not close it.
    """

    request_seconds: float = 600.0
    body_seconds: float = 60.0
    body_bytes: int = 4 << 20
    all_bodies_bytes: int = 256 << 20
    ping_seconds: float = 15.0


class Service:
    """The service of one model, from before it is loaded until the process ends. Used on the event loop only.

    keyring: the API keys. log: the access log; None for none. canary_seconds: between two canary requests; None for
    none. closing: done once new requests are refused, to end uploads.
    """

    def __init__(
        self,
        keyring: Keyring,
        limits: ServiceLimits | None = None,
        *,
        log: AccessLog | None = None,
        canary_seconds: float | None = None,
    ) -> None:
        self.keyring, self.limits = keyring, limits or ServiceLimits()
        self.phase: Literal["loading", "ready", "draining", "down"] = "loading"
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.build = {"version": fastllama.__version__}
        self.metrics = Metrics(self._snapshot, self.build, phase=lambda: self.phase, healthy=self._is_healthy)
        self._log, self._canary_seconds = log, canary_seconds
        self._engine: AsyncEngine | None = None
        self._model: ServedModel | None = None
        self._canary: Canary | None = None
        self._asking: asyncio.Task[None] | None = None
        self.num_uploading_bytes = 0  # of bodies being read
        self._num_running = 0
        self._jobs: dict[RunningJob, asyncio.TimerHandle] = {}  # each with its deadline
        self._idle: asyncio.Future[None] | None = None
        self._is_cut = False
        self._threads = ThreadPoolExecutor(NUM_THREADS, "fastllama-translate")

    def open(self, engine: AsyncEngine, model: ServedModel) -> None:
        """Start serving: the model is loaded."""
        self._engine, self._model = engine, model
        self.build |= {"model": model.names[0], "fingerprint": model.fingerprint}
        if self._canary_seconds is not None:
            question = model.tokenizer.encode("Once upon a time")
            self._canary = Canary(engine, question, self._canary_seconds, self.metrics.observe_canary)
            self._asking = asyncio.ensure_future(self._canary.run())
        self.phase = "ready"

    @property
    def model(self) -> ServedModel:
        """The served model. Raises ApiError 503 while it is being loaded."""
        if self._model is None:
            raise self._refusal("loading")
        return self._model

    @property
    def engine(self) -> AsyncEngine:
        """The engine. Raises ApiError 503 while the model is being loaded."""
        if self._engine is None:
            raise self._refusal("loading")
        return self._engine

    @property
    def is_beyond_repair(self) -> bool:
        """Whether the engine has a permanent fault."""
        health = None if self._engine is None else self._engine.health()
        return health is not None and (health.error is not None or not health.alive)

    def verdict(self) -> tuple[int, bytes]:
        """Returns the status and the body of /health."""
        return verdict(None if self._engine is None else self._engine.health(), self._canary)

    def note(self, exchange: Exchange) -> None:
        """Record a request that has ended: metrics and access log."""
        record = exchange.record()
        self.metrics.observe_http(record.route, record.status)
        if exchange.running is not None:
            self.metrics.count_tokens(record.key, record.prompt_tokens, record.completion_tokens)
        if self._log is not None and not (record.route in PROBES and record.status == 200):
            self._log.write(record)

    def check_open(self) -> None:
        """Raise ApiError 503 unless new requests are accepted."""
        if self.phase != "ready":
            raise self._refusal(self.phase)

    def check_room(self) -> None:
        """Raise ApiError 503 unless requests are accepted, 429 if the queue is full; call before reading a body."""
        self.check_open()
        try:
            self.engine.check_room()
        except (QueueFullError, RuntimeError) as error:
            raise self.api_error(error) from None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function on another thread; if its caller is cancelled before the call begins, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def start(self, job: Job) -> RunningJob:
        """Queue a job's prompts; call `end` afterwards. If RunningJob.begin raises, raises that and queues nothing."""
        seconds = self.limits.request_seconds
        running = await self.in_thread(partial(RunningJob.begin, self.engine, job, seconds))
        if self._is_cut:  # meanwhile
            running.close()
            raise self._refusal("draining")
        loop = asyncio.get_running_loop()
        self._jobs[running] = loop.call_later(seconds + GRACE_SECONDS, running.cut, deadline_exceeded())
        return running

    def end(self, running: RunningJob) -> None:
        """End a job that is no longer read: abort its unfinished requests."""
        self._jobs.pop(running).cancel()
        running.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts a request, for which a drain waits. Raises ApiError, as `check_open` and for exceptions inside."""
        self.check_open()
        self._num_running += 1
        try:
            yield
        except ClientGoneError:
            raise
        except Exception as error:
            raise self.api_error(error) from error
        finally:
            self._num_running -= 1
            if self._idle is not None and not self._num_running and not self._idle.done():
                self._idle.set_result(None)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait this long for running ones to end, then abort the rest."""
        if self.phase == "ready":
            self.phase = "draining"
        self._refuse_uploads()
        if not await self._all_end(seconds):
            self._is_cut = True
            self.engine.abort_all("the server shuts down")
            if not await self._all_end(CUT_SECONDS):  # a step that hangs, or readers that stall
                for running in self._jobs:
                    running.cut(self._refusal("draining"))
                await self._all_end(HUNG_SECONDS)

    async def go_down(self) -> None:
        """Refuse all requests after a permanent fault, and wait until running ones have got their errors."""
        self.phase = "down"
        self._refuse_uploads()
        await self._all_end(CUT_SECONDS)

    def close(self) -> None:
        """Stop the canary and the threads, without waiting for them."""
        if self._asking is not None:
            self._asking.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _refuse_uploads(self) -> None:
        if not self.closing.done():
            self.closing.set_result(None)

    async def _all_end(self, seconds: float) -> bool:
        """Wait this long for all running requests; returns whether they have ended."""
        if self._num_running:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._idle,), timeout=seconds)
        return not self._num_running

    def api_error(self, error: Exception) -> ApiError:
        """Returns the API error for an exception that a request raised."""
        if isinstance(error, RequestError) and error.reason == "deadline":
            return deadline_exceeded()
        if isinstance(error, RequestError) and error.reason == "abort" and self._is_cut:
            return self._refusal("draining")
        is_refused = isinstance(error, RuntimeError) and not isinstance(error, (RequestError, QueueFullError))
        if is_refused and self.is_beyond_repair:
            return self._refusal("down")
        failure = from_exception(error)
        if failure.status == 500:
            logger.error("a request failed: %s", error if isinstance(error, RequestError) else _traceback(error))
        return failure

    def _snapshot(self) -> Snapshot | None:
        return None if self._engine is None else self._engine.statistics()

    def _is_healthy(self) -> bool:
        return self.verdict()[0] == 200

    def _refusal(self, phase: str) -> ApiError:
        if phase == "loading":
            return unavailable("loading", "the model is being loaded; try again in a few seconds", seconds=5)
        if phase == "draining":
            return unavailable("shutting_down", "this server is shutting down; try again", seconds=1)
        return unavailable("engine_down", "the engine has failed, and this server shuts down; try again", seconds=10)


def _traceback(error: Exception) -> str:
    """Formats an exception that the engine has not logged; the command's log shows messages only."""
    return "".join(format_exception(error))
