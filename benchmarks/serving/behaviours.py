"""Clients of a soak test: they behave, leave, stall, or send invalid requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.serving.malformed import GARBLED, NONSENSE
from benchmarks.serving.requests import END, Connection, Reply, request

PATIENCE = 60.0  # seconds for one client
Behaviour = Callable[["Caller"], Awaitable[str]]


class Fault(Exception):
    """Wrong behaviour of the server."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one client.

    ending: the status of the answer, or "left" if the client did not wait for it, "closed" if the server closed without
    an answer. gaps: seconds between the reads of a stream. fault: what the server did wrong; None for nothing.
    """

    behaviour: str
    ending: str
    seconds: float
    gaps: tuple[float, ...] = ()
    fault: str | None = None


@dataclass
class Caller:
    """Parameters of a client: the server's port, a random generator. stalls: seconds after which a server hangs up."""

    port: int
    rng: random.Random
    stalls: float
    gaps: tuple[float, ...] = ()

    def connect(self, receive_buffer: int | None = None) -> Connection:
        """Opens a new connection."""
        return Connection(self.port, receive_buffer)

    def fields(self, *, stream: bool, max_tokens: int) -> dict[str, Any]:
        """Random fields of a legal request, without the prompt."""
        more: list[dict[str, Any]] = [
            {},
            {"temperature": 0},
            {"n": 2},
            {"stop": ["the", "zebra"]},
            {"top_p": 0.9, "seed": 7, "frequency_penalty": 0.5},
            {"logit_bias": {"300": 5}},
        ]
        return {"stream": stream, "max_tokens": max_tokens, **self.rng.choice(more)}

    def legal(self, *, stream: bool, max_tokens: int | None = None) -> bytes:
        """A random legal request to either endpoint."""
        fields = self.fields(stream=stream, max_tokens=max_tokens or self.rng.randint(4, 32))
        text = " ".join(self.rng.choices(("Once", "upon", "a", "time", "little", "dog"), k=self.rng.randint(1, 12)))
        if self.rng.random() < 0.5:
            return request(json.dumps(fields | {"prompt": text}).encode())
        messages = [{"role": "user", "content": text}]
        return request(json.dumps(fields | {"messages": messages}).encode(), "/v1/chat/completions")


def _judged(reply: Reply | None) -> str:
    """The status of an answer; raises Fault unless an error has the API's form."""
    if reply is None:
        return "closed"
    if reply.status >= 500:
        raise Fault(f"status {reply.status}: {reply.body[:500]!r}")
    if reply.status >= 400:
        message = json.loads(reply.body)["error"]["message"]
        if "\n" in message or len(message) > 1000 or "Traceback" in message:
            raise Fault(f"an error's message is not one short line: {message[:200]!r}")
    if reply.status == 429 and not 1 <= float(reply.headers.get("retry-after", "0")) <= 120:
        raise Fault(f"429 with Retry-After {reply.headers.get('retry-after')!r}")
    return str(reply.status)


async def _answered(caller: Caller, *, stream: bool) -> str:
    async with caller.connect() as connection:
        await connection.send(caller.legal(stream=stream))
        reply = await connection.reply()
    ending = _judged(reply)
    if reply is None or ending not in ("200", "429"):
        raise Fault(f"a legal request got {ending}: {reply.body[:500] if reply else b''!r}")
    if ending == "429":
        await asyncio.sleep(float(reply.headers["retry-after"]))  # before it retries, as a new client
        return ending
    answers = reply.events if stream else [json.loads(reply.body)]
    if any("error" in answer for answer in answers):
        raise Fault(f"an error in an answer: {answers[-1]}")
    reasons = [choice["finish_reason"] for answer in answers for choice in answer["choices"] if choice["finish_reason"]]
    if not reasons or not set(reasons) <= {"stop", "length"} or (stream and b"data: [DONE]" not in reply.body):
        raise Fault(f"an answer that is not whole: {reasons}, {reply.body[-200:]!r}")
    if stream:
        caller.gaps = tuple(after - before for before, after in pairwise(reply.times[1:]))
    return ending


async def read_stream(caller: Caller) -> str:
    """Read a stream to its end."""
    return await _answered(caller, stream=True)


async def read_whole(caller: Caller) -> str:
    """Wait for an answer that is not streamed."""
    return await _answered(caller, stream=False)


async def _leave(caller: Caller, connection: Connection) -> str:
    if caller.rng.random() < 0.5:
        connection.reset()
    return "left"


async def leave_upload(caller: Caller) -> str:
    """Leave in the middle of the request."""
    asked = caller.legal(stream=True)
    async with caller.connect() as connection:
        await connection.send(asked[: caller.rng.randrange(len(asked))])
        await asyncio.sleep(caller.rng.choice((0.0, 0.02)))
        return await _leave(caller, connection)


async def leave_queue(caller: Caller) -> str:
    """Leave as soon as the request is sent, or a moment later: while queued, or during prefill."""
    async with caller.connect() as connection:
        await connection.send(caller.legal(stream=caller.rng.random() < 0.5, max_tokens=200))
        await asyncio.sleep(caller.rng.choice((0.0, 0.005, 0.03)))
        return await _leave(caller, connection)


