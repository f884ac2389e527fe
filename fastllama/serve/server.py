"""The process that serves: its sockets, the model that loads behind them, signals, and how all of it ends."""

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

BROKEN = 70  # the exit status where the engine is beyond repair
SWITCH_SECONDS = 0.0005  # of sys.setswitchinterval: how long the engine and the event loop wait for each other's GIL
WATCH_SECONDS = 0.5  # between two looks at the engine
END_SECONDS = 5  # for connections and the engine's thread to end; what has not by then ends with the process


def serve(options: ServerOptions, load: Callable[[], LLM], *, model: str, say: Callable[[str], None]) -> int:
    """Serve a model until a signal or its engine's end; the exit status: 0, or BROKEN.

    load: makes the LLM, on another thread, while the server answers already. model: what it is called, a path or a Hub
    id. say: is given lines for who started it. To be called on the main thread: signals are handled there.
    Raises ValueError where the sockets cannot be bound, and what `load` raises.
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
    """The facts of a model by which requests are judged. Raises ValueError where it has no tokenizer."""
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
    """uvicorn with a model to load, a drain before its end, and an engine that is watched.

    status: of the process, once it has run. failure: what loading the model raised.
    """

    def __init__(
        self, options: ServerOptions, load: Callable[[], LLM], model: str, say: Callable[[str], None], url: str
    ) -> None:
        super().__init__(
            uvicorn.Config(
                "",  # known in the loop
                ws="none",
                loop="asyncio",  # whose sends let the engine have the GIL; uvloop's keep it
                lifespan="off",
                log_config=None,
                log_level="critical",  # the application says what is wrong with it
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
        """Serve on these sockets until the end, which signals bring as well."""
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
        """Nothing: uvicorn's own handlers close the listening sockets at the first signal."""
        yield

    @contextmanager
    def _own_signals(self) -> Iterator[None]:
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
        }
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._on_hangup
        if threading.current_thread() is not threading.main_thread():  # where Python handles none
            handlers = {}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first one drains, the second ends the process as if nobody had handled it."""
        if self._is_told_to_end:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._is_told_to_end = True
        self._loop.call_soon_threadsafe(self._begin_end, signal.Signals(number).name)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._service.keyring.reload)

    def _begin_end(self, name: str) -> None:
        if self._service.phase == "loading":
            self._say(f"{name}: ends while the model is being loaded")
            self.should_exit = True
        else:
            seconds = f"{self._options.drain_seconds:g} s"
            self._say(f"{name}: no new requests; those that run get {seconds} to end; a second signal ends at once")
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._options.drain_seconds)
        self.should_exit = True

    async def _live(self) -> None:
        """From the model's loading to the end of its engine."""
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
        if not self._loaded.done():  # nothing can stop it
            _exit_now(self.status)

    def _load_model(self) -> None:
        """On the loader's thread, for which nothing waits, since nothing can stop it."""
        llm, error = None, None
        try:
            llm = self._load()
            gc.collect()
            gc.freeze()  # it stays, and each look of the collector at its objects stops all threads
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
        """Serve the model, until its engine is beyond repair or the server ends."""
        from fastllama.runtime.serving.async_engine import AsyncEngine

        model = served_model(llm, self._model, self._options)
        engine = AsyncEngine(llm, max_queue_size=self._options.max_queue_size)
        self._service.open(engine, model)
        self._say(_described(llm, model))
        needed = "an API key is needed" if self._options.keyring else "no API key is needed"
        self._say(f"ready on {self._url}; {needed}")
        while not self.should_exit:
            if self._service.is_beyond_repair:
                self.status = BROKEN
                self._say(f"the engine is beyond repair: {engine.health().error or 'its thread has ended'}")
                await self._service.go_down()
                return
            await asyncio.sleep(WATCH_SECONDS)
        ended = asyncio.ensure_future(engine.shutdown())
        await asyncio.wait((ended,), timeout=END_SECONDS)
        if not ended.done():  # a step that hangs
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
    """End although a thread runs that nothing can stop: Python's own end would wait for the threads of a download."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
