"""The serving soak: clients of every kind leave no request or page in a server, and planted faults are found."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from benchmarks import serving_soak
from benchmarks.serving.behaviours import (
    MIXED,
    Behaviour,
    Outcome,
    call,
    leave_stream,
    read_stream,
    read_whole,
    send_garbage,
    send_nonsense,
    slow_body,
)
from benchmarks.serving.process import State
from benchmarks.serving_soak import BLOCKS, GROWTH, SLOWDOWN, Soak

QUIET = State(
    megabytes=300.0, blocks=900_000, objects={"Task": 2}, descriptors=20, threads=9, running=0, waiting=0, pages=0
)


def test_nothing_of_some_hundred_clients_remains() -> None:
    found = serving_soak.soak(300)
    assert found.faults(measured=False) == []
    met = {(each.behaviour, each.ending) for each in found.outcomes}
    assert {behaviour.__name__ for behaviour in MIXED} < {behaviour for behaviour, _ in met}
    assert {("read_stream", "200"), ("slow_headers", "408"), ("leave_queue", "left")} <= met
    assert "429" in {ending for _, ending in met}, "no overload"  # nor does a slow body get 408 where it meets one


def done(**changes: object) -> Soak:
    """The soak's findings on a server without a fault, except for these changes."""
    outcomes = [Outcome("read_stream", "200", 0.1), Outcome("read_whole", "429", 0.1)]
    quiet = Soak(outcomes, dict.fromkeys(("start", "middle", "end"), QUIET), [0.01] * 100, [0.01 * SLOWDOWN] * 100)
    return replace(quiet, **changes)  # type: ignore[arg-type]


def at_the_end(**changes: object) -> dict[str, State]:
    return {"start": QUIET, "middle": QUIET, "end": replace(QUIET, **changes)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"outcomes": [Outcome("read_whole", "fault", 0.1, fault="status 500")] * 2}, "2 times read_whole: status 500"),
        ({"outcomes": [Outcome("never_read", "200", 0.1)]}, "1 clients that did not read"),
        ({"outcomes": [Outcome("leave_stream", "left", 0.1)] * 3, "aborted": 1.0}, "3 clients left"),
        ({"states": at_the_end(pages=0.01)}, "at the end is left"),
        ({"states": at_the_end(running=1)}, "at the end is left"),
        ({"states": at_the_end(descriptors=21)}, "there were 20 descriptors, and at the end are 21"),
        ({"states": at_the_end(objects={"Task": 3})}, "live more than at the start: {'Task': 1}"),
        ({"states": at_the_end(threads=10)}, "there were 9 threads"),
        ({"states": at_the_end(megabytes=301 + GROWTH)}, "memory grew"),
        ({"states": at_the_end(blocks=900_001 + BLOCKS)}, "Python's blocks grew"),
        ({"crowded": [0.02] * 100}, "2.00 times that at capacity"),
        ({"log": "a line\nTraceback (most recent call last)"}, "the server wrote a traceback"),
        ({"exit_status": 70}, "status 70"),
    ],
)
def test_each_fault_is_reported(changes: dict[str, object], fault: str) -> None:
    assert done().faults() == []
    (found,) = done(**changes).faults()
    assert fault in found


def test_the_exit_status_shows_whether_anything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status in (0, 1):
        monkeypatch.setattr(serving_soak, "soak", lambda *_, status=status: done(exit_status=status))
        monkeypatch.setattr(sys, "argv", ["serving_soak"])
        with pytest.raises(SystemExit) as exit:
            serving_soak.main()
        assert exit.value.code == status
        assert ("ended with status 1" in capsys.readouterr().out) is bool(status)


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def met_by(behaviour: Behaviour, answer: Answer) -> Outcome:
    """The outcome for a client of this kind when the server answers so."""

    async def ask() -> Outcome:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await call(behaviour, port, random.Random(0), stalls=0.1)

    return asyncio.run(ask())


def answering(answer: bytes) -> Answer:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    return answer_once


def whole(status: str, body: bytes, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def streamed(*events: bytes) -> bytes:
    body = b"".join(b"data: " + event + b"\n\n" for event in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


REFUSAL = b'{"error": {"message": "no"}}'
TOKEN = b'{"choices": [{"text": "a", "finish_reason": null}]}'
LAST = b'{"choices": [{"text": "", "finish_reason": "length"}]}'
FAILED = b'{"error": {"message": "no"}}'


@pytest.mark.parametrize(
    ("behaviour", "answer", "ending"),
    [
        (read_stream, streamed(TOKEN, LAST, b"[DONE]"), "200"),
        (read_whole, whole("200 OK", LAST), "200"),
        (read_whole, whole("429 Busy", REFUSAL, "Retry-After: 1\r\n"), "429"),
        (leave_stream, streamed(TOKEN), "left"),
        (send_nonsense, whole("400 Bad", REFUSAL), "400"),
        (send_garbage, b"", "closed"),
        (slow_body, whole("408 Late", REFUSAL), "408"),
        (slow_body, whole("429 Busy", REFUSAL, "Retry-After: 1\r\n"), "429"),
        (leave_stream, whole("429 Busy", REFUSAL, "Retry-After: 1\r\n"), "429"),
    ],
)
def test_a_right_answer_is_none_of_the_faults(behaviour: Behaviour, answer: bytes, ending: str) -> None:
    outcome = met_by(behaviour, answering(answer))
    assert (outcome.ending, outcome.fault) == (ending, None)


@pytest.mark.parametrize(
    ("behaviour", "answer", "fault"),
    [
        (read_stream, streamed(TOKEN, LAST), "not whole"),
        (read_stream, streamed(TOKEN, b"[DONE]"), "not whole"),
        (read_stream, streamed(TOKEN, FAILED), "an error in an answer"),
        (read_stream, streamed(TOKEN, LAST, b"[DONE]")[:-5], "got closed"),
        (read_whole, whole("200 OK", LAST.replace(b"length", b"abort")), "not whole"),
        (read_whole, whole("400 Bad", REFUSAL), "a legal request got 400"),
        (read_whole, whole("429 Busy", REFUSAL, "Retry-After: 0\r\n"), "Retry-After '0'"),
        (read_whole, whole("429 Busy", REFUSAL), "Retry-After None"),
        (send_nonsense, whole("500 No", REFUSAL), "status 500"),
        (send_nonsense, whole("200 OK", LAST), "got 200"),
        (send_nonsense, b"", "got closed"),
        (send_nonsense, whole("400 Bad", b'{"error": {"message": "a\\nb"}}'), "one short line"),
        (send_nonsense, whole("400 Bad", b"no"), "JSONDecodeError"),
        (send_garbage, whole("503 No", REFUSAL), "status 503"),
        (slow_body, whole("200 OK", LAST), "a slow client got 200"),
    ],
)
def test_a_wrong_answer_is_a_fault(behaviour: Behaviour, answer: bytes, fault: str) -> None:
    outcome = met_by(behaviour, answering(answer))
    assert outcome.ending == "fault"
    assert outcome.fault is not None
    assert fault in outcome.fault
