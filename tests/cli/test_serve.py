"""`fastllama serve`: refusals before a model is loaded, keys, and the loading options shared with `generate`."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fastllama.cli import serve
from fastllama.cli.main import _parser
from fastllama.cli.options import runtime_options
from tests.cli.conftest import Command
from tests.serve.live import LIMIT, ROOT, certificate, live


@pytest.fixture(autouse=True)
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLAMA_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--host 0.0.0.0", "--host is '0.0.0.0', which other machines reach, and there is no API key; set FASTLLAMA"),
        ("--host ::", "--host is '::', which other machines reach"),
        ("--host example.org", "--host is 'example.org', which other machines reach"),
        ("--port 70000", "--port is 70000; legal: 0 to 65535"),
        ("--max-queue-size 0", "--max-queue-size is 0; legal: at least 1"),
        ("--request-timeout 0", "--request-timeout is 0.0; legal: at least 0.001"),
        ("--request-timeout nan", "--request-timeout is nan"),
        ("--drain-timeout -1", "--drain-timeout is -1.0; legal: at least 0"),
        ("--max-body-bytes 0", "--max-body-bytes is 0; legal: at least 1"),
        ("--max-n 0", "--max-n is 0; legal: at least 1"),
        ("--canary 0", "--canary is 0.0; legal: at least 1"),
        ("--cors-origin example.org", "--cors-origin is 'example.org'; legal: as 'https://example.org', or '*'"),
        ("--cors-origin https://example.org/", "--cors-origin is 'https://example.org/'"),
        ("--ssl-certfile cert.pem", "--ssl-certfile and --ssl-keyfile go together"),
        ("--ssl-certfile none.pem --ssl-keyfile none.pem", "none.pem: No such file"),
        ("--api-keys none.jsonl", "none.jsonl: No such file"),
        ("--dtype float8", "dtype is 'float8'"),
        ("--model nothing-here", "--model is 'nothing-here'"),
        ("--new-key two/words", "name is 'two/words'"),
        ("--temperature 1", "unknown argument '--temperature'"),
    ],
)
def test_what_is_not_legal_is_one_line_before_a_model_is_loaded(command: Command, words: str, says: str) -> None:
    done = command("serve", *words.split())
    assert (done.status, done.out) == (2, "")
    assert says in done.err
    assert done.err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line_and_no_load(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", "--port", str(port))
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"fastllama: error: 127.0.0.1:{port} cannot be served: another program has that port")
    assert done.err.count("\n") == 1


def test_a_file_that_is_no_certificate_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    done = command("serve", "--ssl-certfile", tmp_path / "cert.pem", "--ssl-keyfile", tmp_path / "cert.pem")
    assert done.status == 2
    assert "cert.pem are not a certificate with its key in PEM" in done.err


def test_a_missing_package_names_its_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PACKAGES", ("starlette", "no_such_package"))
    done = command("serve")
    assert done.status == 2
    assert "fastllama serve needs 'no_such_package', which is not installed: pip install 'fastllama[serve]'" in done.err


def test_a_new_key_is_shown_once_and_its_line_holds_it_not(command: Command) -> None:
    done = command("serve", "--new-key", "alice")
    assert done.status == 0
    line = json.loads(done.out)
    key = done.err.split()[-1]
    assert (line["name"], line["sha256"]) == ("alice", hashlib.sha256(key.encode()).hexdigest())
    assert key not in done.out


def test_sizes_and_options_of_the_model_reach_it() -> None:
    sizes = ("kv-cache-tokens", "host-cache-tokens", "max-num-seqs", "max-num-batched-tokens", "max-model-len")
    words = [word for number, name in enumerate(sizes) for word in (f"--{name}", str(number + 2))]
    args = _parser().parse_args(["serve", *words, "--deterministic"])
    given = runtime_options(args)
    assert [given[name.replace("-", "_")] for name in sizes] == [2, 3, 4, 5, 6]
    assert given["deterministic"] is True
    assert args.seed is None


def test_a_checkpoint_that_is_broken_is_the_same_line_as_for_generate(command: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    expected = command("generate", "--model", tmp_path, "--prompt", "x")
    done = subprocess.run(
        [sys.executable, "-m", "fastllama", "serve", "--port", "0", "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT,
    )
    bound, *rest = done.stderr.splitlines(keepends=True)
    assert "is bound; loading" in bound
    assert (done.returncode, "".join(rest)) == (expected.status, expected.err)
    assert expected.status == 2


def test_the_start_logs_what_is_served_where_and_to_whom(tmp_path: Path) -> None:
    with live("--served-model-name", "llama", "--max-num-seqs", "3", "--max-model-len", "100") as server:
        assert "llama: 4.5 M parameters in bfloat16 on cpu; 100 tokens of context" in server.printed
        assert "3 sequences at once" in server.printed
        assert re.search(r"ready on http://127\.0\.0\.1:\d+; no API key is required", server.printed)
        assert server.get("/v1/models").json()["data"][0]["max_model_len"] == 100
        wrong = server.post("/v1/completions", {"model": "gpt-4", "prompt": "a"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")


def test_other_machines_are_served_with_a_key_over_tls(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path)
    options = ("--host", "0.0.0.0", "--ssl-certfile", str(chain), "--ssl-keyfile", str(key))
    with live(*options, env={"FASTLLAMA_API_KEY": "sesame"}) as server:
        assert "an API key is required" in server.printed
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        trusted = ssl.create_default_context(cafile=str(chain))
        with httpx.Client(base_url=url, verify=trusted, timeout=LIMIT, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer sesame"
            body = {"prompt": "Once", "stream": True, "max_tokens": 5}
            assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        assert "sesame" not in server.printed + server.logged


def test_every_option_that_is_shown_has_a_help_text() -> None:
    """argparse.SUPPRESS, which hides an option, counts as one."""
    actions = _parser()._subparsers._group_actions[0].choices["serve"]._actions  # type: ignore[union-attr, index]
    assert [action.option_strings for action in actions if not action.help] == []