async def leave_stream(caller: Caller) -> str:
    """Leave a stream after some of its tokens."""
    async with caller.connect() as connection:
        await connection.send(caller.legal(stream=True, max_tokens=200))
        for _ in range(caller.rng.randint(1, 20)):
            data = await connection.receive()
            if data.startswith(b"HTTP/1.1 429"):
                return "429"
            if not data or data.endswith(END):  # a short stream
                break
        return await _leave(caller, connection)


async def leave_half(caller: Caller) -> str:
    """Send the request and close that direction, which counts as leaving; read on."""
    async with caller.connect() as connection:
        await connection.send(caller.legal(stream=True))
        connection.end_writing()
        while await connection.receive():
            pass
    return "left"


async def never_read(caller: Caller) -> str:
    """Request a long answer and read nothing for longer than the server waits; then check that it has hung up.

    Until then only a reset could be seen: the end of the stream is queued after data that the kernel cannot send.
    """
    body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "logprobs": 20, "n": 2, "stream": True}
    async with caller.connect(receive_buffer=2048) as connection:
        await connection.send(request(json.dumps(body).encode()))
        while not connection.peek():
            await asyncio.sleep(0.05)
        if not connection.peek().startswith(b"HTTP/1.1 429"):
            await asyncio.sleep(caller.stalls + 5)
        return _judged(await connection.reply())


async def _drip(caller: Caller, connection: Connection, byte: bytes, pause: float) -> str:
    """Send byte after byte; raises Fault unless the server hangs up in time."""
    hang_up = time.monotonic() + caller.stalls + 20
    waiting = asyncio.ensure_future(connection.reply())
    try:
        while not waiting.done() and time.monotonic() < hang_up:
            with suppress(OSError):
                await connection.send(byte)
            await asyncio.wait([waiting], timeout=pause)
        if not waiting.done():
            raise Fault(f"a slow client was kept for more than {caller.stalls + 20:.0f} s")
        ending = _judged(waiting.result())
        if ending not in ("408", "429", "closed"):  # 429: the queue was full as its headers came
            raise Fault(f"a slow client got {ending}")
        return ending
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting


async def slow_headers(caller: Caller) -> str:
    """Send headers that never end, byte by byte."""
    async with caller.connect() as connection:
        await connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        return await _drip(caller, connection, b"x", 0.2)


async def slow_body(caller: Caller) -> str:
    """Send a body that stalls."""
    async with caller.connect() as connection:
        await connection.send(request(b" " * 1000)[:-900])
        return await _drip(caller, connection, b"", 0.5)


async def _refused(caller: Caller, data: bytes, *, may_close: bool) -> str:
    async with caller.connect() as connection:
        with suppress(ConnectionError):  # refused before all was sent
            await connection.send(data)
        ending = _judged(await connection.reply())
    if not (ending.startswith("4") or (may_close and ending == "closed")):
        raise Fault(f"{data[:100]!r} of {len(data)} bytes got {ending}")
    return ending


async def send_nonsense(caller: Caller) -> str:
    """Send an invalid body."""
    return await _refused(caller, caller.rng.choice(NONSENSE), may_close=False)


async def send_garbage(caller: Caller) -> str:
    """Send bytes that are not legal HTTP, or not for this server."""
    return await _refused(caller, caller.rng.choice(GARBLED), may_close=True)


async def send_everything(caller: Caller) -> str:
    """Send each invalid body and byte sequence once."""
    for data in NONSENSE:
        await _refused(caller, data, may_close=False)
    for data in GARBLED:
        await _refused(caller, data, may_close=True)
    return "4xx"


WELL_BEHAVED: dict[Behaviour, int] = {read_stream: 3, read_whole: 1}
MIXED: dict[Behaviour, int] = {  # clients of a hundred
    read_stream: 35,
    read_whole: 10,
    leave_upload: 8,
    leave_queue: 10,
    leave_stream: 12,
    leave_half: 3,
    never_read: 1,
    slow_headers: 2,
    slow_body: 2,
    send_nonsense: 10,
    send_garbage: 7,
}


async def call(behaviour: Behaviour, port: int, rng: random.Random, stalls: float) -> Outcome:
    """Run one client; a Fault becomes the outcome's, and is not raised."""
    caller, start, ending, fault = Caller(port, rng, stalls), time.perf_counter(), "closed", None
    try:
        ending = await asyncio.wait_for(behaviour(caller), PATIENCE)
    except Fault as error:
        ending, fault = "fault", str(error)
    except asyncio.TimeoutError:
        ending, fault = "fault", f"nothing came for {PATIENCE:.0f} s"
    except (OSError, ValueError, KeyError) as error:
        ending, fault = "fault", f"{type(error).__name__}: {error}"
    return Outcome(behaviour.__name__, ending, time.perf_counter() - start, caller.gaps, fault)
