"""Fixtures of every test: its tier, the same random numbers each time, and uninitialised memory poisoned."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import hypothesis
import pytest

from fastllama import env
from fastllama.testing.shard import Shard
from tests import rounds
from tools.fakegpu.environment import GPU_MACHINE

# A busy machine is slow, not wrong. The printed blob reproduces a failure seen elsewhere.
hypothesis.settings.register_profile(
    "fastllama", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("fastllama")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long to soak (tests/runtime/test_soak.py), and which part of the tests to run."""
    parser.addoption("--soak", type=int, default=300, help="requests of tests/runtime/test_soak.py")
    parser.addoption("--shard", type=Shard.parse, default=Shard(), help="K/N: the K-th of N parts of the tests")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _belongs_here(item: pytest.Item) -> bool:
    """Triton decides when a kernel is defined whether to interpret it: a process runs one of these tiers."""
    if item.get_closest_marker("gpu"):
        return _has_gpu() and not env.triton_interpret()
    if item.get_closest_marker("fakegpu"):
        return GPU_MACHINE.ready and not env.triton_interpret()
    if item.get_closest_marker("compile"):
        return not env.triton_interpret()
    return env.triton_interpret() or not item.get_closest_marker("interpreter")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of other tiers and shards. Not skip: a run without tests must fail (exit status 5)."""
    shard = config.getoption("shard")
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        if rounds.repeats(item):
            item.add_marker("exhaustive")
        (chosen if _belongs_here(item) and shard.holds(item.nodeid) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A small shard of few tests may be empty."""
    if session.config.getoption("shard").count > 1 and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_collection_finish() -> None:
    """Freeze the objects alive by now, so that tests that collect garbage need not scan them, 0.3 s each time."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Report which tiers this process can run, which explains deselected tests."""
    return f"tiers: reference, {'interpreter' if env.triton_interpret() else 'compile, gpu where there is one'}"


@pytest.fixture
def bind() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """`bind(op, run)`: `run` is what runs the op on CPU tensors, until the test ends."""
    import torch

    from fastllama.kernels.dispatch.op import OPS

    with ExitStack() as stack:
        yield lambda op, run: stack.enter_context(OPS[op].bound_to(torch.device("cpu"), run))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`force(backend)`: sets FASTLLAMA_BACKEND and clears every op's earlier choice, until the test ends."""
    from fastllama.kernels.dispatch.op import OPS

    def force(backend: str) -> None:
        monkeypatch.setenv("FASTLLAMA_BACKEND", backend)
        for op in OPS.values():
            monkeypatch.setattr(op, "_bound", {})
            monkeypatch.setattr(op, "_known", {})

    return force


@pytest.fixture(autouse=True)
def _poison_and_seed() -> None:
    """An output that a kernel forgets to write turns the test red, instead of holding an earlier right answer.

    In torch's deterministic mode every uninitialised tensor starts as NaN, or as the largest integer. A run that never
    loads torch (scheduler, contracts) does not pay for it.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)
