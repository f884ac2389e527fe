"""The application: endpoints, access, and the order and form of refusals."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

import fastllama
from fastllama import LLM, SamplingParams
from fastllama.serve import translate
from fastllama.serve.app import create_app
from fastllama.serve.keys import Keyring
from fastllama.serve.options import ServerOptions
from fastllama.serve.service import Service
from tests.serve.asgi import CHAT, COMPLETION, Caller, keyring_of, run, serving

NAME = "https://chat.example"


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


def test_both_completions_answer_what_the_llm_does(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    (text,) = llm.generate("Once upon a time", greedy)
    expected = llm.chat([{"role": "user", "content": "Once upon a time"}], greedy)

    async def test() -> None:
        async with serving(llm) as served:
            completion = await served.post("/v1/completions", COMPLETION)
            assert completion.json()["choices"][0]["text"] == text.outputs[0].text
            chat = await served.post("/v1/chat/completions", CHAT)
            assert chat.json()["choices"][0]["message"]["content"] == expected.outputs[0].text
            assert chat.json()["id"] == f"chatcmpl-{chat.headers['x-request-id']}"

    run(test())


def test_the_prompts_of_one_request_run_at_once_and_keep_their_places(llm: LLM) -> None:
    prompts = ["Once upon a time", "The dog", "Lily and Tom", "One day"]
    greedy = SamplingParams(temperature=0, max_tokens=8)
    alone = [llm.generate(prompt, greedy)[0].outputs[0].text for prompt in prompts]

    async def test() -> None:
        async with serving(llm) as served:
            answer = (await served.post("/v1/completions", COMPLETION | {"prompt": prompts})).json()
            assert [choice["text"] for choice in answer["choices"]] == alone
            assert answer["usage"]["completion_tokens"] == 4 * 8

    run(test())


def test_tokenize_and_detokenize_undo_each_other(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            tokens = (await served.post("/tokenize", {"prompt": "Once upon a time"})).json()["tokens"]
            again = await served.post("/detokenize", {"tokens": tokens})
            assert again.json()["prompt"].endswith("Once upon a time")

    run(test())


def test_models_are_listed_and_found_by_names_with_slashes(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, names=("meta/tiny-chat", "tiny")) as served:
            models = (await served.client.get("/v1/models")).json()["data"]
            assert [(each["id"], each["max_model_len"]) for each in models] == [
                ("meta/tiny-chat", 1024),
                ("tiny", 1024),
            ]
            card = (await served.client.get("/v1/models/meta/tiny-chat")).json()
            assert "Acceptable Use Policy" in card.pop("notice")
            assert card == models[0]
            error = error_of(response := await served.client.get("/v1/models/gpt-4"))
            assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert (await served.client.get("/version")).json() == {"version": fastllama.__version__}

    run(test())


def test_an_unknown_path_is_answered_with_the_endpoints(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for method, path in [
                ("POST", "/v1/embeddings"),
                ("POST", "/v1/responses"),
                ("GET", "/v1/"),
                ("PUT", "/x y"),
            ]:
                response = await served.client.request(method, path)
                error = error_of(response)
                assert (response.status_code, error["code"]) == (404, "unknown_url")
                assert "POST /v1/chat/completions" in error["message"]
            wrong = await served.client.get("/v1/completions")
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
            assert error_of(wrong)["code"] == "method_not_allowed"
            assert (await served.client.delete("/health")).headers["allow"] == "GET, HEAD"
            for method, path in (("POST", "/v1/models/"), ("GET", "/v1/models/"), ("GET", "/")):
                assert len(error_of(await served.client.request(method, path + "x" * 60_000))["message"]) < 1000

    run(test())


def test_a_request_has_its_clients_id_where_that_is_printable_and_short(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for given, kept in [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("two words", False)]:
                response = await served.client.get("/version", headers={"x-request-id": given})
                assert (response.headers["x-request-id"] == given) is kept
            first, second = [await served.client.get("/version") for _ in range(2)]
            assert first.headers["x-request-id"] != second.headers["x-request-id"]

    run(test())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8229", 200),
        ("[::1]:8229", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8229", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1].evil.example", 403),
        ("", 403),
        ("localhost:8229:1", 403),
    ],
)
def test_without_keys_only_names_of_this_machine_are_hosts(llm: LLM, host: str, status: int) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for path in ("/", "/health", "/v1/models"):
                response = await served.client.get(path, headers={"host": host})
                assert response.status_code == status
                assert status == 200 or error_of(response)["code"] == "host_not_allowed"

    run(test())


def test_with_keys_any_host_is_right(llm: LLM, tmp_path: Path) -> None:
    ring, header = keyring_of(tmp_path)

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            answer = await served.client.get("/v1/models", headers=header | {"host": "llm.example"})
            assert answer.status_code == 200

    run(test())


def test_everything_but_probes_and_page_needs_a_key_and_refuses_before_it_reads_a_body(
    llm: LLM, tmp_path: Path
) -> None:
    ring, header = keyring_of(tmp_path)

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            for path in ("/", "/page.js", "/page.css", "/health", "/ready"):
                assert (await served.client.get(path)).status_code == 200
            for path in ("/metrics", "/version", "/v1/models", "/nothing"):
                response = await served.client.get(path)
                assert (response.status_code, error_of(response)["code"]) == (401, "missing_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            caller = Caller(served.app, "/v1/completions", COMPLETION, {"authorization": "Bearer fl-no"})
            await caller.start()
            assert (caller.status, caller.answer["error"]["code"], caller.num_received) == (401, "invalid_api_key", 0)
            assert (await served.post("/v1/completions", COMPLETION, header)).status_code == 200

    run(test())


def test_a_keys_limits_hold_and_are_reported(llm: LLM, tmp_path: Path) -> None:
    ring, header = keyring_of(tmp_path, requests_per_minute=2, tokens_per_minute=1000, max_tokens=3)

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            first = await served.post("/v1/completions", COMPLETION, header)
            assert first.json()["usage"]["completion_tokens"] == 3
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            spent = 1000 - int(first.headers["x-ratelimit-remaining-tokens"])
            assert spent == first.json()["usage"]["prompt_tokens"]
            await served.post("/v1/completions", COMPLETION, header)
            third = await served.post("/v1/completions", COMPLETION, header)
            assert (third.status_code, error_of(third)["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(third.headers["retry-after"]) <= 120
            assert third.headers["x-ratelimit-limit-tokens"] == "1000"
            key = ring.find(header["authorization"])
            assert key.num_running == 0
            left = int(key.headers()["x-ratelimit-remaining-tokens"])
            assert left == 1000 - 2 * (spent + 3)

    run(test())


def test_while_the_model_loads_probes_answer_and_requests_get_a_retry_time() -> None:
    async def test() -> None:
        ring = Keyring.open(None, None)
        app = create_app(Service(ring), hosts=ServerOptions(ring).hosts)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "loading")
            for path in ("/ready", "/v1/models", "/v1/models/tiny"):
                response = await client.get(path)
                assert (response.status_code, error_of(response)["code"]) == (503, "loading")
                assert int(response.headers["retry-after"]) > 0
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                assert error_of(await client.post(path, json=COMPLETION))["code"] == "loading"
            assert (await client.get("/")).status_code == 200
            assert b'fastllama:phase{phase="loading"} 1.0' in (await client.get("/metrics")).content

    run(test())


def test_other_sites_may_ask_only_where_they_are_named_and_then_with_streams_and_errors_too(
    llm: LLM, tmp_path: Path
) -> None:
    ring, header = keyring_of(tmp_path)
    preflight = {
        "origin": NAME,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }

    async def test() -> None:
        async with serving(llm, keyring=ring) as served:
            assert (await served.client.options("/v1/completions", headers=preflight)).status_code == 405
            answer = await served.post("/v1/completions", COMPLETION, header | {"origin": NAME})
            assert "access-control-allow-origin" not in answer.headers
        async with serving(llm, keyring=ring, cors=(NAME,)) as served:
            allowed = await served.client.options("/v1/completions", headers=preflight)
            assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, NAME)
            assert "authorization" in allowed.headers["access-control-allow-headers"]
            for body, given, status in [
                (COMPLETION, header, 200),
                (COMPLETION | {"stream": True}, header, 200),
                ({}, {}, 401),
            ]:
                answer = await served.post("/v1/completions", body, given | {"origin": NAME})
                assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, NAME)
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
            other = await served.client.options(
                "/v1/completions", headers=preflight | {"origin": "https://evil.example"}
            )
            assert "access-control-allow-origin" not in other.headers
            assert (other.status_code, error_of(other)["code"]) == (400, "cors_refused")
            assert "Disallowed CORS origin" in error_of(other)["message"]
            private = {"access-control-request-private-network": "true"}  # asked for by Chrome where a page is public
            allowed = await served.client.options("/v1/completions", headers=preflight | private)
            assert (allowed.status_code, allowed.headers["access-control-allow-private-network"]) == (200, "true")

    run(test())


def test_a_bug_is_one_error_for_its_client_and_a_traceback_in_the_log(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setattr(translate, "tokenize", broken)
    monkeypatch.setattr("fastllama.serve.app._cards", broken)

    async def test() -> None:
        async with serving(llm) as served:
            for response in (await served.client.get("/v1/models"), await served.post("/tokenize", {"prompt": "a"})):
                assert (response.status_code, error_of(response)["type"]) == (500, "server_error")

    with caplog.at_level(logging.ERROR):
        run(test())
    assert ["Traceback" in record.getMessage() for record in caplog.records] == [True, True]
    assert "planted" in caplog.text


def test_requests_are_logged_and_counted_but_probes_that_go_well(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as served:
            for path in ("/health", "/ready", "/metrics"):
                await served.client.get(path)
            answer = await served.post("/v1/completions", COMPLETION | {"user": "bob"}, {"x-request-id": "mine"})
            await served.client.get("/nothing")
            done, missing = served.logged()
            usage = answer.json()["usage"]
            assert (done["id"], done["route"], done["status"], done["reason"]) == (
                "mine",
                "/v1/completions",
                200,
                "length",
            )
            assert (done["prompt_tokens"], done["completion_tokens"]) == (usage["prompt_tokens"], 8)
            assert 0 <= done["queue_s"] <= done["first_token_s"] <= done["total_s"]
            assert "bob" not in served.log.getvalue()
            assert (missing["route"], missing["status"], missing["reason"]) == ("other", 404, "unknown_url")
            metrics = (await served.client.get("/metrics")).text
            assert 'fastllama:http_requests_total{route="/v1/completions",status="200"} 1.0' in metrics
            assert 'fastllama:tokens_total{key="",kind="generated"} 8.0' in metrics

    run(test())


def test_a_prompt_that_takes_long_to_translate_delays_no_other_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop answers while a thread works."""
    original = translate.tokenize
    loops: list[Any] = []

    def on_a_thread(*given: Any) -> bytes:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        loops.append(1)
        return original(*given)

    monkeypatch.setattr(translate, "tokenize", on_a_thread)

    async def test() -> None:
        async with serving(llm) as served:
            assert (await served.post("/tokenize", {"prompt": "a"})).is_success
            assert loops == [1]

    run(test())
