"""The server process: sockets, loading the model, signals, draining and exit status."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn

import fastllama
from fastllama.errors import counted
from fastllama.serve import page
from fastllama.serve.app import create_app
from fastllama.serve.log import AccessLog
from fastllama.serve.model import ServedModel
from fastllama.serve.options import ServerOptions
from fastllama.serve.protocol import LimitedProtocol
from fastllama.serve.service import Service
from fastllama.serve.sockets import bind, most_connections, url_of

if TYPE_CHECKING:
    from fastllama.runtime.llm import LLM

BROKEN = 70  # exit status after a permanent fault of the engine
SWITCH_SECONDS = 0.0005  # for sys.setswitchinterval: how long the engine and the event loop wait for each other's GIL
WATCH_SECONDS = 0.5  # between two checks of the engine
END_SECONDS = 5  # for connections and the engine's thread to end before the process does


def serve(options: ServerOptions, load: Callable[[], LLM], *, model: str, say: Callable[[str], None]) -> int:
    """Serve a model until a signal or a permanent fault of its engine; returns the exit status: 0, or BROKEN.

    load: makes the LLM, on another thread, while the server already responds. model: its name, a path or a Hub id.
    `say`: called with lines for the user. Call it on the main thread: it handles signals. Raises ValueError if the
    sockets cannot be bound, and what `load` raises.
    """
    sockets = bind(options.host, options.port)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server = ModelServer(options, load, model, say, url_of(options.host, sockets, tls=options.tls))
        server.run(sockets)
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
        for each in sockets:
            each.close()
    if server.failure is not None:
        raise server.failure
    return server.status


def served_model(llm: LLM, model: str, options: ServerOptions) -> ServedModel:
    """Returns the facts of a model that requests are checked against. Raises ValueError if it has no tokenizer."""
    facts = (fastllama.__version__, model, str(llm.engine.model.dtype), llm.quantization, *options.traits)
    name = Path(model).resolve().name if Path(model).exists() else model
    return ServedModel(
        names=options.names or (name,),
        any_name=not options.names,
        tokenizer=llm.prompts.needed_tokenizer(),
        chat_format=llm.chat_format,
        eos_token_ids=llm.config.eos_token_ids,
        vocab_size=llm.config.vocab_size,
        max_model_len=llm.max_model_len,
        max_n=min(options.max_n, llm.engine.scheduler.max_num_seqs),
        created=int(time.time()),
        fingerprint=f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}",
        notice=page.notice(),
    )


class ModelServer(uvicorn.Server):
    """A uvicorn server that loads a model, watches its engine, and drains before it ends.

    status: of the process, once it has run. failure: the exception that loading the model raised.
    """

    def __init__(
        self, options: ServerOptions, load: Callable[[], LLM], model: str, say: Callable[[str], None], url: str
    ) -> None:
        super().__init__(
            uvicorn.Config(
                "",  # set in the event loop
                ws="none",
                loop="asyncio",  # its sends release the GIL to the engine; uvloop's keep it
                lifespan="off",
                log_config=None,
                log_level="critical",  # the application logs its own errors
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=most_connections(),
                timeout_graceful_shutdown=END_SECONDS,
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
            )
        )
        self.status = 0
        self.failure: BaseException | None = None
        self._options, self._load, self._model, self._say, self._url = options, load, model, say, url
        self._loader = threading.Thread(target=self._load_model, name="fastllama-load", daemon=True)
        self._is_told_to_end = False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket] | None = None) -> None:
        """Serve on these sockets until the end, or a signal."""
        options = self._options
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[LLM] = self._loop.create_future()
        self._service = Service(
            options.keyring, options.limits, log=AccessLog(sys.stdout), canary_seconds=options.canary_seconds
        )
        self.config.http = partial(LimitedProtocol, note=self._service.note)  # type: ignore[assignment]
        self.config.app = create_app(self._service, hosts=options.hosts, cors_origins=options.cors_origins)
        self._say(f"{self._url} is bound; loading {self._model}")
        with self._own_signals():
            life = asyncio.ensure_future(self._live())
            await super().serve(sockets)
            await life
        self._service.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing: uvicorn's handlers would close the listening sockets at the first signal."""
        yield

    @contextmanager
    def _own_signals(self) -> Iterator[None]:
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
        }
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._on_hangup
        if threading.current_thread() is not threading.main_thread():  # there, Python handles no signals
            handlers = {}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal drains; the second has its default effect."""
        if self._is_told_to_end:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._is_told_to_end = True
        self._loop.call_soon_threadsafe(self._begin_end, signal.Signals(number).name)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._service.keyring.reload)

    def _begin_end(self, name: str) -> None:
        if self._service.phase == "loading":
            self._say(f"{name}: stopping while the model is loading")
            self.should_exit = True
        else:
            seconds = f"{self._options.drain_seconds:g} s"
            self._say(f"{name}: no new requests; running ones get {seconds} to finish; a second signal stops at once")
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._options.drain_seconds)
        self.should_exit = True

    async def _live(self) -> None:
        """Wait for the model, then watch its engine until the end."""
        llm: LLM | None = None
        self._loader.start()
        try:
            while not self.should_exit and llm is None:
                await asyncio.wait((self._loaded,), timeout=WATCH_SECONDS / 10)
                llm = self._loaded.result() if self._loaded.done() else None
            if llm is not None:
                await self._watch(llm)
        except BaseException as error:
            self.failure = error
        finally:
            self.should_exit = True
        if not self._loaded.done():  # its thread cannot be stopped
            _exit_now(self.status)

    def _load_model(self) -> None:
        """Load the model on a daemon thread, which cannot be stopped and is not waited for."""
        llm, error = None, None
        try:
            llm = self._load()
            gc.collect()
            gc.freeze()  # the model stays, and each collection that scans its objects stops all threads
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, llm, error)

    def _take(self, llm: LLM | None, error: BaseException | None) -> None:
        if llm is not None:
            self._loaded.set_result(llm)
        elif error is not None:
            self._loaded.set_exception(error)

    async def _watch(self, llm: LLM) -> None:
        """Serve the model until its engine has a permanent fault or the server ends."""
        from fastllama.runtime.serving.async_engine import AsyncEngine

        model = served_model(llm, self._model, self._options)
        engine = AsyncEngine(llm, max_queue_size=self._options.max_queue_size)
        self._service.open(engine, model)
        self._say(_described(llm, model))
        needed = "an API key is required" if self._options.keyring else "no API key is required"
        self._say(f"ready on {self._url}; {needed}")
        while not self.should_exit:
            if self._service.is_beyond_repair:
                self.status = BROKEN
                self._say(f"the engine has a permanent fault: {engine.health().error or 'its thread has ended'}")
                await self._service.go_down()
                return
            await asyncio.sleep(WATCH_SECONDS)
        ended = asyncio.ensure_future(engine.shutdown())
        await asyncio.wait((ended,), timeout=END_SECONDS)
        if not ended.done():  # a step hangs
            _exit_now(self.status)


def _described(llm: LLM, model: ServedModel) -> str:
    weights, engine = llm.engine.model, llm.engine
    dtype = str(weights.dtype).removeprefix("torch.")
    kept = "" if llm.quantization is None else f", weights in {llm.quantization}"
    return (
        f"{model.names[0]}: {weights.num_parameters / 1e6:,.1f} M parameters in {dtype}{kept} on {weights.device}; "
        f"{counted(model.max_model_len, 'token')} of context, {engine.pool.num_pages * engine.pool.page_size:,} of KV "
        f"cache, {counted(engine.scheduler.max_num_seqs, 'sequence')} at once"
    )


def _exit_now(status: int) -> NoReturn:
    """Exit without waiting, as Python's own exit would, for threads that cannot be stopped (downloads)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
