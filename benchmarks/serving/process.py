"""Runs `fastllama serve` as a process and observes it from outside. Needs Linux's /proc."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.serving.settings import REPORT, Settings

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds that a server may take until it is ready, or to end
_URL = re.compile(r"http://127\.0\.0\.1:(\d+)")
METRICS = {"running": "num_requests_running", "waiting": "num_requests_waiting", "pages": "kv_cache_usage_perc"}
_METRIC = re.compile(r"^fastllama:(\w+)(\{.*\})? (\S+)$", re.MULTILINE)


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process, including ended ones, with a resolution of nanoseconds."""
    return time.clock_gettime((~pid << 3) | 2)  # the id that clock_getcpuclockid(3) returns for a process on Linux


def launch(settings: Settings, *arguments: str, **streams: Any) -> subprocess.Popen[Any]:
    """Start a process of launch.py."""
    command = [sys.executable, "-m", "benchmarks.serving.launch", settings.json(), *arguments]
    return subprocess.Popen(command, cwd=ROOT, **streams)


@dataclass(frozen=True)
class State:
    """State of a serving process at one moment.

    megabytes: resident, after the allocator trimmed its heap. blocks: allocated by Python. objects: live ones by class;
    see settings.OBJECTS. running, waiting, pages: requests, and the share of KV pages in use, by /metrics.
    """

    megabytes: float
    blocks: int
    objects: dict[str, int]
    descriptors: int
    threads: int
    running: float
    waiting: float
    pages: float

    @property
    def busy(self) -> bool:
        """Whether any request runs, waits or holds pages."""
        return bool(self.running or self.waiting or self.pages)


class ServerProcess:
    """`fastllama serve` on a free port of the loopback, as a context manager; ready once it is entered.

    Its standard error goes to a file, see `log`. Raises RuntimeError with that if it ends or is not ready in time.
    """

    port: int

    def __init__(self, settings: Settings, options: Sequence[str] = ()) -> None:
        self._settings, self._options = settings, options
        self._within = ExitStack()

    def __enter__(self) -> ServerProcess:
        self._errors = self._within.enter_context(tempfile.TemporaryFile())
        arguments = ("serve", "--port", "0", *self._options)
        self.process = launch(self._settings, *arguments, stdout=subprocess.DEVNULL, stderr=self._errors)
        give_up = time.monotonic() + PATIENCE
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > give_up:
                log = self.log
                self._kill()
                raise RuntimeError(f"fastllama serve is not ready; its standard error:\n{log}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Its standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET over a connection of its own. Raises OSError without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def metric(self, name: str, label: str = "") -> float:
        """A value of /metrics, summed over all series with this label, or over all series."""
        status, body = self.get("/metrics")
        found = [
            float(each[3]) for each in _METRIC.finditer(body.decode()) if each[1] == name and label in (each[2] or "")
        ]
        if status != 200 or not found:
            raise RuntimeError(f"/metrics answers {status} and has no fastllama:{name}{{{label}}}")
        return sum(found)

    def state(self) -> State:
        """The current state, without the connection that queries it."""
        metrics = {name: self.metric(metric) for name, metric in METRICS.items()}
        report = self._report()
        folder = Path("/proc", str(self.pid))
        threads = re.search(r"^Threads:\s+(\d+)$", (folder / "status").read_text(encoding="ascii"), re.MULTILINE)
        assert threads is not None
        descriptors = len(os.listdir(folder / "fd"))
        return State(**report, descriptors=descriptors, threads=int(threads[1]), **metrics)

    def _report(self) -> dict[str, Any]:
        """The process's own report at SIGUSR1; see launch.py."""
        before = self.log.count(REPORT)
        self.process.send_signal(signal.SIGUSR1)
        give_up = time.monotonic() + PATIENCE
        while not (found := self.log.split(REPORT)[before + 1 :]) or "\n" not in found[-1]:
            if time.monotonic() > give_up:
                raise RuntimeError("the server does not report at SIGUSR1")
            time.sleep(0.01)
        return json.loads(found[-1].partition("\n")[0])

    def end(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def _is_ready(self) -> bool:
        bound = _URL.search(self.log)
        if bound is None:
            return False
        self.port = int(bound[1])
        try:
            return self.get("/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._within.close()


class DirectProcess:
    """An AsyncEngine whose streams are read in its own process, as a context manager; see launch.py."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> DirectProcess:
        self._process = launch(self._settings, "direct", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a line; returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the AsyncEngine has ended; its error is above")
        return line
