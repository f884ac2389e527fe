"""Recordings of ops: what a replay runs, what makes a recording unusable, and that no mode stays set."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastllama import kernels
from fastllama.kernels.dispatch.recording import Recording, record
from tests.kernels.honest import assert_equal

ROOT = Path(__file__).parents[3]

CPU = torch.device("cpu")
WEIGHT = torch.linspace(0.5, 2, 8)


def step(x: Tensor) -> Tensor:
    """Ops with views between them, all results allocated on the way."""
    normed = kernels.rms_norm(x, WEIGHT).view(-1, 4, 2)
    return kernels.silu_mul(normed.flatten(1))


def recorded(x: Tensor, memory: list[UntypedStorage]) -> tuple[Recording, Tensor]:
    with Recording(CPU, memory) as recording:
        out = step(x)
    return recording, out


@torch.inference_mode()
def test_a_replay_computes_from_what_the_inputs_hold_by_then() -> None:
    x = torch.randn(4, 8)
    recording, out = recorded(x, [])
    assert recording.replayable
    assert_equal(out, step(x))
    x.copy_(torch.randn(4, 8))
    recording.replay()
    assert_equal(out, step(x))


@torch.inference_mode()
def test_recordings_share_memory_and_grow_it() -> None:
    memory: list[UntypedStorage] = []
    small, large = torch.randn(4, 8), torch.randn(4, 8)
    first, ours = recorded(small, memory)
    second, theirs = recorded(large, memory)
    assert ours.data_ptr() == theirs.data_ptr()
    first.replay()
    assert_equal(ours, step(small))
    second.replay()
    assert_equal(theirs, step(large))
    many = torch.randn(900, 8)
    third, wide = recorded(many, memory)
    assert ours.data_ptr() == theirs.data_ptr() == wide.data_ptr(), "grown where it is, so that all have moved"
    for recording, out, x in ((first, ours, small), (third, wide, many), (second, theirs, large)):
        recording.replay()
        assert_equal(out, step(x))


@pytest.mark.parametrize("grows", [True, False])
@torch.inference_mode()
def test_what_recordings_hold_does_not_depend_on_their_order(grows: bool) -> None:
    memory: list[UntypedStorage] = []
    recordings = [recorded(torch.randn(rows, 8), memory) for rows in (range(1, 65) if grows else range(64, 0, -1))]
    assert [storage.nbytes() for storage in memory] == [64 * 8 * 4, 64 * 4 * 4]
    held = {out.untyped_storage().data_ptr() for _, out in recordings}
    assert len(held) == 1


@pytest.mark.parametrize(
    "between", [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.clone(), lambda x: x[torch.tensor([1, 0, 2, 3])]]
)
@torch.inference_mode()
def test_what_else_computes_makes_it_unfit(between: object) -> None:
    assert callable(between)
    with Recording(CPU, []) as recording:
        kernels.rms_norm(between(torch.randn(4, 8)), WEIGHT)
    assert not recording.replayable
    with pytest.raises(AssertionError):
        recording.replay()


@torch.inference_mode()
def test_only_this_thread_is_recorded() -> None:
    x, other = torch.randn(4, 8), torch.randn(2, 8)
    with Recording(CPU, []) as recording:
        thread = threading.Thread(target=kernels.rms_norm, args=(other, WEIGHT))
        thread.start()
        thread.join()
        kernels.rms_norm(x, WEIGHT)
    assert len(recording._calls) == 1


@torch.inference_mode()
def test_ops_within_an_op_are_part_of_it() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with Recording(CPU, []) as recording:
        kernels.matmul(x, weight, norm=WEIGHT, gated=True)  # composed of three on a CPU
    assert len(recording._calls) == 1
    assert recording.replayable


@torch.inference_mode()
def test_no_mode_stays_after_an_error() -> None:
    with pytest.raises(ValueError, match="weight"), Recording(CPU, []):
        kernels.rms_norm(torch.ones(4, 9), WEIGHT)
    assert _get_current_dispatch_mode_stack() == []
    kernels.rms_norm(torch.ones(4, 8), WEIGHT)


def test_an_interrupt_on_the_way_out_is_mended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record(lambda: None, CPU, [])
    assert _get_current_dispatch_mode_stack() == []
    assert record(lambda: 3, CPU, [])[0] == 3


def test_recording_does_not_import_torchs_compiler() -> None:
    """The import takes 0.9 s, and every process that generates a token records a step."""
    code = """
import sys
import torch
from fastllama import kernels
from fastllama.kernels.dispatch.recording import record
weight = torch.ones(8)
result, recording = record(lambda: kernels.rms_norm(torch.empty(2, 8), weight), torch.device("cpu"), [])
print(recording.replayable, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True False\n"
