"""A few hundred cases of each op, of extreme values and odd shapes, against fp64: `make fuzz` runs more of them."""

from __future__ import annotations

import pytest
import torch

from fastllama.catalogue.table import CATALOGUE
from fastllama.kernels.dispatch.op import OPS
from fastllama.testing.fuzz import Guarded, Wrong, judge
from tests.kernels.fuzz.trial import ALL_CALLS, Case, backends_of, trial

CASES = 300
SMALL_CASES = 12  # in the interpreter


def test_every_op_has_cases() -> None:
    assert set(ALL_CALLS) == set(CATALOGUE)


@pytest.mark.parametrize("op", sorted(ALL_CALLS))
def test_no_backend_is_wrong_at_an_edge(op: str) -> None:
    for number in range(CASES):
        case = Case(op, number)
        assert trial(case, backends_of(op)) == {}, case.command


@pytest.mark.interpreter
@pytest.mark.parametrize("op", sorted(op for op in ALL_CALLS if OPS[op].has_triton))
def test_no_triton_kernel_is_wrong_at_an_edge(op: str) -> None:
    for number in range(SMALL_CASES):
        case = Case(op, number, small=True)
        assert trial(case, ["triton"]) == {}, f"TRITON_INTERPRET=1 {case.command}"


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("found", "exact", "plain", "right"),
    [
        (2.0, 2.0, 2.0, True),
        (2.0 + 1e-5, 2.0, 2.0, False),
        (float("nan"), 2.0, 2.0, False),
        (float("nan"), 2.0, float("nan"), True),  # fp32 overflows on the way
        (0.0, float("inf"), float("inf"), False),
        (float("-inf"), float("inf"), float("inf"), False),
        (float("inf"), float("inf"), float("nan"), True),
        (0.0, float("nan"), float("nan"), False),
        (float("inf"), 3.5e38, float("inf"), True),
        (3.4e38, 3.5e38, float("inf"), True),
    ],
)
def test_the_rule(found: float, exact: float, plain: float, right: bool) -> None:
    if right:
        judge("out", one(found).float(), one(exact), [one(plain).float()])
    else:
        with pytest.raises(Wrong, match=r"^out\[0, 0\] is "):
            judge("out", one(found).float(), one(exact), [one(plain).float()])


@pytest.mark.parametrize("at", [(0, 3), (1, 7)], ids=["an input", "beside an output"])
def test_what_is_written_beside_the_outputs_is_seen(at: tuple[int, int]) -> None:
    import random

    memory = Guarded(random.Random(0))
    x = memory.place("x", torch.zeros(2, 6), strided=True)
    out = memory.place("out", torch.zeros(2, 6), strided=True)
    out.fill_(1.0)
    memory.check([out])
    if at == (0, 3):
        x[at] = 1.0
    else:
        out.as_strided((1,), (1,), out.storage_offset() + 6 + out.stride(0)).fill_(1.0)
    with pytest.raises(Wrong, match="was written"):
        memory.check([out])
