"""The functions of page.js that need no page, under node: events, turns, fenced text, the path of an answer."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from typing import Any

import pytest

from fastllama.serve.page import FILES

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
RUN = """
import { readFileSync } from "node:fs";
const { source, given } = JSON.parse(readFileSync(0, "utf8"));
const page = await import("data:text/javascript;base64," + source);
const result = await (async () => { %s })();
console.log(JSON.stringify(result));
"""


def under_node(script: str, given: Any = None) -> Any:
    """The result of a script, in which `page` is the module page.js and `given` a value."""
    values = {"source": base64.b64encode(FILES["/page.js"][0]).decode(), "given": given}
    command = ["node", "--input-type=module", "-e", RUN % script]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EVENTS = """
const body = (chunks) => new ReadableStream({
  start(controller) { chunks.forEach((chunk) => controller.enqueue(chunk)); controller.close(); },
});
const read = async (chunks) => {
  const all = [];
  for await (const data of page.events(body(chunks))) all.push(data);
  return all;
};
const bytes = new TextEncoder().encode(given);
const cuts = [...bytes.keys()].map((at) => [bytes.slice(0, at), bytes.slice(at)]);
const each = [...bytes].map((byte) => Uint8Array.of(byte));
return Promise.all([[bytes], each, ...cuts].map(read));
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_events_are_the_same_wherever_their_bytes_are_split(end: str) -> None:
    lines = [
        ": ping",
        "",
        "data: né 🦊",
        "",
        "event: x",
        "id: 1",
        "data:one",
        "data:  two",
        "",
        "",
        "data: [DONE]",
        "",
        "",
    ]
    readings = under_node(EVENTS, end.join(lines))
    assert len(readings) > 60
    assert readings == [["né 🦊", "one\n two", "[DONE]"]] * len(readings)


def test_an_event_without_its_end_is_none() -> None:
    assert under_node(EVENTS, "data: 1\n\ndata: [DONE]\n")[0] == ["1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", [["", ""]]),
        (" a\n\n  b ", [[" a\n\n  b ", ""]]),
        ("a\n\n```python\n\nx = `1`\n```\n\nb", [["a", ""], ["\nx = `1`", "python"], ["b", ""]]),
        ("a\n```\nopen", [["a", ""], ["open", "code"]]),
        ("```\na\n```js\nb\n```", [["a\n```js\nb", "code"]]),
        ("say ``` and `x`", [["say ``` and `x`", ""]]),
        ("``` a`b\nc", [["``` a`b\nc", ""]]),
    ],
)
def test_lines_between_fences_are_code(text: str, shown: list[list[str]]) -> None:
    script = "return page.pieces(given).map((p) => [p.text, p.code ? p.language || 'code' : ''])"
    assert under_node(script, text) == shown


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TURNS = [turn("user", "1"), turn("assistant", "2"), turn("user", "3"), turn("assistant", ""), turn("user", "5")]


def test_what_is_sent_are_the_turns_with_text_after_the_system_prompt() -> None:
    script = "return given.systems.map((system) => page.messagesOf(given.turns, 0, system))"
    given = {"turns": [{**each, "facts": "x"} for each in TURNS], "systems": [" ", "Be."]}
    plain, with_system = under_node(script, given)
    assert plain == [turn("user", "1"), turn("assistant", "2"), turn("user", "3"), turn("user", "5")]
    assert with_system == [turn("system", "Be."), *plain]


def test_old_turns_are_dropped_a_question_with_its_answer_at_a_time() -> None:
    assert under_node("return [0, 2, 4].map((start) => page.nextStart(given, start))", TURNS) == [2, 4, -1]


@pytest.mark.parametrize(
    ("end", "shown"),
    [
        ({"usage": {"completion_tokens": 41}, "reason": "stop", "first": 0.5, "last": 2.5},
         "41 tokens · 20.0 tokens/s · first after 0.50 s"),
        ({"usage": {"completion_tokens": 1}, "reason": "length", "first": 0.5, "last": 0.5},
         "1 token · first after 0.50 s · cut at the length limit"),
        ({"usage": None, "reason": "content_filter", "first": 0, "last": 0}, "ended by content_filter"),
    ],
)  # fmt: skip
def test_the_speed_is_that_of_the_tokens_after_the_first(end: dict[str, Any], shown: str) -> None:
    assert under_node("return page.facts(given)", end) == shown


