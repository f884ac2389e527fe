"""Helper threads are used while they are measured to be faster, on a machine whose load changes."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")
from fastllama.kernels.numba import threads


class Machine:
    """A machine on which a call takes so long alone, and so long with helpers; its clock."""

    def __init__(self, payoff: threads.Payoff) -> None:
        self.payoff, self.now = payoff, 0.0

    def run(self, seconds: float, alone: float, together: float, call: str = "call") -> float:
        """Make calls for so long; the share of the time that they ran with helpers."""
        start, shared = self.now, 0.0
        while self.now - start < seconds:
            is_shared = self.payoff.together
            took = together if is_shared else alone
            self.payoff.note(call, self.now, self.now + took)
            self.now += took + 1e-6
            shared += (took + 1e-6) * is_shared
        return shared / seconds


def test_helpers_that_pay_are_kept() -> None:
    machine = Machine(threads.Payoff())
    machine.run(1, alone=2e-4, together=1e-4)
    assert machine.run(10, alone=2e-4, together=1e-4) > 0.98


def test_helpers_that_do_not_pay_are_let_go() -> None:
    machine = Machine(threads.Payoff())
    assert machine.run(1, alone=1e-4, together=5e-3) < 0.1
    assert machine.run(10, alone=1e-4, together=5e-3) < 0.02


def test_helpers_that_bring_next_to_nothing_are_let_go() -> None:
    machine = Machine(threads.Payoff())
    machine.run(1, alone=1e-4, together=0.95e-4)
    machine.payoff.together = machine.payoff._better = False
    machine.payoff._usual.clear()
    assert machine.run(10, alone=1e-4, together=0.95e-4) < 0.02


def test_a_machine_that_gets_busy_is_noticed_at_once_and_one_that_gets_idle_soon() -> None:
    machine = Machine(threads.Payoff())
    machine.run(20, alone=2e-4, together=1e-4)
    assert machine.run(1, alone=2e-4, together=2e-3) < 0.15
    machine.run(20, alone=2e-4, together=2e-3)
    machine.run(2.5, alone=2e-4, together=1e-4)
    assert machine.run(5, alone=2e-4, together=1e-4) > 0.95


def test_calls_that_were_not_seen_before_decide_nothing() -> None:
    """Prompts come between decodes, with other calls of other lengths each time."""
    machine = Machine(threads.Payoff())
    machine.run(1, alone=2e-4, together=1e-4)
    shared = 0.0
    for prompt in range(50):
        for layer in range(5):
            machine.run(0.01, alone=1e-2, together=0.5e-2, call=f"{prompt}, {layer}")
        shared += machine.run(0.1, alone=2e-4, together=1e-4)
    assert shared / 50 > 0.9


def test_calls_of_ever_new_kinds_are_forgotten() -> None:
    machine = Machine(threads.Payoff())
    for kind in range(50_000):
        machine.run(1e-4, alone=1e-4, together=1e-4, call=str(kind))
    assert len(machine.payoff._usual) <= threads.Payoff.KNOWN + 1000
