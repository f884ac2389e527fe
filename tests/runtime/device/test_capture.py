"""A step that cannot be captured runs eagerly, every request is answered, and one warning is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, SamplingParams
from fastllama.layers.block import LlamaMLP
from fastllama.runtime.device import capture
from tests.runtime.device.test_graphs import StandIn
from tests.runtime.models import ours, running
from tests.runtime.serving.test_async_engine import all_of, ids_of, run, serving

PROMPTS = [[5, 3, 8], list(range(20)), [7] * 14]
PARAMS = [SamplingParams(temperature=2.0, seed=i, max_tokens=length) for i, length in enumerate((30, 10, 20))]
MESSAGE = "decode steps run eagerly from now on"


def answer(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The tokens without graphs."""
    with monkeypatch.context() as patch, running(ours()) as llm:
        llm.engine._runner._graphs.replayable = False
        patch.setattr(capture.RecordingCapture, "capture", None)
        return answer(llm)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Captures are of one row while warming up, then of 4 rows, 2 and 1 as requests end.
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("served", [False, True], ids=["LLM", "AsyncEngine"])
def test_requests_get_their_tokens_all_the_same(
    failing: int,
    served: bool,
    expected: list[tuple[int, ...]],
    ahead: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve() -> None:
        async with serving(ours()) as engine:
            streams = [all_of(engine.add_request(*given)) for given in zip(PROMPTS, PARAMS, strict=True)]
            assert [ids_of(deltas)[0] for deltas in await asyncio.gather(*streams)] == expected
            assert engine.statistics().num_failed == 0

    stand_in = StandIn(failing)
    stand_in.install(monkeypatch)
    if served:
        run(serve())
    else:
        with running(ours()) as llm:
            assert answer(llm) == expected
            assert answer(llm) == expected
            assert llm.engine._runner._graphs._graphs == {}
    assert len(stand_in.captured) == failing, "one more was captured"
    assert stand_in.abandoned == ["random numbers as it was", "_cuda_endAllocateToPool", "_cuda_releasePool"]
    (message,) = warnings(caplog)
    assert MESSAGE in message
    assert message.endswith("RuntimeError('a previous error during capture')")


def test_what_went_wrong_inside_is_the_cause(
    expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A module that does what no graph may hold; the capture then ends as it should."""
    forward, stand_in = LlamaMLP.forward, StandIn()

    def waiting(mlp: LlamaMLP, *args: Any) -> Tensor:
        if capturing():
            raise RuntimeError("operation not permitted")
        return forward(mlp, *args)

    def capturing() -> bool:
        return torch.utils._python_dispatch._get_current_dispatch_mode() is not None

    monkeypatch.setattr(LlamaMLP, "forward", waiting)
    stand_in.install(monkeypatch)
    with running(ours()) as llm:
        assert answer(llm) == expected
    (message,) = warnings(caplog)
    assert message.endswith("RuntimeError('operation not permitted')")
    assert stand_in.abandoned == []


def test_an_interrupt_is_no_failure(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    forward, stand_in, model = LlamaMLP.forward, StandIn(), ours()
    interrupted = [False]

    def interrupting(mlp: LlamaMLP, *args: Any) -> Tensor:
        if not interrupted[0] and torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            interrupted[0] = True
            raise KeyboardInterrupt
        return forward(mlp, *args)

    stand_in.install(monkeypatch)
    with running(model) as llm:
        monkeypatch.setattr(LlamaMLP, "forward", interrupting)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS)
        before = len(stand_in.captured)
        answer(llm)
        assert len(stand_in.captured) > before, "steps are captured all the same"
    assert warnings(caplog) == []


@pytest.mark.parametrize("install", [None, StandIn], ids=["a record", "a GPU's graphs"])
def test_graphs_can_be_switched_off(
    install: Callable[[], StandIn] | None, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable counts when an LLM is made."""
    calls: list[object] = []
    if install is not None:
        install().install(monkeypatch)
    for kind in (capture.RecordingCapture, capture.GraphCapture):
        monkeypatch.setattr(kind, "capture", lambda self, run: calls.append(run) or (run(), None))
    monkeypatch.setenv("FASTLLAMA_GRAPHS", "0")
    with running(ours()) as llm:
        monkeypatch.delenv("FASTLLAMA_GRAPHS")
        assert answer(llm) == expected
        assert calls == []
    with running(ours()) as llm:
        answer(llm)
    assert calls != []


def test_a_switch_takes_what_is_legal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTLLAMA_GRAPHS", "FASTLLAMA_AHEAD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "off")
            with pytest.raises(ValueError, match=name), running(ours()):
                pass


def test_buckets_hold_every_batch_once() -> None:
    for most in (1, 2, 5, 16, 63, 64, 65, 129, 192, 193, 256):
        assert list(capture.buckets(most)) == sorted({capture.bucket(count) for count in range(1, most + 1)})
