"""Races between the programs of a launch, and results that depend on their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastllama.testing.checks import CheckError, checks, same_in_any_order

pytestmark = pytest.mark.interpreter


# One program owns one element and its neighbour.
@triton.jit
def race_kernel(out_ptr, x_ptr, KIND: tl.constexpr):
    program = tl.program_id(0)
    if KIND == "write-write":
        tl.store(out_ptr + program // 2, program.to(tl.float32))
    elif KIND == "read-write":
        x = tl.load(out_ptr + (program + 1) % tl.num_programs(0))
        tl.store(out_ptr + program, x)
    elif KIND == "atomic-write":
        tl.atomic_add(out_ptr, 1.0)
        tl.store(out_ptr + program, 2.0)
    elif KIND == "atomic-read":
        tl.atomic_add(out_ptr + program, tl.load(out_ptr))
    elif KIND == "atomic":
        tl.atomic_add(out_ptr, tl.load(x_ptr + program))
    elif KIND == "copy":
        tl.store(out_ptr + program, tl.load(x_ptr + program))
    elif KIND == "own":
        tl.store(out_ptr + program, tl.load(out_ptr + program) + 1)
    elif KIND == "two values":
        tl.store(out_ptr + program + tl.arange(0, 4) // 2, tl.arange(0, 4).to(tl.float32))
    elif KIND == "one value":
        tl.store(out_ptr + program * 2 + tl.arange(0, 4) // 2, tl.arange(0, 4) // 2 + 1.0)
    elif KIND == "halves":
        tl.store(out_ptr + program, 1.0)
        tl.load((out_ptr + tl.num_programs(0) - 1).to(tl.pointer_type(tl.float16)) + 1)


class TestRaces:
    @pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("write-write", r"two programs write out_ptr \(float32 \[4\]\); programs \(0, 0, 0\) and \(1, 0, 0\)$"),
            ("read-write", r"one program reads what another writes, out_ptr "),
            ("atomic-write", r"one program updates atomically what another writes, out_ptr "),
            ("atomic-read", r"one program reads what another updates atomically, out_ptr "),
            ("halves", r"one program reads what another writes, out_ptr "),
        ],
    )
    def test_between_programs(self, kind: str, message: str, order: str) -> None:
        with pytest.raises(CheckError, match=rf"^race in race_kernel: {message}"), checks(order=order):
            race_kernel[(4,)](torch.ones(4), torch.ones(4), KIND=kind)

    def test_two_values_in_one_store(self) -> None:
        with (
            pytest.raises(CheckError, match=r"^one store writes two values to one address of out_ptr; program"),
            checks(),
        ):
            race_kernel[(1,)](torch.ones(4), torch.ones(4), KIND="two values")

    @pytest.mark.parametrize("kind", ["atomic", "own", "one value"])
    def test_none(self, kind: str) -> None:
        with checks() as report:
            race_kernel[(2,)](torch.ones(4), torch.ones(4), KIND=kind)
        assert report.launches[0].updated == ({"out_ptr": 8} if kind == "atomic" else {})

    def test_launches_are_ordered(self) -> None:
        out = torch.ones(4)
        with checks():
            for _ in range(2):
                race_kernel[(4,)](out, out, KIND="own")
        assert (out == 3).all()

    def test_they_can_be_allowed(self) -> None:
        with checks(allow_races=["out_ptr"]):
            race_kernel[(4,)](torch.ones(4), torch.ones(4), KIND="write-write")
        with checks(races=False):
            race_kernel[(4,)](torch.ones(4), torch.ones(4), KIND="write-write")

    def test_views_of_one_buffer_are_one_memory(self) -> None:
        buffer = torch.ones(20)
        with pytest.raises(CheckError, match=r"one program reads what another writes"), checks():
            race_kernel[(16,)](buffer[:16], buffer[4:], KIND="copy")


# Each program appends its number: the order of execution, seen.
@triton.jit
def append_kernel(out_ptr, count_ptr):
    at = tl.atomic_add(count_ptr, 1)
    tl.store(out_ptr + at, tl.program_id(0) * 6 + tl.program_id(1) * 3 + tl.program_id(2))


class TestOrder:
    def run(self, **options: Any) -> list[int]:
        out = torch.empty(12, dtype=torch.int32)
        with checks(**options):
            append_kernel[(2, 2, 3)](out, torch.zeros(1, dtype=torch.int32))
        return out.tolist()

    def test_every_program_runs_once_in_the_order_asked_for(self) -> None:
        assert self.run(order="forward") == list(range(12))
        assert self.run(order="reverse") == list(range(12))[::-1]
        assert sorted(self.run()) == list(range(12))
        assert self.run(seed=0) == self.run(seed=0) != self.run(seed=1)

    def test_dependence_on_it_is_found(self) -> None:
        def first_come() -> torch.Tensor:
            out, count = torch.empty(12, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            append_kernel[(2, 2, 3)](out, count)
            return out

        with pytest.raises(
            CheckError, match=r"^result 0 depends on the order of the programs: 12 of 12 elements differ"
        ):
            same_in_any_order(first_come)

    def test_a_sound_kernel_is_the_same_in_any(self) -> None:
        x = torch.randn(20)
        x[3] = torch.nan

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            out = torch.empty(20)
            race_kernel[(20,)](out, x, KIND="copy")
            return out, x

        found = same_in_any_order(run)
        torch.testing.assert_close(found[0], x, rtol=0, atol=0, equal_nan=True)

    def test_an_unknown_order_is_refused(self) -> None:
        with (
            pytest.raises(ValueError, match=r"^order is 'revers' \(did you mean 'reverse'\?\)"),
            checks(order="revers"),
        ):
            pass
