"""API keys: who is let in, legal files of keys, and limits on a clock that the tests turn."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.serve.errors import ApiError
from fastllama.serve.keys import Key, Keyring, new_key

SECRETS = {"alice": "secret-of-alice", "bob": "secret-of-bob"}


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def line(whose: str, **values: Any) -> str:
    return json.dumps({"name": whose, "sha256": sha256(SECRETS[whose])} | values) + "\n"


def written(folder: Path, *lines: str) -> Path:
    file = folder / "keys.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def limited(folder: Path, clock: Clock, **limits: int) -> Key:
    """Alice's key with these limits."""
    ring = Keyring.open(None, written(folder, line("alice", **limits)), clock=clock)
    return ring.find("Bearer secret-of-alice")


def refusal(key: Key) -> ApiError:
    with pytest.raises(ApiError) as raised:
        key.admit()
    assert (raised.value.status, raised.value.code) == (429, "rate_limit_exceeded")
    return raised.value


def test_without_keys_everybody_may_do_everything() -> None:
    ring = Keyring.open(None, None)
    assert not ring
    for header in (None, "Bearer anything", "nonsense"):
        key = ring.find(header)
        assert (key.name, key.max_tokens) == ("", None)
        ticket = key.admit()
        ticket.charge(10**9)
        assert ticket.headers() == {}


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    ring = Keyring.open("secret-of-env", written(tmp_path, line("alice", max_tokens=7), "\n", line("bob")))
    assert ring
    found = {name: ring.find(f"Bearer secret-of-{name}") for name in ("env", "alice", "bob")}
    assert {name: key.name for name, key in found.items()} == {"env": "env", "alice": "alice", "bob": "bob"}
    assert [key.max_tokens for key in found.values()] == [None, 7, None]
    assert ring.find("bearer  secret-of-bob ").name == "bob", "the scheme is of any case"
    assert "secret-of" not in repr([vars(ring), *map(vars, found.values())])


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic c2VjcmV0", "secret-of-alice"])
def test_a_request_without_a_key_learns_how_to_send_one(header: str | None, tmp_path: Path) -> None:
    ring = Keyring.open(None, written(tmp_path, line("alice")))
    with pytest.raises(ApiError, match="Authorization: Bearer KEY") as raised:
        ring.find(header)
    assert (raised.value.status, raised.value.code) == (401, "missing_api_key")
    assert raised.value.headers == {"www-authenticate": "Bearer"}


@pytest.mark.parametrize("secret", ["secret-of-Alice", "secret-of-alic", "secret-of-alice x", "\ud800", "\xe9" * 9])
def test_a_wrong_key_is_refused_and_not_repeated(secret: str, tmp_path: Path) -> None:
    ring = Keyring.open(None, written(tmp_path, line("alice")))
    with pytest.raises(ApiError) as raised:
        ring.find(f"Bearer {secret}")
    assert (raised.value.status, raised.value.code) == (401, "invalid_api_key")
    assert raised.value.headers == {"www-authenticate": "Bearer"}
    assert secret not in str(raised.value)


@pytest.mark.parametrize("name", ["env", "alice", "bob"])
def test_a_key_is_compared_with_every_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring.open("secret-of-env", written(tmp_path, line("alice"), line("bob")))
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert ring.find(f"Bearer secret-of-{name}").name == name
    assert len(set(compared)) == 3


