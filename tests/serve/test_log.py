"""The access log: every line is one JSON object, whatever clients call themselves, and no stream hurts a request."""

from __future__ import annotations

import io
import json
import logging
import os
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.serve.log import AccessLog, AccessRecord

WHOLE = AccessRecord(
    time=1796000000.25,
    id="chatcmpl-1",
    route="/v1/chat/completions",
    status=200,
    key="alice",
    model="llama-2-13b",
    user="9f86d081",
    reason="stop",
    stream=True,
    prompt_tokens=5,
    cached_tokens=4,
    completion_tokens=3,
    queue_s=0.12345678,
    first_token_s=0.5,
    total_s=1.0,
)


def written(record: AccessRecord) -> str:
    stream = io.StringIO()
    AccessLog(stream).write(record)
    return stream.getvalue()


def test_a_line_has_every_field_of_its_record() -> None:
    assert json.loads(written(WHOLE)) == {
        "time": "2026-11-30T00:53:20.250Z",
        "id": "chatcmpl-1",
        "route": "/v1/chat/completions",
        "status": 200,
        "key": "alice",
        "model": "llama-2-13b",
        "user": "9f86d081",
        "reason": "stop",
        "stream": True,
        "prompt_tokens": 5,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "queue_s": 0.123457,
        "first_token_s": 0.5,
        "total_s": 1.0,
    }


def test_what_never_came_is_null() -> None:
    line = json.loads(written(AccessRecord(id="1", route="/health")))
    assert {name for name, value in line.items() if value is None} == {
        "model",
        "user",
        "reason",
        "queue_s",
        "first_token_s",
    }


@pytest.mark.parametrize("name", ["id", "key", "model", "user", "route", "reason"])
@given(text=st.text() | st.sampled_from(['"}\n{"id": "forged"', "\x1b[2J", "a\rb", "\u2028", "\x85", "\x7f", "\ud800"]))
def test_no_text_of_a_client_makes_a_second_line(name: str, text: str) -> None:
    values: dict[str, Any] = {"id": "1", "route": "/"} | {name: text}
    line = written(AccessRecord(**values))
    assert line.endswith("}\n")
    assert all(" " <= each <= "~" for each in line[:-1])
    assert list(json.loads(line)) == [each.name for each in fields(AccessRecord)]


def test_a_long_name_is_cut() -> None:
    assert len(written(AccessRecord(id="1", route="/", model="m" * 10**6))) < 700


def test_a_line_is_there_before_the_next_request() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(writer, "w", encoding="ascii") as stream:
        AccessLog(stream).write(WHOLE)
        assert json.loads(os.read(reader, 4096))["id"] == "chatcmpl-1"
    os.close(reader)


def test_a_pipe_whose_reader_left_costs_lines_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="ascii")  # noqa: SIM115
    log = AccessLog(stream)
    for _ in range(1000):
        log.write(WHOLE)
    (record,) = caplog.records
    assert "cannot write to the access log, lines are lost: [Errno 32]" in record.getMessage()
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_closed_stream_and_one_that_is_well_again(caplog: pytest.LogCaptureFixture) -> None:
    class Disk(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    log = AccessLog(disk)
    with caplog.at_level(logging.WARNING):
        for full in (True, True, False, True):
            disk.full = full
            log.write(WHOLE)
    assert len(caplog.records) == 2, "once for each failure that lasts"
    assert len(disk.getvalue().splitlines()) == 1
    disk.full = False
    disk.close()
    log.write(WHOLE)  # ValueError, which is no OSError
