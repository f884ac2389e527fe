"""Tuning: legal candidates, a winner over all its shapes, and files that the next process reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ops import tune
from fastllama.bench.ops import comparison
from fastllama.catalogue.llama_calls import LlamaCall, toy_calls
from fastllama.catalogue.sizes import LLAMA_2
from fastllama.kernels.launch import heuristics, tuned, tuning
from fastllama.kernels.launch.device import CPU, Device

H200 = Device("nvidia-h200", "sm_90", 132, 32, 227 << 10, 60 << 20)
SIZES = LLAMA_2[0]
DOWN = dict(zip(("features", "size"), SIZES.down, strict=True))
SHAPES = {
    "norm": {"size": SIZES.hidden, "itemsize": 2},
    "rope": {"rows": 8192, "heads": SIZES.heads + 2 * SIZES.kv_heads, "head_dim": SIZES.head_dim, "itemsize": 2},
    "swiglu": {"rows": 8192, "size": SIZES.intermediate, "itemsize": 2},
    **{family: {"vocab_size": SIZES.vocab, "itemsize": 2} for family in ("sample", "adjust")},
    "prefill": {"head_dim": SIZES.head_dim, "itemsize": 2, "key_itemsize": 2},
    "decode": {"queries": 8, "head_dim": SIZES.head_dim, "itemsize": 2},
    **{family: DOWN | {"itemsize": 2} for family in ("matmul", "int4", "int8")},
    "w8a8": {"rows": 1024, **DOWN},
}


@pytest.mark.parametrize("family", tuning.FAMILIES)
def test_candidates_are_legal_and_the_heuristics_is_the_first(family: str) -> None:
    kind = tuning.FAMILIES[family]
    found = list(tune.candidates(family, SHAPES[family], H200))
    assert found[0] == kind.heuristic(H200, **SHAPES[family])
    assert len(found) == len(set(found))
    assert len(found) >= 4
    for launch in found:
        assert type(launch) is kind.launch
        sizes = dataclasses.asdict(launch) | {"stages": 1}
        assert all(value & (value - 1) == 0 for value in sizes.values())
        assert launch.num_warps * H200.warp_size <= heuristics.MAX_THREADS


def test_the_nearest_candidates_come_first() -> None:
    """Three stages of a matmul, of which three programs are resident and not two, and twice the splits."""
    features, size = SIZES.gate_up
    shape = {"features": features, "size": size, "itemsize": 2}
    first, *near = list(tune.candidates("matmul", shape, H200))[:10]
    assert dataclasses.replace(first, stages=3) in near
    assert dataclasses.replace(first, splits=2 * first.splits) in near
    sizes = [tune._distance(first, launch) for launch in tune.candidates("matmul", shape, H200)]
    assert sizes == sorted(sizes)


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["norm", "matmul"])
def test_every_launch_is_timed_with_a_workspace_and_without(family: str) -> None:
    case = next(iter(toy_calls(torch.float32, (tune.OPS[family],))))
    device = torch.device("cpu")
    with torch.inference_mode(), comparison.interpreted(True):
        asked = tune.asked(family, case, device)
        assert asked is not None
        shape = dict(zip(tuning.FAMILIES[family].shape, asked, strict=True))
        launches = list(itertools.islice(tune.candidates(family, shape, CPU), 2))
        assert all(seconds and seconds > 0 for seconds in tune.timed(case, device, launches, 1))


def entry(num_warps: int, seconds: list[float | None]) -> tuple[Any, list[float | None]]:
    return heuristics.NormLaunch(num_warps), seconds


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([entry(8, [4e-6, 4e-6]), entry(4, [2e-6, 2e-6])], (4, 2.0, 4.0)),
        ([entry(8, [4e-6, 4e-6]), entry(4, [1e-6, 17e-6])], None),  # better at one shape, worse by both together
        ([entry(8, [4e-6]), entry(4, [3.95e-6])], None),  # noise
        ([entry(8, [4e-6, 4e-6]), entry(4, [1e-6, None]), entry(2, [3e-6, 3e-6])], (2, 3.0, 4.0)),
    ],
)
def test_the_winner(times: list[tuple[Any, list[float | None]]], expected: tuple[int, float, float] | None) -> None:
    found = tune.best(dict(times), times[0][0])
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.launch.num_warps, found.microseconds, found.heuristic_microseconds) == pytest.approx(expected)


def test_a_heuristic_that_cannot_run_is_no_tie() -> None:
    with pytest.raises(RuntimeError, match=r"the heuristic's NormLaunch.* cannot run here"):
        tune.best(dict([entry(8, [None]), entry(4, [1e-6])]), heuristics.NormLaunch(8))


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that only request their launch: two warps take half the time of others."""

    def timed(case: LlamaCall, device: torch.device, launches: list[Any], rounds: int) -> list[float]:
        return [1e-6 if launch.num_warps == 2 else 2e-6 for launch in launches]

    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune, "asked", lambda family, case, device: tuple(SHAPES[family].values()))
    monkeypatch.setattr(tune, "judged", lambda case, run, device: (0.0, 1.0))
    tuning._launch.cache_clear()
    yield
    tuning._launch.cache_clear()


