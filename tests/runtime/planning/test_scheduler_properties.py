"""Scheduler and pool under random requests, over a fake KV memory that is written and read back by their steps."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastllama.runtime.planning.sequence import Status
from tests.runtime.planning.fake_memory import Simulation

PROMPTS = st.lists(st.integers(0, 1), max_size=14)


class SchedulerMachine(RuleBasedStateMachine):
    """The same simulation with hypothesis at the wheel, so that a failure shrinks to a few operations."""

    @initialize(
        sizes=st.tuples(
            st.integers(1, 12), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4), st.integers(2, 20)
        ),
        num_host_pages=st.integers(0, 8),
        rng=st.randoms(use_true_random=False),
    )
    def start(self, sizes: tuple[int, int, int, int, int], num_host_pages: int, rng: random.Random) -> None:
        num_pages, page_size, budget, seqs, length = sizes
        self.rng = random.Random(rng.randrange(2**32))
        self.simulation = Simulation(num_pages, page_size, max(budget, seqs), seqs, length, num_host_pages)

    @rule(
        prompt=PROMPTS,
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 12),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, **params: Any) -> None:
        self.simulation.add(params.pop("prompt"), **params)

    @rule(prompt=PROMPTS, start=st.integers(1, 14))
    def score(self, prompt: list[int], start: int) -> None:
        self.simulation.add(prompt, start=start)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step(self.rng)

    @rule(fails=st.booleans(), abort=st.integers(0, 5))
    def step_with_an_end_on_the_way(self, fails: bool, abort: int) -> None:
        self.simulation.step(self.rng, fails=fails, abort=abort)

    @rule()
    def step_without_its_transfers(self) -> None:
        self.simulation.step(self.rng, transfer_fails=True)

    @rule(which=st.integers(0, 5), max_tokens=st.integers(1, 8))
    def fork(self, **given: int) -> None:
        self.simulation.fork(**given)

    @rule()
    def drop_host(self) -> None:
        self.simulation.pool.drop_host()

    @rule(abort=st.integers(0, 5))
    def abort(self, abort: int) -> None:
        self.simulation.abort(abort)

    @precondition(lambda self: self.simulation.scheduler.has_work)
    @rule(which=st.integers(0, 5))
    def finish(self, which: int) -> None:
        unfinished = self.simulation.sequences(Status.RUNNING, Status.WAITING)
        self.simulation.scheduler.finish(unfinished[which % len(unfinished)], "stop")

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain(self.rng)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=30)
