"""The process: signals while it loads, serves and drains; an engine that fails for good; its exit statuses."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastllama.serve.keys import new_key
from tests.serve.asgi import COMPLETION, ENDLESS
from tests.serve.live import LiveServer, live, read_until, wait_for

COMPLETIONS = "/v1/completions"


class Asking:
    """A request on a thread of its own, and its answer."""

    def __init__(self, server: LiveServer, body: Any) -> None:
        self.response: httpx.Response | None = None
        self.thread = threading.Thread(target=self._ask, args=(server, body))
        self.thread.start()

    def _ask(self, server: LiveServer, body: Any) -> None:
        self.response = server.post(COMPLETIONS, body)

    @property
    def answer(self) -> httpx.Response:
        self.thread.join()
        assert self.response is not None
        return self.response


def running(server: LiveServer, *bodies: Any) -> list[Asking]:
    """Requests that run, all of them."""
    found = [Asking(server, body) for body in bodies]
    wait_for(lambda: server.metric("num_requests_running") == len(bodies))
    return found


def events(response: httpx.Response) -> list[Any]:
    found = [each.removeprefix("data: ") for each in response.text.split("\n\n")[:-1]]
    return [json.loads(each) if each.startswith("{") else each for each in found]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_while_the_socket_listens(number: int) -> None:
    with live(faults="step=0.01") as server:
        whole, stream = running(server, ENDLESS | {"max_tokens": 300}, ENDLESS | {"max_tokens": 300, "stream": True})
        server.signal(number)
        wait_for(lambda: server.get("/ready").status_code == 503)
        assert server.get("/health").status_code == 200
        refused = server.post(COMPLETIONS, COMPLETION)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert whole.answer.json()["usage"]["completion_tokens"] == 300
        assert events(stream.answer)[-1] == "[DONE]"
        assert server.wait() == 0
        assert signal.Signals(number).name in server.printed
        assert "Traceback" not in server.printed


def test_what_runs_longer_than_the_drain_gets_an_error() -> None:
    with live("--drain-timeout", "0.2", faults="step=0.02") as server:
        whole, stream = running(server, ENDLESS, ENDLESS | {"stream": True})
        server.signal(signal.SIGTERM)
        assert (whole.answer.status_code, whole.answer.json()["error"]["code"]) == (503, "shutting_down")
        assert events(stream.answer)[-1]["error"]["code"] == "shutting_down"
        assert server.wait() == 0
        assert "Traceback" not in server.printed


def test_the_second_signal_ends_at_once() -> None:
    with live(faults="step=0.1") as server, server.connect(COMPLETIONS, ENDLESS):
        wait_for(lambda: server.metric("num_requests_running") == 1)
        server.signal(signal.SIGTERM)
        wait_for(lambda: "SIGTERM" in server.printed)
        server.signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM


def test_a_connection_that_sends_nothing_holds_up_no_end() -> None:
    with live() as server, server.connect(COMPLETIONS, COMPLETION, missing=5) as upload:
        server.signal(signal.SIGTERM)
        assert b"shutting_down" in read_until(upload, b"shutting_down")
        assert server.wait() == 0


def test_a_server_that_loads_answers_probes_and_ends_at_a_signal() -> None:
    with live(ready=False, faults="load=1000") as server:
        wait_for(lambda: _answers(server))
        assert server.get("/health").status_code == 200
        ready = server.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "loading")
        refused = server.post(COMPLETIONS, COMPLETION)
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def _answers(server: LiveServer) -> bool:
    try:
        return server.get("/health").is_success
    except httpx.ConnectError:  # it is bound, and does not listen yet
        return False


def test_an_engine_that_fails_for_good_ends_everything_with_its_cause_and_the_process_with_70() -> None:
    with live(faults="step=0.02") as server:
        whole, stream = running(server, ENDLESS, ENDLESS | {"stream": True})
        server.signal(signal.SIGUSR1)
        assert whole.answer.status_code == 500
        for error in (whole.answer.json()["error"], events(stream.answer)[-1]["error"]):
            assert (error["code"], "planted in the device" in error["message"]) == ("engine_error", True)
        assert server.wait() == 70
        assert "the engine has a permanent fault: RuntimeError('planted in the device')" in server.printed


def test_a_hangup_reads_the_keys_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    (first, line), (second, other) = new_key("alice"), new_key("bob")
    keys.write_text(line + "\n", encoding="utf-8")
    with live("--api-keys", str(keys), env={"FASTLLAMA_API_KEY": ""}) as server, server.client() as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert (status(first), status(second)) == (200, 401)
        keys.write_text(other + "\n", encoding="utf-8")
        server.signal(signal.SIGHUP)
        wait_for(lambda: status(second) == 200)
        assert status(first) == 401
        assert first not in server.printed + server.logged
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
