"""What the endpoints share: the model that is served, how a request runs on its engine, and how all of it ends."""

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
PROBES = ("/health", "/ready", "/metrics")  # asked for every few seconds: only what goes wrong is logged
GRACE_SECONDS = 5.0  # beyond a request's deadline, which acts between steps, until it is ended during one
NUM_THREADS = 4  # that translate: a long prompt is 70 ms for a context of 4096 tokens, in which short ones pass it
HUNG_SECONDS = 1.0  # for what a step keeps from its end to be told so
CUT_SECONDS = 5.0  # for what has ended to be told so: readers that stall get no longer


@dataclass(frozen=True)
class ServiceLimits:
    """What one request may take: seconds of running and waiting, seconds and bytes of its body.

    all_bodies_bytes: of the bodies that are being read at a time. ping_seconds: a stream without an event for so long
    is sent a comment, so that no proxy takes it for dead.
    """

    request_seconds: float = 600.0
    body_seconds: float = 60.0
    body_bytes: int = 4 << 20
    all_bodies_bytes: int = 256 << 20
    ping_seconds: float = 15.0


class Service:
    """One model, from before it is loaded until the process ends. The event loop's, but for what says otherwise.

    keyring: who may ask. log: where a line is written for each request; None for nowhere. canary_seconds: between two
    questions of the canary; None for none. closing: done once new requests are refused, for those that are uploaded.
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
        self.num_uploading_bytes = 0  # of bodies that are being read
        self._num_running = 0
        self._jobs: dict[RunningJob, asyncio.TimerHandle] = {}  # each with its deadline
        self._idle: asyncio.Future[None] | None = None
        self._is_cut = False
        self._threads = ThreadPoolExecutor(NUM_THREADS, "fastllama-translate")

    def open(self, engine: AsyncEngine, model: ServedModel) -> None:
        """The model is loaded."""
        self._engine, self._model = engine, model
        self.build |= {"model": model.names[0], "fingerprint": model.fingerprint}
        if self._canary_seconds is not None:
            question = model.tokenizer.encode("Once upon a time")
            self._canary = Canary(engine, question, self._canary_seconds, self.metrics.observe_canary)
            self._asking = asyncio.ensure_future(self._canary.run())
        self.phase = "ready"

    @property
    def model(self) -> ServedModel:
        """Raises ApiError 503 while it is being loaded."""
        if self._model is None:
            raise self._refusal("loading")
        return self._model

    @property
    def engine(self) -> AsyncEngine:
        """Raises ApiError 503 while the model is being loaded."""
        if self._engine is None:
            raise self._refusal("loading")
        return self._engine

    @property
    def is_beyond_repair(self) -> bool:
        """Whether the engine, which is there, will never run anything again."""
        health = None if self._engine is None else self._engine.health()
        return health is not None and (health.error is not None or not health.alive)

    def verdict(self) -> tuple[int, bytes]:
        """Status and body of /health."""
        return verdict(None if self._engine is None else self._engine.health(), self._canary)

    def note(self, exchange: Exchange) -> None:
        """A request is over: count it, and write its line."""
        record = exchange.record()
        self.metrics.observe_http(record.route, record.status)
        if exchange.running is not None:
            self.metrics.count_tokens(record.key, record.prompt_tokens, record.completion_tokens)
        if self._log is not None and not (record.route in PROBES and record.status == 200):
            self._log.write(record)

    def check_open(self) -> None:
        """Raise ApiError 503 unless new requests are taken."""
        if self.phase != "ready":
            raise self._refusal(self.phase)

    def check_room(self) -> None:
        """Raise ApiError 503 unless new requests are taken, 429 where the queue is full: nothing is read in vain."""
        self.check_open()
        try:
            self.engine.check_room()
        except (QueueFullError, RuntimeError) as error:
            raise self.told(error) from None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call it on another thread; what waits for one when its caller is cancelled is never called."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def start(self, job: Job) -> RunningJob:
        """Queue its prompts; `end` is to be called. Raises what RunningJob.begin does, and then nothing was queued."""
        seconds = self.limits.request_seconds
        running = await self.in_thread(partial(RunningJob.begin, self.engine, job, seconds))
        if self._is_cut:  # meanwhile
            running.close()
            raise self._refusal("draining")
        loop = asyncio.get_running_loop()
        self._jobs[running] = loop.call_later(seconds + GRACE_SECONDS, running.cut, deadline_exceeded())
        return running

    def end(self, running: RunningJob) -> None:
        """Nobody reads it any more: abort what has not ended."""
        self._jobs.pop(running).cancel()
        running.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within is a request for which a drain waits. Raises ApiError, as `check_open`, and what is to be told of
        exceptions within."""
        self.check_open()
        self._num_running += 1
        try:
            yield
        except ClientGoneError:
            raise
        except Exception as error:
            raise self.told(error) from error
        finally:
            self._num_running -= 1
            if self._idle is not None and not self._num_running and not self._idle.done():
                self._idle.set_result(None)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, let the others end, and cut off what still runs after these seconds."""
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
        """The engine is beyond repair: refuse everything, and let all that ran be told why it ended."""
        self.phase = "down"
        self._refuse_uploads()
        await self._all_end(CUT_SECONDS)

    def close(self) -> None:
        """Wait for no thread."""
        if self._asking is not None:
            self._asking.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _refuse_uploads(self) -> None:
        if not self.closing.done():
            self.closing.set_result(None)

    async def _all_end(self, seconds: float) -> bool:
        """Whether everything that runs has ended within so long."""
        if self._num_running:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._idle,), timeout=seconds)
        return not self._num_running

    def told(self, error: Exception) -> ApiError:
        """What a client is told of an exception that its request raised."""
        if isinstance(error, RequestError) and error.reason == "deadline":
            return deadline_exceeded()
        if isinstance(error, RequestError) and error.reason == "abort" and self._is_cut:
            return self._refusal("draining")
        is_refused = isinstance(error, RuntimeError) and not isinstance(error, (RequestError, QueueFullError))
        if is_refused and self.is_beyond_repair:
            return self._refusal("down")
        told = from_exception(error)
        if told.status == 500:
            logger.error("a request failed: %s", error if isinstance(error, RequestError) else _traceback(error))
        return told

    def _snapshot(self) -> Snapshot | None:
        return None if self._engine is None else self._engine.statistics()

    def _is_healthy(self) -> bool:
        return self.verdict()[0] == 200

    def _refusal(self, phase: str) -> ApiError:
        if phase == "loading":
            return unavailable("loading", "the model is being loaded; try again in a few seconds", seconds=5)
        if phase == "draining":
            return unavailable("shutting_down", "this server is shutting down; try again", seconds=1)
        return unavailable("engine_down", "the engine has failed for good, and this server ends; try again", seconds=10)


def _traceback(error: Exception) -> str:
    """Of what the engine has not logged; the command's log shows messages alone."""
    return "".join(format_exception(error))