@pytest.mark.usefixtures("_fake")
class TestTune:
    """Tunes cases and writes the winners to a file."""

    @staticmethod
    def tune(deadline: float = float("inf"), most: int = 99) -> list[tuned.TunedLaunch]:
        (case,) = toy_calls(torch.bfloat16, ("add_rms_norm",))
        return tune.tune("norm", [case, case], torch.device("cpu"), 1, deadline, most)

    def test_what_it_finds_is_what_launchers_get(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        entries = self.tune()
        assert entries == [tuned.TunedLaunch(SHAPES["norm"], heuristics.NormLaunch(2), 1.0, 2.0)]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tuned.write(tuning.user_folder(CPU) / "norm.json", "norm", CPU.name, {"torch": "2"}, entries)
        assert tuning.norm(torch.device("cpu"), **SHAPES["norm"]) == heuristics.NormLaunch(2)

    def test_a_wrong_winner_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune, "judged", lambda case, run, device: (2.0, 1.0))
        with pytest.raises(RuntimeError, match=r"add_rms_norm, toy, 3 rows: wrong with NormLaunch\(num_warps=2\)"):
            self.tune()

    def test_no_time_is_no_entry(self) -> None:
        assert self.tune(deadline=0.0) == []


def test_a_launch_reaches_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Running:
        def __enter__(self) -> Any:
            return lambda inputs: seen.append(tuning.norm(torch.device("cpu"), size=64, itemsize=2))

        def __exit__(self, *error: object) -> None:
            """Nothing to undo."""

    monkeypatch.setattr(tune.comparison, "running", lambda op, device: Running())
    (case,) = toy_calls(torch.bfloat16, ("rms_norm",))
    device = torch.device("cpu")
    assert tune.asked("norm", case, device) == (64, 2)
    assert tune.asked("matmul", case, device) is None  # of which it asks nothing
    tune._run(case, device, heuristics.NormLaunch(16), {})
    assert seen[-1] == heuristics.NormLaunch(16)


def test_a_case_whose_workspace_alone_asks_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit matmuls of many rows run in torch: no launch of ours would change them."""

    class Case:
        op = "matmul_int4"

        def make(self, device: torch.device, seed: int) -> dict[str, Any]:
            tuning.int4(device, features=64, size=64, itemsize=2)
            return {}

    class Running:
        def __enter__(self) -> Any:
            return lambda inputs: None

        def __exit__(self, *error: object) -> None:
            """Nothing to undo."""

    monkeypatch.setattr(tune.comparison, "running", lambda op, device: Running())
    assert tune.asked("int4", Case(), torch.device("cpu")) is None  # type: ignore[arg-type]
