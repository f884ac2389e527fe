"""Long texts: those that cannot fit are refused unread; others are tokenized off the event loop, and can be aborted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fastllama import AsyncEngine, SamplingParams
from fastllama.errors import RequestError
from fastllama.io.tokenizer import Tokenizer, Vocabulary
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import HOT, all_of, alone, ids_of, run, until, until_it_fails
from tests.runtime.serving.test_async_faults import failure_of
from tests.runtime.test_engine import PROMPTS

TEXT = "a" * 50_000
CUT = replace(HOT, truncate_prompt_tokens=20)


class Slow(Tokenizer):
    """A byte is a token; notes where it runs, and waits there while the gate is closed."""

    def __init__(self) -> None:
        text = {0: b"<unk>", 1: b"<s>", 2: b"</s>", **{i: bytes([i]) for i in range(3, 97)}}
        super().__init__(Path("slow"), Vocabulary({i: str(i) for i in text}, text, frozenset({0, 1, 2})), 1, 2, None)
        self.gate, self.threads = threading.Event(), []
        self.gate.set()
        self.error: Exception | None = None
        self.least = 0

    def least_length(self, text: str) -> int:
        return self.least and len(text)

    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        self.threads.append(threading.current_thread())
        assert self.gate.wait(15)
        if self.error is not None:
            raise self.error
        return [5 + i % 80 for i in range(len(text))]


@asynccontextmanager
async def slowly(*, closed: bool = False) -> AsyncIterator[tuple[AsyncEngine, Slow]]:
    """An engine whose tokenizer's gate is open, or closed until the end."""
    tokenizer = Slow()
    with running(ours(), tokenizer=tokenizer) as llm:
        async with AsyncEngine(llm) as engine:
            if closed:
                tokenizer.gate.clear()
            try:
                yield engine, tokenizer
            finally:
                tokenizer.gate.set()
        assert engine.worker.orders == {}


def test_a_text_that_cannot_fit_is_refused_unread() -> None:
    async def test() -> None:
        async with slowly() as (engine, tokenizer):
            tokenizer.least = 1
            with pytest.raises(
                ValueError, match=r"^the prompt has 50000 characters, which are 50000 tokens or more; l"
            ):
                engine.add_request(TEXT, HOT)
            assert tokenizer.threads == []
            assert engine.statistics().num_accepted == 0

    run(test())


def test_a_long_text_is_tokenized_elsewhere_and_a_short_one_at_once() -> None:
    async def test() -> None:
        async with slowly() as (engine, tokenizer):
            prompt = [5 + i % 80 for i in range(len(TEXT))][-20:]
            assert ids_of(await all_of(engine.add_request(TEXT, CUT))) == alone(prompt)
            (thread,) = tokenizer.threads
            assert thread not in (threading.current_thread(), engine.worker.thread)
            await all_of(engine.add_request("aaa", HOT))
            assert tokenizer.threads[1:] == [threading.current_thread()]

    run(test())


def test_the_loop_and_other_requests_go_on_meanwhile_and_a_drain_waits() -> None:
    async def test() -> None:
        async with slowly(closed=True) as (engine, tokenizer):
            long = engine.add_request(TEXT, CUT)
            fork = engine.fork(long)
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
            drain = asyncio.ensure_future(engine.drain())
            await asyncio.sleep(0.05)
            assert not drain.done()
            tokenizer.gate.set()
            found = await asyncio.gather(all_of(long), all_of(fork))
            assert len(ids_of(found[0])[0]) == 10
            assert ids_of(found[0]) == ids_of(found[1]), "forked when it has been tokenized"
            await drain

    run(test())


@pytest.mark.parametrize("how", ["deadline", "abort", "abort_all", "close", "shutdown"])
def test_a_request_ends_at_once_while_it_is_tokenized(how: str) -> None:
    async def test() -> None:
        async with slowly(closed=True) as (engine, tokenizer):
            start = time.monotonic()
            stream = engine.add_request(TEXT, CUT, request_id="mine", deadline=0.05 if how == "deadline" else None)
            fork = engine.fork(stream)
            causes = {
                "deadline": "its deadline has passed",
                "abort": "AsyncEngine.abort was called",
                "abort_all": "AsyncEngine.abort_all was called",
                "shutdown": "the engine was shut down",
            }
            await until(lambda: len(tokenizer.threads) == 1)
            if how == "close":
                stream.close()
                assert await all_of(stream) == []
            else:
                if how == "shutdown":
                    await engine.shutdown()
                elif how == "abort":
                    engine.abort("mine")
                elif how == "abort_all":
                    engine.abort_all()
                failure = await failure_of(stream)
                assert str(failure) == f"request 'mine' was aborted: {causes[how]}"
                assert failure.reason == ("deadline" if how == "deadline" else "abort")
            await until_it_fails(fork, r"aborted|'mine' has ended; legal: an unfinished one")
            assert time.monotonic() - start < 10
            with pytest.raises(RuntimeError, match="has not ended"):
                stream.output()
            tokenizer.gate.set()
            if how != "shutdown":
                await engine.drain()
                assert engine.statistics().num_generated_tokens == 0

    run(test())


def test_the_stream_of_a_long_text_raises_what_is_wrong_with_it() -> None:
    async def test() -> None:
        async with slowly() as (engine, tokenizer):
            with pytest.raises(RequestError, match=r"the prompt has 50000 tokens; legal: at most 255") as raised:
                await all_of(engine.add_request(TEXT, SamplingParams()))
            assert isinstance(raised.value.__cause__, ValueError)
            tokenizer.error = OSError("gone")
            with pytest.raises(RequestError, match=r"^the request failed: OSError\('gone'\)$"):
                await all_of(engine.add_request(TEXT, CUT))
            assert ids_of(await all_of(engine.add_request(PROMPTS[1], HOT))) == alone(PROMPTS[1])
            assert engine.statistics().num_queued == 0

    run(test())
