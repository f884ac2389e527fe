"""In a forked process every call raises or works, whatever lock was held at the fork, and the parent goes on."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastllama import LLM, AsyncEngine
from tests.io import tokenizer_samples as samples
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import HOT, LONG, all_of, alone, ids_of, run
from tests.runtime.test_engine import PROMPTS, tokens_of

Calls = dict[str, Callable[[], Any]]
FORKED = f"this LLM was made in process {os.getpid()}, from which this one was forked; legal: "


def outcomes(make: Callable[[], Calls]) -> dict[str, str]:
    """The exception of each call in a forked child, or "works"; the child must end by itself, and print nothing."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(err.fileno(), 2)
            sys.stderr, sys.unraisablehook = os.fdopen(2, "w"), sys.__unraisablehook__
            _report(make, out.fileno())
            gc.collect()  # what the calls made dies
            sys.stderr.flush()
            os._exit(0)
        status = _wait(pid)
        out.seek(0)
        err.seek(0)
        found = dict(line.split("\t", 1) for line in out.read().splitlines())
        assert (status, err.read()) == (0, ""), f"hangs or dies after {list(found)}"
    return found


def _report(make: Callable[[], Calls], out: int) -> None:
    for name, call in make().items():
        try:
            call()
        except BaseException as error:
            os.write(out, f"{name}\t{type(error).__name__}: {error}\n".encode())
        else:
            os.write(out, f"{name}\tworks\n".encode())


