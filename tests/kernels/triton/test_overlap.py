"""Programmatic dependent launch: where launches overlap, that each waits, and the fences of split-K counters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastllama.kernels.triton.overlap import overlapping, overlaps
from fastllama.testing import machine_code
from fastllama.testing.compile_report import CACHE, machine_code_of
from fastllama.testing.machine_code import Code, Instruction
from fastllama.testing.recorder import Launch, record
from fastllama.testing.targets import TARGETS, target
from tests.kernels.triton.launches import SHIPPED, Shipped, on

KEPT = Path(__file__).parents[3] / CACHE
META = torch.device("meta")
# Not in a decode step: kernels of prompts, which take 100 times what an overlap gains, and of split attention.
IN_TURN = {"attention_prefill_kernel", "dequantize_kernel", "merge_state_kernel"}


def recorded(name: str, shipped: Shipped) -> list[Launch]:
    with on(name), record(target(name)) as launches:
        shipped.call()
    return launches


def constants(launch: Launch) -> dict[str, object]:
    names = launch.source.fn.arg_names
    return {names[path[0]]: value for path, value in launch.source.constants.items() if len(path) == 1}


def compiled(launch: Launch) -> Code:
    return machine_code.sass(machine_code_of(launch, KEPT))


def ahead_of(name: str, code: Code) -> list[Instruction]:
    """What can be executed before an instruction of that name."""
    found, todo = set(), [0]
    while todo:
        place = todo.pop()
        each = code.instructions[place]
        if place in found or each.name == name:
            continue
        found.add(place)
        todo += [code.labels[each.jumps_to]] if each.jumps_to else []
        todo += [place + 1] if each.falls_through else []
    return [code.instructions[place] for place in sorted(found)]


def variants(name: str, family: str) -> Iterator[tuple[str, Launch]]:
    """The kernels of a family that overlap on a target, with each combination of arguments that they can do without."""
    seen = set()
    for shipped in SHIPPED[family]:
        for launch in recorded(name, shipped):
            known = constants(launch)
            key = launch.kernel, *(argument for argument, value in known.items() if value is None), known.get("GATED")
            if known.get("PDL") and key not in seen:
                seen.add(key)
                yield shipped.name, launch


@pytest.mark.compile
@pytest.mark.parametrize("name", TARGETS)
def test_each_kernel_of_a_step_overlaps_where_it_can(name: str) -> None:
    """A single one that is launched in the usual way would wait for all before it, and all after for it."""
    for shipped in (shipped for family in SHIPPED.values() for shipped in family):
        for launch in recorded(name, shipped):
            early = name in ("sm_90", "sm_100") and launch.kernel not in IN_TURN
            assert constants(launch).get("PDL", False) is early, f"{launch.kernel} of {shipped.name}"
            assert launch.options.get("launch_pdl", False) is early, f"{launch.kernel} of {shipped.name}"


@pytest.mark.compile
@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize("family", SHIPPED)
def test_a_launch_waits_for_the_one_before_ahead_of_every_access(family: str, name: str) -> None:
    """On every path to an access or an exit. The next launch is released before."""
    for shipped, launch in variants(name, family):
        code = compiled(launch)
        ahead = ahead_of("ACQBULK", code)
        where = f"{launch.kernel} of {shipped}"
        assert len(ahead) < len(code.instructions), where
        assert [each.name for each in ahead if each.access] == [], where
        assert not {each.name.split(".")[0] for each in ahead} & {"EXIT", "RET", "BRX"}, where
        assert [each.name for each in ahead].count("PREEXIT") == 1, where


@pytest.mark.compile
@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize("family", ["matmul", "int4", "int8"])
def test_weights_are_asked_for_before_the_wait(family: str, name: str) -> None:
    """Four tiles of a weight; of packed ones the scales besides, which the first group would else wait for."""
    shipped = next(each for each in SHIPPED[family] if "norm, gated" in each.name)
    (launch,) = recorded(name, shipped)
    names = [each.name for each in compiled(launch).instructions]
    fetched = [place for place, each in enumerate(names) if each.startswith("CCTL") and "PF2" in each]
    assert len(fetched) >= (1 if family == "matmul" else 2)
    assert names.index("PREEXIT") < fetched[0] <= fetched[-1] < names.index("ACQBULK")


@pytest.mark.compile
@pytest.mark.parametrize("family", ["matmul", "int4", "int8"])
def test_a_sum_over_splits_takes_one_fence(family: str) -> None:
    """Before the count. The next launch's count is reset after all loads, by a relaxed atomic."""
    shipped = next(each for each in SHIPPED[family] if "down" in each.name and "residual" in each.name)
    (launch,) = recorded("sm_90", shipped)
    instructions = compiled(launch).instructions
    fences = [each.name for each in instructions if each.name.startswith("MEMBAR") and each.name.endswith(".GPU")]
    assert len(fences) == 1
    kinds = [each.access for each in instructions]
    assert kinds.count("atomic") == 2
    assert kinds[::-1].index("atomic") < kinds[::-1].index("load")


@pytest.mark.compile
def test_the_sums_of_a_draw_take_no_fence() -> None:
    """They are read by later launches alone."""
    shipped = SHIPPED["sampling"][0]
    for launch in recorded("sm_90", shipped):
        assert [
            each.name for each in compiled(launch).instructions if each.name.startswith("MEMBAR") and "GPU" in each.name
        ] == []


@pytest.mark.parametrize(
    ("name", "expected"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)]
)
def test_where_launches_overlap(name: str, expected: bool) -> None:
    with on(name):
        assert overlaps(META) is expected
        assert not overlaps(torch.device("cpu"))  # where kernels are interpreted


def test_a_variable_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with on("sm_90"):
        assert overlapping(META) == {"PDL": True, "launch_pdl": True}
        monkeypatch.setenv("FASTLLAMA_PDL", "0")
        assert overlapping(META) == {"PDL": False}
        monkeypatch.setenv("FASTLLAMA_PDL", "off")
        with pytest.raises(ValueError, match="FASTLLAMA_PDL"):
            overlaps(META)