ANSWER = """
const sent = [], waits = [], steps = [];
const controller = new AbortController();
const send = async (messages) => {
  const next = given.replies[sent.length];
  sent.push(messages.map((message) => message.content).join(""));
  if (!next) throw new TypeError("fetch failed");
  return new Response(next.body, { status: next.status, headers: next.headers });
};
const wait = async (seconds) => { waits.push(seconds); };
const asked = { turns: given.turns, start: 0, system: "s", send, signal: controller.signal, wait };
let failure = null;
try {
  for await (const step of page.answer(asked)) steps.push(step);
} catch (error) { failure = { message: error.message, status: error.status }; }
return { sent, waits, steps, failure };
"""


def stream(*texts: str, end: str = "data: [DONE]\n\n") -> dict[str, Any]:
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "usage": None}]
    chunks += [{"choices": [{"delta": {"content": text}, "finish_reason": None}], "usage": None} for text in texts]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None}]
    chunks += [{"choices": [], "usage": {"completion_tokens": 2}}]
    return {"status": 200, "body": "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end}


def refused(status: int, code: str, message: str = "no", after: str | None = None) -> dict[str, Any]:
    headers = {"retry-after": after} if after else {}
    return {"status": status, "body": json.dumps({"error": {"message": message, "code": code}}), "headers": headers}


def asked(*replies: dict[str, Any], turns: list[dict[str, str]] = TURNS) -> Any:
    return under_node(ANSWER, {"replies": replies, "turns": turns})


END = {"reason": "stop", "usage": {"completion_tokens": 2}}


def test_an_answer_comes_as_its_texts_and_its_end() -> None:
    found = asked(stream("a", "b"))
    assert found == {"sent": ["s1235"], "waits": [], "steps": [{"text": "a"}, {"text": "b"}, END], "failure": None}


def test_a_stream_that_is_cut_is_no_whole_answer() -> None:
    found = asked(stream("a", end=""))
    assert found["steps"] == [{"text": "a"}]
    assert "not all of it" in found["failure"]["message"]


def test_an_error_after_the_first_byte_is_shown() -> None:
    found = asked(stream("a", end='data: {"error": {"message": "it broke", "code": "engine_error"}}\n\n'))
    assert (found["steps"], found["failure"]["message"]) == ([{"text": "a"}], "it broke")


def test_turns_beyond_the_context_are_dropped_until_the_rest_fits() -> None:
    full = refused(400, "context_length_exceeded")
    found = asked(full, full, stream("a"))
    assert found["sent"] == ["s1235", "s35", "s5"]
    assert found["steps"] == [{"start": 2}, {"start": 4}, {"text": "a"}, END]


def test_a_question_that_does_not_fit_alone_is_refused_in_the_servers_words() -> None:
    found = asked(refused(400, "context_length_exceeded", "1090 tokens"), turns=TURNS[:1])
    assert (len(found["sent"]), found["failure"]["message"]) == (1, "1090 tokens")


def test_a_server_that_loads_is_asked_again() -> None:
    found = asked(refused(503, "loading", after="2"), refused(503, "loading", after="900"), stream("a"))
    assert found["waits"] == [2, 30]
    assert found["steps"] == [{"waiting": 2}, {"waiting": 30}, {"text": "a"}, END]


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (refused(503, "shutting_down", "the server is stopping.", "5"), "the server is stopping"),
        (
            refused(401, "invalid_api_key", "the key is unknown"),
            "the key is unknown. Enter the API key in the settings",
        ),
        (refused(429, "queue_full", "it is busy", "7"), "it is busy. Try again in 7 s"),
        ({"status": 502, "body": "<html>"}, "the server answers with status 502"),
    ],
    ids=["shutting down", "key", "busy", "proxy"],
)
def test_a_refusal_explains_what_to_do(reply: dict[str, Any], shown: str) -> None:
    found = asked(reply)
    assert (found["failure"], found["steps"]) == ({"message": shown, "status": reply["status"]}, [])


def test_a_server_that_is_away_is_reported() -> None:
    assert asked()["failure"]["message"] == "the server cannot be reached"


def test_waiting_ends_at_once_when_it_is_stopped() -> None:
    script = """
    const controller = new AbortController();
    const waiting = page.pause(3600, controller.signal);
    controller.abort(new Error("stopped"));
    return waiting.catch((error) => error.message);
    """
    assert under_node(script) == "stopped"
