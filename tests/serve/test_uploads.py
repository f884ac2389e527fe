"""Bodies of requests: which are read, how far, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllama import LLM
from fastllama.serve.service import ServiceLimits
from tests.serve.asgi import COMPLETION, Caller, keyring_of, run, serving, until


@pytest.mark.parametrize(
    "headers",
    [{"content-type": ""}, {"content-type": "text/plain"}, {"content-encoding": "gzip"}],
    ids=["none", "text", "gzip"],
)
def test_a_body_that_is_not_declared_as_json_is_not_read(llm: LLM, headers: dict[str, str]) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                caller = Caller(served.app, path, COMPLETION, headers)
                await caller.start()
                assert (caller.status, caller.num_received) == (415, 0)
                assert caller.answer["error"]["code"] == "unsupported_media_type"
            charset = {"content-type": "Application/JSON ; charset=utf-8"}
            assert (await served.client.post("/tokenize", content=b'{"prompt": "a"}', headers=charset)).is_success

    run(test())


def test_a_body_is_refused_by_its_declared_length_and_by_what_comes(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(body_bytes=1000)) as served:
            for length in ("1001", "9" * 18, "9" * 5000):
                caller = Caller(served.app, "/tokenize", COMPLETION, {"content-length": length})
                await caller.start()
                assert (caller.status, caller.num_received) == (413, 0)
                assert caller.answer["error"]["code"] == "body_too_large"
            chunked = Caller(served.app, "/tokenize")
            for _ in range(11):
                chunked.upload(b" " * 100, more=True)
            await chunked.start()
            assert (chunked.status, chunked.num_received) == (413, 11)
            exact = (b'{"prompt": "a"}').ljust(1000)
            assert (
                await served.client.post("/tokenize", content=exact, headers={"content-type": "application/json"})
            ).is_success

    run(test())


def test_bodies_that_come_at_once_may_not_fill_the_memory(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(all_bodies_bytes=1000)) as served:
            first, second, third = (Caller(served.app, "/tokenize") for _ in range(3))
            first.upload(b'{"prompt": "a"'.ljust(600), more=True)
            answer = first.start()
            await until(lambda: served.service.num_uploading_bytes == 600)
            second.upload(b" " * 500, more=True)
            await second.start()
            assert (second.status, second.answer["error"]["code"]) == (503, "too_many_uploads")
            third.upload(b'{"prompt": "a"}')
            await third.start()
            assert third.status == 200
            first.upload(b"}")
            await answer
            assert (first.status, served.service.num_uploading_bytes) == (200, 0)

    run(test())


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_keys_limits_hold_before_a_body_is_read(llm: LLM, tmp_path: Path, path: str) -> None:
    ring, header = keyring_of(tmp_path, max_concurrent=1, requests_per_minute=3)
    key = ring.find(header["authorization"])

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            first, second, third = (Caller(served.app, path, headers=header) for _ in range(3))
            first.upload(b'{"prompt"', more=True)
            uploading = first.start()
            await until(lambda: served.service.num_uploading_bytes == 9)
            second.upload(b'{"prompt": "a"}')
            await second.start()
            assert (second.status, second.num_received) == (429, 0)
            assert "max_concurrent" in second.answer["error"]["message"]
            first.leave()
            await uploading
            assert key.num_running == 0
            for status in (400, 400, 429):  # one that is refused has used a request, too
                assert (await served.post(path, {"nonsense": 1}, header)).status_code == status
            await third.start()
            assert (third.status, third.num_received, key.num_running) == (429, 0, 0)

    run(test())


def test_a_body_that_does_not_come_is_given_up(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, limits=ServiceLimits(body_seconds=0.05)) as served:
            caller = Caller(served.app, "/v1/completions")
            caller.upload(b'{"prompt"', more=True)
            await caller.start()
            assert (caller.status, caller.answer["error"]["code"]) == (408, "request_timeout")
            assert caller.answer_headers["connection"] == "close"

    run(test())


def test_a_client_that_waits_to_go_on_is_not_kept_after_a_refusal(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for expect, closes in ((False, False), (True, True)):
                headers = {"content-length": "9" * 9} | ({"expect": "100-continue"} if expect else {})
                caller = Caller(served.app, "/v1/completions", headers=headers)
                await caller.start()
                assert caller.status == 413
                assert ("connection" in caller.answer_headers) is closes

    run(test())
