"""Every shipped launch, compiled for every target: nothing spills, all fits, and accesses in loops are wide."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import pytest

from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import tuning
from fastllama.testing.compile_report import CACHE, compile_report
from fastllama.testing.recorder import record
from fastllama.testing.targets import TARGETS
from tests.kernels.triton.launch_cases import ALL, CASES, form
from tests.kernels.triton.launches import GPUS, SHIPPED, Shipped, on

KEPT = Path(__file__).parents[3] / CACHE
FP32 = [
    shipped
    for family in ("attention", "matmul", "int4", "int8")
    for shipped in SHIPPED[family]
    if "fp32" in shipped.name and not shipped.name.startswith("attention_decode")
]


@pytest.mark.compile
@pytest.mark.parametrize("shipped", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_it_fits(shipped: Shipped, target: str) -> None:
    with on(target):
        reports = compile_report(shipped.call, [target], KEPT)
    assert [each for report in reports for each in report.problems(shipped.narrowest, shipped.besides)] == []


@pytest.mark.compile
@pytest.mark.parametrize("shipped", FP32, ids=[shipped.name for shipped in FP32])
@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_fp32_is_fp32(shipped: Shipped, target: str) -> None:
    """NVIDIA's tensor cores round it to TF32, and Triton chooses them for some operands unasked."""
    with on(target):
        (report,) = compile_report(shipped.call, [target], KEPT)
    assert report.program.matrix == {}


@pytest.mark.compile
@pytest.mark.parametrize("name", TARGETS)
def test_the_quick_round_has_each_kernel_in_each_form(name: str) -> None:
    forms: dict[bool, set[Hashable]] = {True: set(), False: set()}
    for shipped, case in zip(ALL, CASES, strict=True):
        with on(name), record(TARGETS[name]) as launches:
            shipped.call()
        forms[bool(case.marks)] |= set(map(form, launches))
    assert forms[True] - forms[False] == set()


def test_each_op_with_a_kernel_is_launched() -> None:
    """Except one whose kernel is another op's, without the residual."""
    launched = {shipped.name.split()[0] for shipped in ALL}
    assert launched == {op for op in OPS if OPS[op].has_triton} - {"rms_norm_int8"}, (
        "give it a generator in launches.py"
    )


def test_each_launch_has_its_own_name() -> None:
    assert len({shipped.name for shipped in ALL}) == len(ALL)


def test_each_packaged_configuration_belongs_to_a_target() -> None:
    """A GPU's tuned configurations are shipped, so these tests must compile them."""
    packaged = {folder.name for folder in tuning.PACKAGED.glob("*") if folder.is_dir()}
    assert packaged <= set(GPUS.values())
    assert set(GPUS) == set(TARGETS)
