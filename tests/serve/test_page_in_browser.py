"""The page in a headless Chromium, before a server whose answers the test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastllama.serve.page import FILES, HEADERS
from tools.page_shot import SHOTS, STATE, Chromium, chromium, command, shoot

pytestmark = pytest.mark.skipif(command() is None, reason="no Chromium is installed")


class Site(ThreadingHTTPServer):
    """A server on a free port, so an origin without memories. reply: answers a chat request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reply: Callable[[Handler, dict[str, Any]], None] = lambda handler, body: handler.stream("Fine.")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: object) -> None:
        pass

    def send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-type": kind}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self.send(
            status, "application/json", json.dumps({"error": {"message": message, "code": code}}).encode(), headers
        )

    def event(self, **chunk: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def stream(self, *texts: str, reason: str = "stop") -> None:
        self.send(200, "text/event-stream", b": ping\n\n", {})
        for text in texts:
            self.event(choices=[{"delta": {"content": text}}])
        self.event(choices=[{"delta": {}, "finish_reason": reason}])
        self.event(choices=[], usage={"completion_tokens": 3})
        self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card = {"id": "toy", "max_model_len": 64}
            self.send(200, "application/json", json.dumps({"data": [card]}).encode(), {})
        else:
            body, kind = FILES[self.path.split("?")[0]]
            self.send(200, kind, body, HEADERS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.reply(self, body)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as tab:
        yield tab


@pytest.fixture
def tab(browser: Chromium) -> Iterator[Chromium]:
    browser.complaints.clear()
    browser.look(1100, 760, "light")
    yield browser
    browser.open("about:blank#")


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def press(tab: Chromium, key: str, modifiers: int = 0) -> None:
    text = {"text": "\r"} if key == "Enter" else {}
    code = {"Enter": 13, "Escape": 27}[key]
    for kind in ("keyDown", "keyUp"):
        details = {
            "key": key,
            "windowsVirtualKeyCode": code,
            "modifiers": modifiers,
            **(text if kind == "keyDown" else {}),
        }
        tab.call("Input.dispatchKeyEvent", type=kind, **details)


def submit(tab: Chromium, text: str) -> None:
    tab.evaluate("document.getElementById('prompt').focus()")
    tab.call("Input.insertText", text=text)
    press(tab, "Enter")


def set_field(tab: Chromium, name: str, value: str) -> None:
    tab.evaluate(f"""{{
        const field = document.getElementById({json.dumps(name)});
        field.value = {json.dumps(value)};
        field.dispatchEvent(new Event("input"));
    }}""")


def answered(tab: Chromium, count: int = 1) -> dict[str, Any]:
    """The last of so many answers, once it has ended."""
    tab.wait(f"document.querySelectorAll('article.assistant').length === {count} && {STATE}.busy === 'false'")
    return tab.evaluate(STATE)


def turns(tab: Chromium) -> list[list[str]]:
    kept = tab.evaluate("localStorage.getItem('fastllama.conversation')")
    return [[each["role"], each["content"]] for each in json.loads(kept)["turns"]]


def test_an_answer_is_shown_as_text_with_its_speed(tab: Chromium, site: Site) -> None:
    text = "<b>1 & 2</b>\n\n  <script>alert(1)</script>"
    site.reply = lambda handler, body: handler.stream(text, "\n```py\nx\n```")
    tab.open(f"{site.url}/?prompt=Say%20%3Ci%3Eit")
    state = answered(tab)
    assert text in tab.evaluate("document.querySelector('.assistant .content span').textContent")
    assert tab.evaluate("document.querySelector('.assistant pre').textContent") == "x"
    assert "3 tokens" in state["text"]
    assert tab.evaluate("document.querySelectorAll('article b, article i, article script').length") == 0
    assert tab.evaluate("document.getElementById('model').textContent") == "toy · context of 64 tokens"
    assert tab.evaluate("location.search") == "", "a reload would ask again"
    assert tab.complaints == []
    (body,) = site.asked
    assert body["messages"] == [{"role": "user", "content": "Say <i>it"}]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_settings_are_sent_and_kept(tab: Chromium, site: Site) -> None:
    tab.open(site.url)
    for name, value in {"system": "Be brief.", "temperature": "0.3", "length": "7"}.items():
        set_field(tab, name, value)
    tab.open(f"{site.url}/?prompt=Hello")
    answered(tab)
    (body,) = site.asked
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.3, 7)


def test_a_conversation_outlives_a_reload_until_it_is_forgotten(tab: Chromium, site: Site) -> None:
    tab.open(f"{site.url}/?prompt=Hello")
    answered(tab)
    tab.open(f"{site.url}/?prompt=Again")
    answered(tab, 2)
    conversation = [["user", "Hello"], ["assistant", "Fine."], ["user", "Again"], ["assistant", "Fine."]]
    assert turns(tab) == conversation
    assert [message["content"] for message in site.asked[1]["messages"]] == ["Hello", "Fine.", "Again"]
    tab.evaluate("document.getElementById('forget').click()")
    assert turns(tab) == []
    assert tab.evaluate("document.querySelectorAll('article').length") == 0
    submit(tab, "New")
    answered(tab)
    first, second, third = (headers["x-session-id"] for headers in site.headers)
    assert first == second != third
    assert len(first) == 32


def test_enter_sends_and_with_shift_starts_a_line(tab: Chromium, site: Site) -> None:
    tab.open(site.url)
    tab.call("Input.insertText", text="one")
    press(tab, "Enter", modifiers=8)
    tab.call("Input.insertText", text="two")
    assert site.asked == []
    press(tab, "Enter")
    answered(tab)
    assert site.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_escape_stops_an_answer_and_its_text_stays(tab: Chromium, site: Site) -> None:
    def endless(handler: Handler, body: dict[str, Any]) -> None:
        handler.send(200, "text/event-stream", b"", {})
        handler.event(choices=[{"delta": {"content": "It begins"}}])
        try:
            while not handler.server.left.wait(0.01):
                handler.wfile.write(b": ping\n\n")
        except OSError:
            handler.server.left.set()

    site.reply = endless
    tab.open(f"{site.url}/?prompt=Go")
    try:
        tab.wait("document.querySelector('.assistant')?.innerText.includes('It begins')")
        assert tab.evaluate("document.getElementById('send').hidden")
        press(tab, "Escape")
        state = answered(tab)
        assert "stopped" in state["text"]
        assert "It begins" in state["text"]
        assert not tab.evaluate("document.getElementById('send').hidden")
        assert site.left.wait(60), "the server did not notice"
        assert turns(tab)[1] == ["assistant", "It begins"]
    finally:
        site.left.set()


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(tab: Chromium, site: Site) -> None:
    def guarded(handler: Handler, body: dict[str, Any]) -> None:
        if handler.headers["authorization"] == "Bearer secret":
            handler.stream("Welcome.")
        else:
            handler.refuse(401, "missing_api_key", "no key was sent")

    site.reply = guarded
    tab.open(f"{site.url}/?prompt=Hello")
    assert "No key was sent. Enter the API key in the settings." in answered(tab)["failure"]
    assert tab.evaluate("document.activeElement.id") == "key"
    tab.call("Input.insertText", text="secret")
    tab.evaluate("document.querySelector('.failure button').click()")
    tab.wait("document.querySelector('.assistant')?.innerText.includes('Welcome.')")
    answered(tab)
    assert "secret" not in tab.evaluate("JSON.stringify(localStorage) + location.href")
    assert "secret" in tab.evaluate("JSON.stringify(sessionStorage)")


def test_a_cut_answer_is_shown_as_broken(tab: Chromium, site: Site) -> None:
    def cut(handler: Handler, body: dict[str, Any]) -> None:
        handler.send(200, "text/event-stream", b"", {})
        handler.event(choices=[{"delta": {"content": "Half of"}}])

    site.reply = cut
    tab.open(f"{site.url}/?prompt=Hello")
    state = answered(tab)
    assert "Half of" in state["text"]
    assert "not all of it" in state["failure"]


def test_the_last_answer_can_be_had_again(tab: Chromium, site: Site) -> None:
    site.reply = lambda handler, body: handler.refuse(429, "queue_full", "it is busy", **{"retry-after": "7"})
    tab.open(f"{site.url}/?prompt=One")
    assert "It is busy. Try again in 7 s." in answered(tab)["failure"]
    submit(tab, "Two")
    answered(tab, 2)
    site.reply = lambda handler, body: handler.stream("Fine.")
    shown = "[...document.querySelectorAll('.failure button')].filter((button) => button.checkVisibility())"
    assert tab.evaluate(f"{shown}.length") == 1
    tab.evaluate(f"{shown}[0].click()")
    tab.wait("document.querySelector('article:last-of-type').innerText.includes('Fine.')")
    answered(tab, 2)
    assert turns(tab) == [["user", "One"], ["assistant", ""], ["user", "Two"], ["assistant", "Fine."]]


def test_an_answer_that_was_left_is_shown_as_broken(tab: Chromium, site: Site) -> None:
    def begun(handler: Handler, body: dict[str, Any]) -> None:
        handler.send(200, "text/event-stream", b"", {})
        handler.event(choices=[{"delta": {"content": "Half of"}}])
        handler.server.left.wait()

    site.reply = begun
    tab.open(f"{site.url}/?prompt=Hello")
    try:
        tab.wait("document.querySelector('.assistant')?.innerText.includes('Half of')")
        tab.open(f"{site.url}/page.css")
        tab.open(site.url)
        state = tab.wait(STATE)
        assert "Half of" in state["text"]
        assert "left before the answer ended" in state["failure"]
    finally:
        site.left.set()


def test_a_notice_shows_when_the_oldest_messages_are_dropped(tab: Chromium, site: Site) -> None:
    def short(handler: Handler, body: dict[str, Any]) -> None:
        if len(body["messages"]) > 1:
            handler.refuse(400, "context_length_exceeded", "too long")
        else:
            handler.stream("Fine.")

    site.reply = short
    tab.open(f"{site.url}/?prompt=One")
    answered(tab)
    submit(tab, "Two")
    assert "no longer sees the oldest messages" in answered(tab, 2)["text"]
    submit(tab, "Three")
    answered(tab, 3)
    sent = [[message["content"] for message in body["messages"]] for body in site.asked]
    assert sent == [["One"], ["One", "Fine.", "Two"], ["Two"], ["Two", "Fine.", "Three"], ["Three"]]


@pytest.mark.parametrize(
    ("longest", "third"), [("", ["Two", "Fine.", "Three"]), ("3", ["One", "Fine.", "Two", "Fine.", "Three"])]
)
def test_an_answer_cut_by_a_full_context_makes_room_for_the_next(
    tab: Chromium, site: Site, longest: str, third: list[str]
) -> None:
    site.reply = lambda handler, body: handler.stream("Fine.", reason="length")  # of 3 tokens
    tab.open(site.url)
    set_field(tab, "length", longest)
    submit(tab, "One")
    assert "oldest" not in answered(tab)["text"], "there is only one question"
    submit(tab, "Two")
    assert ("no longer sees the oldest messages" in answered(tab, 2)["text"]) == (not longest)
    submit(tab, "Three")
    answered(tab, 3)
    assert [message["content"] for message in site.asked[2]["messages"]] == third


def test_pictures_are_taken_of_a_conversation_that_went_well(site: Site, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    shoot(site.url, tmp_path, ["One", "Two"])
    for name, (width, height, _) in SHOTS.items():
        with image.open(tmp_path / name) as picture:
            assert picture.size == (width, height)
    assert [len(body["messages"]) for body in site.asked] == [1, 3] * len(SHOTS)


def test_no_picture_is_taken_of_a_failure(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    site.reply = lambda handler, body: handler.refuse(500, "engine_error", "it broke")
    with pytest.raises(RuntimeError, match="It broke"):
        shoot(site.url, tmp_path, ["One"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(tab: Chromium, site: Site, scheme: str) -> None:
    line = "x" * 200
    site.reply = lambda handler, body: handler.stream(line, f"\n```\n{line}\n```")
    tab.look(400, 760, scheme)
    tab.open(f"{site.url}/?prompt={line}")
    answered(tab)
    for name in ("settings", "limits"):
        tab.evaluate(f"document.getElementById('{name}').open = true")
    widths = "[...document.querySelectorAll('body, header, aside, #log, #composer')].map((e) => e.scrollWidth)"
    assert max(tab.evaluate(widths)) <= 400
    ground = {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 21, 19)"}[scheme]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == ground
