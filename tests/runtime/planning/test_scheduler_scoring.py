"""Scored prompts: nothing is sampled, pages before the first score are reused, and they end by themselves."""

from __future__ import annotations

import pytest

from fastllama.runtime.planning.sequence import Status
from tests.runtime.planning.test_scheduler import add, first, make, spans, turn


def test_a_scored_prompt_samples_nothing_and_ends() -> None:
    scheduler = make(20, 2, budget=4, seqs=4)
    request = add(scheduler, range(6))
    scored = add(scheduler, range(50, 56), start=3)
    scheduler.abort(request)
    assert [(spans(step), step.chunks[0].samples) for step in (turn(scheduler), turn(scheduler))] == [
        ([(1, 0, 4)], ()),
        ([(1, 4, 2)], ()),
    ]
    assert (first(scored).status, first(scored).token_ids) == (Status.FINISHED, [*range(50, 56)])
    assert scheduler.pool.num_available == 20
    assert not scheduler.has_work


@pytest.mark.parametrize(("start", "computed"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4), (7, 6)])
def test_a_scored_prompt_reuses_the_pages_before_the_first_logits(start: int, computed: int) -> None:
    """The logits of position start - 1 are the first wanted: its page is computed from its first token on."""
    scheduler = make(20, 2)
    scheduler.finish(first(add(scheduler, range(9))), "stop")
    seq = first(add(scheduler, range(9)))
    turn(scheduler)
    scheduler.finish(seq, "stop")
    add(scheduler, range(7), start=start)
    (chunk,) = turn(scheduler).chunks
    assert chunk.start == computed


def test_a_scored_prompt_may_be_as_long_as_the_context() -> None:
    scheduler = make(20, 2, length=10)
    add(scheduler, range(10), start=1)
    with pytest.raises(ValueError, match="the prompt has 12 tokens; legal: at most 11 to be scored, one more than max"):
        add(scheduler, range(11), start=1)
    with pytest.raises(ValueError, match="legal: at most 9, one less than max_model_len"):
        add(scheduler, range(10))
    with pytest.raises(ValueError, match="the prompt has 42 tokens; legal: at most 41 to be scored, one more than the"):
        add(make(20, 2), range(41), start=1)


def test_a_scored_prompt_in_flight_is_not_scheduled_again() -> None:
    """The step after it is scheduled before its own is committed: nothing of it is left to do."""
    scheduler = make(20, 2)
    add(scheduler, range(6), start=1)
    seq = first(add(scheduler, [7]))
    step = scheduler.schedule()
    assert step is not None
    scheduler.expect(step)
    ahead = scheduler.schedule()
    assert ahead is not None
    assert spans(ahead) == [(1, 1, 1)]
    scheduler.commit(step)
    assert scheduler.num_running == 1
    scheduler.append(seq, 5)
