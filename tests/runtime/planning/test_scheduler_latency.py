"""Long prompts that come while answers are written: a token waits for one step at most, and a step is the budget."""

from __future__ import annotations

import random

import pytest

from tests.runtime.planning.simulation import Arrival, Served, Server, percentile, poisson

BUDGET, SECONDS = 2048, 60.0


def under_load(server: Server, seed: int) -> tuple[list[Served], list[Served]]:
    """16 answers, under way all the time, and prompts of 4k to 16k tokens at 90 % of what can be computed."""
    rng = random.Random(seed)
    prompts = list(poisson(rng, 0.9 / Server.seconds(10_000), SECONDS, (4_000, 16_000), 20))
    assert len(prompts) > 30
    served = server.serve([*[Arrival(0.0, 50, 20_000)] * 16, *prompts], SECONDS)
    return served[:16], served[16:]


def waits_of(served: list[Served]) -> list[float]:
    return [wait for each in served for wait in each.inter_token_seconds]


@pytest.mark.parametrize("budget", [512, BUDGET, 8192])
@pytest.mark.parametrize("seed", range(3))
def test_a_token_waits_for_one_step_of_the_budget_at_most(seed: int, budget: int) -> None:
    writing, prompts = under_load(Server(budget), seed)
    waits, full = waits_of(writing + prompts), Server.seconds(budget)
    assert 0.99 * full < percentile(waits, 99) <= max(waits) <= full * (1 + 1e-9)
    assert sum(len(served.times) > 0 for served in prompts) > 20, "and prompts are answered"


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_budget_that_bounds_it(seed: int) -> None:
    """Without chunks the same load lets answers wait for whole prompts, and for several at once."""
    waits = waits_of(under_load(Server(10**6), seed)[0])
    assert max(waits) > Server.seconds(12_000)
    assert percentile(waits, 99) > 4 * Server.seconds(BUDGET)


@pytest.mark.parametrize("seed", range(3))
def test_few_pages_do_not_let_an_older_answer_wait(seed: int) -> None:
    """Others are preempted for want of pages; the answers, older than all of them, have a token of each step."""
    server, writing = Server(BUDGET, num_pages=300), [Arrival(0.0, 50, 900)] * 16  # 240 pages at their end
    others = poisson(random.Random(seed), 4.0, SECONDS, (100, 800), 400)
    served = server.serve([*writing, *others], SECONDS)
    assert server.scheduler.num_preemptions > 5
    for each in served[:16]:
        assert each.times == server.ends[:900]