@pytest.mark.parametrize("secret", ["", "  ", "two words", "line\n", "caf\xe9"])
def test_a_key_of_the_environment_that_no_header_carries_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match=r"^FASTLLAMA_API_KEY .*; legal: visible ASCII") as raised:
        Keyring.open(secret, None)
    assert not secret.strip() or secret not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 2: Expecting value"),
        ("[1]", "line 2: the line is \\[1\\]; legal: a JSON object"),
        ("[" * 100_000, "line 2: "),
        ('{"sha256": "%s"}' % ("0" * 64), "line 2: name is missing; legal"),
        (line("bob", name="two words"), "line 2: name is 'two words'; legal"),
        (line("bob", name=3), "line 2: name is 3; legal"),
        ('{"name": "bob"}', "line 2: sha256 is missing; legal: 64 hexadecimal digits"),
        (line("bob", sha256="secret-of-bob"), "line 2: sha256 is something else; legal: 64 hexadecimal digits"),
        (line("bob", max_token=3), "line 2: unknown field 'max_token' \\(did you mean 'max_tokens'\\?\\); legal: name"),
        (line("bob", max_tokens=0), "line 2: max_tokens is 0; legal: an integer from 1"),
        (line("bob", max_concurrent=True), "line 2: max_concurrent is True; legal: an integer"),
        (line("bob", requests_per_minute=1.5), "line 2: requests_per_minute is 1.5; legal: an integer"),
        (line("bob", tokens_per_minute="9"), "line 2: tokens_per_minute is '9'; legal: an integer"),
        ('{"name": "bob", "name": "carl"}', "line 2: field 'name' occurs twice"),
        (line("alice"), "line 2: name 'alice' is also that of line 1; legal: a unique name"),
        (line("bob", name="env"), "line 2: name 'env' is also that of FASTLLAMA_API_KEY"),
        (line("alice", name="other"), "line 2: sha256 is also that of 'alice'"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_line_and_field(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, line("alice"), text)
    with pytest.raises(ValueError, match=f"^{file}, {message}") as raised:
        Keyring.open("secret-of-env", file)
    assert "secret-of" not in str(raised.value), "a key in the wrong place must not reach a log"
    assert "\n" not in str(raised.value)


def test_a_file_without_a_key_does_not_open_the_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no key"):
        Keyring.open(None, written(tmp_path, "\n"))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="latin is not UTF-8"):
        Keyring.open(None, tmp_path / "latin")
    with pytest.raises(FileNotFoundError):
        Keyring.open(None, tmp_path / "absent")


def test_null_is_no_limit_and_windows_may_write_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "\ufeff" + line("alice", max_tokens=None).replace("\n", "\r\n"))
    assert Keyring.open(None, file).find("Bearer secret-of-alice").max_tokens is None


def test_a_new_key_opens_the_server_of_its_line(tmp_path: Path) -> None:
    secret, text = new_key("carl")
    assert new_key("carl")[0] != secret
    assert len(secret) > 40
    assert secret not in text
    assert Keyring.open(None, written(tmp_path, text)).find(f"Bearer {secret}").name == "carl"
    with pytest.raises(ValueError, match="name is 'a b'; legal"):
        new_key("a b")


def test_requests_refill_continuously(tmp_path: Path) -> None:
    clock = Clock()
    key = limited(tmp_path, clock, requests_per_minute=4)
    tickets = [key.admit() for _ in range(4)]
    assert [tickets[0].headers()[f"x-ratelimit-{part}-requests"] for part in ("limit", "remaining", "reset")] == [
        "4",
        "0",
        "1m0s",
    ]
    error = refusal(key)
    assert "requests_per_minute is 4" in str(error)
    assert error.headers["retry-after"] == "15"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 14.9
    refusal(key)
    clock.now += 0.2
    key.admit()
    refusal(key)
    clock.now += 3600
    assert key.headers()["x-ratelimit-remaining-requests"] == "4", "no more than a minute's are saved up"
    assert key.headers()["x-ratelimit-reset-requests"] == "0s"


def test_tokens_may_be_overspent_and_waiting_pays(tmp_path: Path) -> None:
    clock = Clock()
    key = limited(tmp_path, clock, tokens_per_minute=60)
    assert key.headers().keys() == {f"x-ratelimit-{part}-tokens" for part in ("limit", "remaining", "reset")}
    ticket = key.admit()
    ticket.charge(50)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "10"
    key.admit()
    ticket.charge(100)
    error = refusal(key)
    assert "tokens_per_minute is 60" in str(error)
    assert error.headers["retry-after"] == "91"
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    assert error.headers["x-ratelimit-reset-tokens"] == "2m30s"
    clock.now += 90
    refusal(key)
    clock.now += 1
    key.admit()


def test_tokens_of_who_left_are_charged(tmp_path: Path) -> None:
    key = limited(tmp_path, Clock(), tokens_per_minute=100)
    ticket = key.admit()
    ticket.close()
    ticket.charge(30)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "70"


def test_a_long_debt_is_no_longer_a_wait_than_clients_bear(tmp_path: Path) -> None:
    clock = Clock()
    key = limited(tmp_path, clock, tokens_per_minute=1)
    key.admit().charge(10_000)
    error = refusal(key)
    assert error.headers["retry-after"] == "120"
    assert error.headers["x-ratelimit-reset-tokens"] == "166h40m0s"


