"""How ours is timed beside peers: with its launches overlapping and without, and only what fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllama import env, kernels
from fastllama.bench import models
from fastllama.bench.ops import comparison
from fastllama.bench.ops.peers import torch_peers
from fastllama.bench.ops.report import ALONE, OURS
from fastllama.catalogue.llama_calls import LlamaCall
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.sizes import TOY
from fastllama.kernels.launch.device import device_info

CPU, L2 = torch.device("cpu"), device_info(torch.device("cpu")).l2_cache


def test_without_overlap_is_so_for_that_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planned call runs the op as if it had never been called."""
    case = LlamaCall("rms_norm", TOY, 3, 0, torch.float32)
    inputs = case.make(CPU, seed=0)
    seen: list[str] = []
    run = comparison.implementation("rms_norm", CPU).run

    def noting(*args: Any) -> Any:
        seen.append(env.PDL.read())
        return run(*args)

    monkeypatch.setattr(
        comparison, "implementation", lambda op, device: comparison.Implementation("triton", noting, "")
    )
    with comparison.running("rms_norm", CPU) as ours:
        apart = comparison.alone("rms_norm", CPU)
        for function in (ours, apart, apart, ours):
            result = function(inputs)
    assert seen == ["1", "0", "0", "1"]
    assert torch.equal(result, kernels.rms_norm(inputs["x"], inputs["weight"], inputs["eps"]))


def test_input_sets_are_four_times_the_cache_and_can_be_gone_through_again() -> None:
    case = LlamaCall("rms_norm", TOY, 512, 0, torch.float32)
    sets = comparison.input_sets(case, CPU)
    for _ in range(2):  # as tuning does, which looks for a workspace first
        assert len({inputs["x"].data_ptr() for inputs in sets}) == len(sets) == 4 * L2 // case.bytes(sets[0]) + 1
    assert (
        len(comparison.input_sets(LlamaCall("rms_norm", TOY, 1, 0, torch.float32), CPU)) == comparison.CALLS_UNTIL_COLD
    )


@pytest.mark.parametrize("able", [False, True])
def test_ours_is_timed_both_ways_where_launches_overlap(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = comparison.implementation("rms_norm", CPU).run
    monkeypatch.setattr(comparison, "implementation", lambda op, device: comparison.Implementation("triton", run, ""))
    monkeypatch.setattr(comparison, "overlaps", lambda device: able)
    call = LlamaCall("rms_norm", TOY, 3, 0, torch.float32)
    found = comparison.measure(call, CPU, torch_peers("rms_norm", CPU, "eager"), rounds=1)
    assert (ALONE in found["contenders"]) == able
    for name in (OURS, ALONE) if able else (OURS,):
        assert found["contenders"][name]["eager"]["median"] > 0


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LlamaCall("attention_decode", TOY, 3, 128, torch.bfloat16)
    monkeypatch.setattr(models, "available_bytes", lambda device: 2 * case.kv_bytes - 1)

    def make(*args: Any, **options: Any) -> Arguments:
        raise AssertionError("made all the same")

    monkeypatch.setattr(LlamaCall, "make", make)
    with pytest.raises(MemoryError, match="keys and values"):
        comparison.measure(case, CPU, {})
