"""`fastllama serve` with a planted fault: `python -m tests.serve.hurt FAULT=SECONDS ... serve OPTIONS`.

step: each step takes so much longer. load: so does loading the model. On SIGUSR1 the
device fails for good.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastllama.cli.main import main
from fastllama.layers import model
from fastllama.runtime.engine import Engine
from fastllama.runtime.llm import LLM


def in_an_executor(seconds: float) -> None:
    """A thread like a Hub download's, for which Python's exit waits."""
    ThreadPoolExecutor(1).submit(time.sleep, seconds).result()


def later(function: Any, seconds: float, sleep: Callable[[float], None] = time.sleep) -> Any:
    def slow(*args: Any, **options: Any) -> Any:
        sleep(seconds)
        return function(*args, **options)

    return slow


def fail_for_good(number: int, frame: Any) -> None:
    for engines in model._RUNNERS.values():
        for engine in engines:
            engine.device_error = RuntimeError("planted in the device")


if __name__ == "__main__":
    start = sys.argv.index("serve")
    faults = {name: float(value) for name, value in (word.split("=") for word in sys.argv[1:start])}
    Engine.step = later(Engine.step, faults.get("step", 0.0))  # type: ignore[method-assign]
    LLM.__init__ = later(LLM.__init__, faults.get("load", 0.0), in_an_executor)  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, fail_for_good)
    sys.exit(main(sys.argv[start:]))
