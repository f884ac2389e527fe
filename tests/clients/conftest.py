"""The real server on the port of the documentation, and clients in environments of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PORT = 8229  # of the examples, which run as they are
START_SECONDS = 120  # for the model to load and its kernels to compile, on a busy machine
Client = Callable[..., str]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """These run by `make test-clients`, which builds what they need; not where all of tests/ does."""
    given = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path == HERE or HERE in path.parents for path in given) else True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    """Waits until /ready answers 200."""
    end = time.monotonic() + START_SECONDS
    while True:
        assert server.poll() is None, f"the server ended with status {server.returncode} before it was ready"
        assert time.monotonic() < end, f"the server is not ready after {START_SECONDS} s"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=10):
                return
        except OSError:
            time.sleep(0.2)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`fastllama serve` with the bundled model in fp32 and a fixed seed; the base URL of its API."""
    assert _is_free(PORT), f"port {PORT} is taken: these tests need it, for the examples of the documentation name it"
    command = [sys.executable, "-m", "fastllama", "serve", "--dtype", "float32", "--seed", "1", "--port", str(PORT)]
    without_keys = {name: value for name, value in os.environ.items() if not name.startswith("FASTLLAMA_")}
    with (tmp_path_factory.mktemp("server") / "access.jsonl").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=without_keys, stdout=log)
    try:
        _wait_until_ready(server)
        yield f"http://localhost:{PORT}/v1"
    finally:
        server.terminate()
        status = server.wait(timeout=60)
    assert status == 0, f"the server ended with status {status} on SIGTERM"


@pytest.fixture
def client(server: str, tmp_path: Path) -> Client:
    """`client(environment, script, *arguments)`: what a script prints in build/clients/ENVIRONMENT, offline."""

    def run(environment: str, script: Path, *arguments: str) -> str:
        python = ROOT / "build" / "clients" / environment / "bin" / "python"
        assert python.exists(), f"{python} is missing: `make test-clients` builds it"
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "LANGCHAIN_TRACING_V2": "false"}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        ran = subprocess.run(
            [python, script, *arguments],
            cwd=tmp_path,
            env={**kept, **offline, "OPENAI_BASE_URL": server, "NO_PROXY": "localhost"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ran.returncode == 0, f"{script.name} ended with status {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    return run


def last_json(output: str) -> Any:
    """The JSON of a script's last line."""
    return json.loads(output.splitlines()[-1])
