"""Hundreds of random requests over few pages, in the simulation of fake_memory.py."""

from __future__ import annotations

import random

import pytest

from tests.runtime.planning.fake_memory import Simulation


@pytest.mark.parametrize("num_host_pages", [0, 3, 20])
@pytest.mark.parametrize(
    ("num_pages", "page_size", "budget", "seqs", "length"),
    [
        (6, 1, 4, 4, 6),
        (7, 2, 3, 3, 14),
        (9, 3, 8, 4, 27),
        (12, 2, 16, 8, 20),
        (16, 4, 7, 5, 40),
        (40, 1, 24, 8, 24),
        (64, 2, 32, 16, 30),
    ],
    ids=str,
)
def test_a_storm_of_requests(
    num_pages: int, page_size: int, budget: int, seqs: int, length: int, num_host_pages: int
) -> None:
    rng = random.Random(num_pages)
    simulation = Simulation(num_pages, page_size, budget, seqs, length, num_host_pages)
    systems = [[rng.randrange(2) for _ in range(rng.randint(0, length // 2))] for _ in range(4)]
    while len(simulation.requests) < 400:
        if rng.random() < 0.4:
            prompt = rng.choice(systems) + [rng.randrange(2) for _ in range(rng.randint(0, length // 3))]
            simulation.add(
                prompt,
                n=rng.choice([1, 1, 1, 2, seqs]),
                max_tokens=rng.randint(1, length),
                prompt_logprobs=rng.choice([None] * 9 + [0]),
            )
        if rng.random() < 0.2:
            prompt = rng.choice(systems) + [rng.randrange(2) for _ in range(rng.randint(1, length // 3))]
            simulation.add(prompt, start=rng.randint(1, len(prompt)))
        if rng.random() < 0.4:
            simulation.fork(rng.randrange(3), rng.randint(1, length))
        if rng.random() < 0.05:
            simulation.abort(len(simulation.requests) - rng.randint(1, 10))
        abort = rng.randrange(1000) if rng.random() < 0.02 else None
        simulation.step(rng, fails=rng.random() < 0.01, transfer_fails=rng.random() < 0.01, abort=abort)
    simulation.drain(rng)
    pool, scheduler = simulation.pool, simulation.scheduler
    assert min(scheduler.num_preemptions, pool.num_hit_tokens, pool.num_evictions) > 20, "too few events"
    assert simulation.num_copies > 20 or page_size == 1
    assert simulation.num_forks > 5, "too few forks"
    assert simulation.num_passed > 0 or seqs < 4, "none waited for what another computes"
    assert (simulation.num_transfers > 100) == (pool.num_host_hit_tokens > 20) == (num_host_pages > 0)