def _wait(pid: int, seconds: float = 30) -> int:
    """The child's status; -1 if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@contextmanager
def held_by_another_thread(*locks: Any) -> Iterator[None]:
    """The locks are taken, and stay so in a child forked within."""
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            assert leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def check(found: dict[str, str], works: set[str]) -> None:
    assert {name for name, outcome in found.items() if outcome == "works"} == works
    others = {name: outcome for name, outcome in found.items() if name not in works}
    assert {name for name, outcome in others.items() if not outcome.startswith(f"RuntimeError: {FORKED}")} == set()


def calls_of(llm: LLM, started: Any, pieces: list[Any]) -> Calls:
    return {
        "generate": lambda: llm.generate([3, 4], HOT),
        "chat": lambda: llm.chat([{"role": "user", "content": "a"}], HOT),
        "stream": lambda: llm.stream("a", HOT),
        "start": lambda: llm.start("a", HOT),
        "fork": lambda: llm.fork(started),
        "abort": lambda: llm.abort(started),
        "next": lambda: next(pieces[0]),
        "update_weights": lambda: llm.update_weights({}),
        "reset_prefix_cache": lambda: llm.reset_prefix_cache(),
        "AsyncEngine": lambda: AsyncEngine(llm),
        "abort by id": lambda: llm.abort("unknown"),
        "encode": lambda: llm.encode("a"),
        "properties": lambda: (llm.config, llm.default_params, llm.chat_format, started.output()),
        "let go": lambda: (pieces.clear(), gc.collect()),
        "close": lambda: (llm.close(), llm.close()),
    }


WORKS = {"abort by id", "encode", "properties", "let go", "close"}


@pytest.mark.parametrize("how", ["idle", "locked", "from a thread", "within a step"])
def test_every_call_of_an_llm_raises_or_works(how: str) -> None:
    found: list[dict[str, str]] = []
    options: dict[str, Any] = {"tokenizer": samples.tokenizer("tiny"), "chat_format": "llama2"}
    with running(ours(vocab_size=2048), **options) as llm:
        right = tokens_of(llm.generate(PROMPTS[1], HOT)[0])
        started = llm.start(PROMPTS[1], HOT)
        pieces = [llm.follow(started), llm.follow(llm.start(PROMPTS[0], HOT))]

        def fork() -> None:
            found.append(outcomes(lambda: calls_of(llm, started, pieces)))

        def processor(token_ids: list[int], logits: Tensor) -> Tensor:
            fork()
            return logits

        if how == "locked":
            with held_by_another_thread(llm.engine.access, llm.engine.access._entrance):
                fork()
        elif how == "from a thread":
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        elif how == "within a step":
            llm.generate(PROMPTS[2], replace(HOT, max_tokens=1, logits_processors=[processor]))
        else:
            fork()
        (calls,) = found
        if how == "within a step":
            assert calls.pop("abort") == "works", "it is noted for the next step, which never comes"
            assert calls.pop("close").startswith("RuntimeError: this LLM was called from within one of its steps")
            check(calls, WORKS - {"close"})
        else:
            check(calls, WORKS)
        "".join(pieces[0])
        assert tokens_of(started.output()) == right
        pieces.clear()


@pytest.mark.parametrize("locked", [True, False])
def test_every_call_of_an_asynchronous_engine_raises_or_works(locked: bool) -> None:
    def stream_calls(engine: AsyncEngine, streams: list[Any]) -> Calls:
        async def each(stream: Any) -> None:
            async for _ in stream:
                break

        return {
            "add_request": lambda: engine.add_request([3, 4], HOT),
            "generate": lambda: asyncio.run(engine.generate([3, 4], HOT)),
            "fork": lambda: engine.fork(streams[0]),
            "abort": lambda: engine.abort("0"),
            "abort_all": lambda: engine.abort_all(),
            "reset_prefix_cache": lambda: asyncio.run(engine.reset_prefix_cache()),
            "update_weights": lambda: asyncio.run(engine.update_weights({})),
            "drain": lambda: asyncio.run(engine.drain()),
            "shutdown": lambda: asyncio.run(engine.shutdown()),
            "statistics": lambda: engine.statistics(),
            "health": lambda: engine.health(),
            "read": lambda: asyncio.run(each(streams[0])),
            "close": lambda: streams[0].close(),
            "aclose": lambda: asyncio.run(streams[0].aclose()),
            "properties": lambda: (streams[0].request_id, engine.max_queue_size),
            "let go": lambda: (streams.clear(), gc.collect()),
        }

    async def read(engine: AsyncEngine, streams: list[Any]) -> None:
        assert ids_of(await all_of(streams[0])) == alone(PROMPTS[1])
        assert ids_of(await all_of(engine.add_request(PROMPTS[2], HOT))) == alone(PROMPTS[2])
        await engine.shutdown()

    with running(ours()) as llm:
        held = [AsyncEngine(llm)]
        streams = [held[0].add_request(PROMPTS[1], HOT), held[0].add_request(PROMPTS[0], LONG)]
        worker = held[0].worker

        def make() -> Calls:
            calls = stream_calls(held[0], streams)
            calls["let go of the engine"] = lambda: (held.clear(), calls.clear(), gc.collect())
            calls["close the LLM"] = lambda: llm.close()
            return calls

        locks = [worker._lock, worker._statistics.lock, *(stream.order.mailbox._lock for stream in streams)]
        with held_by_another_thread(*locks if locked else ()):
            found = outcomes(lambda: dict(make()))
        check(found, {"properties", "let go", "let go of the engine", "close the LLM"})
        run(read(held[0], streams))
        streams.clear()


SCRIPT = """
import asyncio, multiprocessing, os, sys
import torch
from fastllama import LLM, AsyncEngine, SamplingParams

torch.set_num_threads(1)
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
sizes = {"kv_cache_tokens": 1024, "progress": False}
llm = LLM("tiny", **sizes)
pieces = llm.stream("Once upon a time", params)
head = next(pieces)
engine = AsyncEngine(LLM("tiny", **sizes))
stream = engine.add_request("Once upon a time", params)


def child():
    try:
        llm.generate("The dog", params)
    except RuntimeError:
        print("refused", flush=True)


process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
print("multiprocessing", process.exitcode, flush=True)
pid = os.fork()
if pid == 0:
    sys.exit(0)  # the whole way out: streams, engine, threads, modules
print("fork", os.waitpid(pid, 0)[1])


async def read():
    return "".join([sample.text for delta in [each async for each in stream] for sample in delta.outputs])


print(head + "".join(pieces) == asyncio.run(read()))
"""


def test_a_child_that_inherits_all_ends_as_any_process_does() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3]
    )
    assert found.stdout.splitlines() == ["refused", "multiprocessing 0", "fork 0", "True"], found.stderr
    assert (found.stderr, found.returncode) == ("", 0)