def test_no_more_run_at_once_than_may(tmp_path: Path) -> None:
    key = limited(tmp_path, Clock(), max_concurrent=2, requests_per_minute=10)
    first, second = key.admit(), key.admit()
    error = refusal(key)
    assert "max_concurrent is 2" in str(error)
    assert error.headers["retry-after"] == "1"
    assert error.headers["x-ratelimit-remaining-requests"] == "8", "a refused request is not counted"
    first.close()
    first.close()
    assert key.num_running == 1
    key.admit()
    refusal(key)
    second.close()
    key.admit()


def test_a_request_counts_as_its_samples_once_they_are_known(tmp_path: Path) -> None:
    key = limited(tmp_path, Clock(), max_concurrent=4, requests_per_minute=10)
    first, second = key.admit(), key.admit()
    with pytest.raises(ApiError) as never:
        first.widen(5)
    assert (never.value.status, "5 samples" in str(never.value)) == (400, True)
    assert "legal: at most 4, max_concurrent of key 'alice'" in str(never.value)
    with pytest.raises(ApiError) as later:
        first.widen(4)
    assert (later.value.status, later.value.headers["retry-after"]) == (429, "1")
    first.widen(3)
    assert key.num_running == 4
    assert "max_concurrent is 4, and 4 of its samples run or wait" in str(refusal(key))
    second.close()
    first.close()
    first.close()
    assert key.num_running == 0
    key.admit().widen(4)


def test_a_reload_changes_keys_and_keeps_what_was_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    file = written(tmp_path, line("alice", requests_per_minute=10, tokens_per_minute=100), line("bob"))
    ring = Keyring.open(None, file, clock=clock)
    running = [ring.find("Bearer secret-of-alice").admit() for _ in range(3)]
    running[0].charge(150)
    clock.now += 6
    changed = line("alice", sha256=sha256("another"), requests_per_minute=5, max_concurrent=3, max_tokens=9)
    written(tmp_path, changed)
    with caplog.at_level(logging.INFO, "fastllama"):
        ring.reload()
    assert "read again: 1 API key" in caplog.text
    for gone in ("secret-of-alice", "secret-of-bob"):
        with pytest.raises(ApiError, match="unknown to this server"):
            ring.find(f"Bearer {gone}")
    alice = ring.find("Bearer another")
    assert alice.max_tokens == 9
    assert alice.headers()["x-ratelimit-remaining-requests"] == "5"
    assert "x-ratelimit-limit-tokens" not in alice.headers()
    assert "max_concurrent" in str(refusal(alice))
    running[0].close()
    alice.admit()
    clock.now += 6
    written(tmp_path, line("alice", requests_per_minute=600))
    ring.reload()
    assert alice.headers()["x-ratelimit-remaining-requests"] == "4", "a larger allowance comes from now on"
    clock.now += 6
    assert alice.headers()["x-ratelimit-remaining-requests"] == "64"


@pytest.mark.parametrize("text", ["nonsense", "", None])
def test_a_broken_file_keeps_the_old_keys(text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = Keyring.open(None, written(tmp_path, line("alice")))
    file = written(tmp_path, text or "")
    if text is None:
        file.unlink()
    ring.reload()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(file) in record.getMessage()
    assert ring.find("Bearer secret-of-alice").name == "alice"


@given(
    requests=st.integers(1, 1000),
    tokens=st.integers(1, 10**6),
    events=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**5)), max_size=30),
)
def test_limits_hold_and_the_reported_wait_is_enough(
    requests: int, tokens: int, events: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    clock = Clock()
    limits = {"requests_per_minute": requests, "tokens_per_minute": tokens}
    key = limited(tmp_path_factory.getbasetemp(), clock, **limits)
    start, admitted, largest, charged = clock.now, 0, 0, 0
    for pause, used in events:
        clock.now += pause
        try:
            ticket = key.admit()
        except ApiError as error:
            wait = int(error.headers["retry-after"])
            assert 1 <= wait <= 120
            if wait < 120:
                clock.now += wait + 1e-6  # the clock's own rounding
                ticket = key.admit()
            else:
                continue
        ticket.charge(used)
        ticket.close()
        admitted, charged, largest = admitted + 1, charged + used, max(largest, used)
        minutes = (clock.now - start) / 60
        assert admitted <= requests * (1 + minutes) + 1e-6
        assert charged <= tokens * (1 + minutes) + largest + 1e-3
        assert all(int(value) >= 0 for name, value in key.headers().items() if "remaining" in name)
