"""The scheduler by hand-computed cases: order, budget, admission, preemption, forks, ends, and misuse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import ROOT, BlockPool
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Scoring, Sequence, Status
from fastllama.runtime.planning.step import Step


def make(num_pages: int = 100, page_size: int = 2, *, budget: int = 100, seqs: int = 8, length: int = 100) -> Scheduler:
    pool = BlockPool(num_pages, page_size)
    return Scheduler(pool, max_num_batched_tokens=budget, max_num_seqs=seqs, max_model_len=length)


def add(scheduler: Scheduler, prompt: Iterable[int], **params: Any) -> Request:
    start = params.pop("start", None)
    request = Request("r", tuple(prompt), SamplingParams(**{"max_tokens": 10, **params}), arrival=0.0)
    request.scoring = None if start is None else Scoring(start, last_token_id=0)
    scheduler.add(request)
    return request


def run(scheduler: Scheduler) -> Step:
    """One step, run and committed, without its samples."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.commit(step)
    scheduler.pool.check_invariants()
    return step


def turn(scheduler: Scheduler, token_id: int = 7) -> Step:
    """One step, run and committed, with the same token for every sample."""
    step = run(scheduler)
    for chunk in step.chunks:
        for seq in chunk.samples:
            scheduler.append(seq, token_id)
    return step


def spans(step: Step) -> list[tuple[int, int, int]]:
    return [(chunk.seq.seq_id, chunk.start, chunk.length) for chunk in step.chunks]


def first(request: Request) -> Sequence:
    return request.sequences[0]


def test_nothing_to_do() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seqs": 0}, "max_num_seqs is 0; legal: at least 1"),
        ({"seqs": 8, "budget": 7}, "max_num_batched_tokens is 7; legal: at least 8"),
        ({"length": 1}, "max_model_len is 1; legal: at least 2"),
    ],
)
def test_limits_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**sizes)


@pytest.mark.parametrize(
    ("length", "params", "message"),
    [
        (0, {}, "the prompt has 0 tokens; legal: at least 1"),
        (12, {}, "the prompt has 12 tokens; legal: at most 11, one less than max_model_len"),
        (3, {"n": 5}, "n is 5; legal: at most 4, which is max_num_seqs"),
        (3, {"max_tokens": 8}, "a prompt of 3 tokens with max_tokens 8 may grow to 11 tokens; legal: at most 10, the "),
        (
            3,
            {"max_tokens": 80},
            "a prompt of 3 tokens with max_tokens 80 may grow to 12 tokens; legal: at most 10, the ",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(length: int, params: dict[str, Any], message: str) -> None:
    scheduler = make(5, 2, seqs=4, length=12)
    request = Request("r", tuple(range(length)), SamplingParams(**params), arrival=0.0)
    with pytest.raises(ValueError, match=f"^{message}"):
        scheduler.add(request)
    assert (scheduler.has_work, request.sequences) == (False, [])
    add(scheduler, range(3), max_tokens=7, n=4)


def test_a_prompt_is_computed_in_chunks_then_decoded() -> None:
    scheduler = make(seqs=3, budget=3)
    seq = first(add(scheduler, range(5)))
    step = turn(scheduler)
    assert (spans(step), step.num_decodes, step.chunks[0].samples) == ([(0, 0, 3)], 0, ())
    step = turn(scheduler)
    assert (spans(step), step.num_decodes, step.chunks[0].samples) == ([(0, 3, 2)], 0, (seq,))
    step = turn(scheduler, 8)
    assert (spans(step), step.num_decodes, step.chunks[0].samples) == ([(0, 5, 1)], 1, (seq,))
    assert (seq.token_ids, seq.num_computed, len(seq.page_ids)) == ([0, 1, 2, 3, 4, 7, 8], 6, 3)


def test_a_long_prompt_does_not_hold_up_decodes() -> None:
    scheduler = make(seqs=4, budget=6)
    for start in (0, 10):
        add(scheduler, range(start, start + 3))
    turn(scheduler)
    add(scheduler, range(20, 50))
    for k in range(7):
        step = turn(scheduler)
        assert spans(step) == [(0, 3 + k, 1), (1, 3 + k, 1), (2, 4 * k, 4)]
        assert step.num_decodes == 2
    assert spans(turn(scheduler)) == [(0, 10, 1), (1, 10, 1), (2, 28, 2)]


def test_prompts_share_a_step_oldest_first() -> None:
    scheduler = make(seqs=4, budget=8)
    for start, length in ((0, 3), (10, 4), (20, 5), (30, 3)):
        add(scheduler, range(start, start + length))
    # The last token of the budget starts the third prompt: a chunk of length 1 without a sample.
    step = turn(scheduler)
    assert (spans(step), step.num_decodes) == ([(2, 0, 1), (0, 0, 3), (1, 0, 4)], 1)
    assert [len(chunk.samples) for chunk in step.chunks] == [0, 1, 1]
    assert spans(turn(scheduler)) == [(0, 3, 1), (1, 4, 1), (3, 0, 3), (2, 1, 3)], "the fourth fits into a half of 6"


def test_no_request_overtakes_for_want_of_pages() -> None:
    scheduler = make(5, 2)
    for start, length in ((0, 4), (10, 7), (20, 4)):
        add(scheduler, range(start, start + length), max_tokens=2)
    assert spans(turn(scheduler)) == [(0, 0, 4)], "7 tokens need 4 pages, 3 are free, and the third waits its turn"
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_no_request_overtakes_for_want_of_seats() -> None:
    scheduler = make(seqs=3)
    for start, n in ((0, 2), (10, 2), (20, 1)):
        add(scheduler, range(start, start + 4), n=n)
    assert spans(turn(scheduler)) == [(0, 0, 4)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)


def test_a_prompt_takes_the_seats_of_all_its_samples_before_they_exist() -> None:
    scheduler = make(seqs=4, budget=4)
    request = add(scheduler, range(12), n=3)
    assert spans(turn(scheduler)) == [(0, 0, 4)]
    add(scheduler, range(20, 23), n=2)
    assert spans(turn(scheduler)) == [(0, 4, 4)]
    assert spans(turn(scheduler)) == [(0, 8, 4)]
    assert spans(turn(scheduler)) == [(0, 12, 1), (2, 12, 1), (3, 12, 1)]
    scheduler.finish(first(request), "stop")
    assert [span[0] for span in spans(turn(scheduler))] == [2, 3, 1], "one seat came free: now the second fits"


def test_the_newest_gives_way_and_is_recomputed_with_what_it_wrote() -> None:
    scheduler = make(4, 2)
    old, new = (first(add(scheduler, range(start, start + 3), max_tokens=5)) for start in (0, 10))
    turn(scheduler)
    turn(scheduler)
    assert scheduler.pool.num_available == 0
    assert (new.token_ids, new.num_computed) == ([10, 11, 12, 7, 7], 4)
    step = turn(scheduler)
    assert spans(step) == [(0, 4, 1)], "the oldest took a page of the newest, which is not admitted in the same step"
    assert (new.status, new.page_ids) == (Status.WAITING, [])
    assert (new.num_computed, new.num_published, new.prefix_id) == (0, 0, ROOT)
    assert (scheduler.num_preemptions, scheduler.num_waiting) == (1, 1)
    later = first(add(scheduler, [99], max_tokens=1))
    turn(scheduler)
    scheduler.finish(old, "stop")
    step = turn(scheduler)
    assert spans(step) == [(2, 0, 1), (1, 2, 3)], "before the later one, from the one page of its own that survived"
    assert new.token_ids == [10, 11, 12, 7, 7, 7]
    assert new.request.num_cached_tokens == 0, "its own pages are no reuse of the prompt"
    assert later.status is Status.RUNNING


def test_the_newest_gives_way_to_itself() -> None:
    scheduler = make(3, 2)
    old, new = (
        first(add(scheduler, range(start, start + length), max_tokens=3)) for start, length in ((0, 3), (10, 2))
    )
    turn(scheduler)
    assert spans(turn(scheduler)) == [(0, 3, 1)], "the newest needs a page, and may not take an older one's"
    assert (old.status, new.status) == (Status.RUNNING, Status.WAITING)


def test_a_prompt_half_computed_can_be_preempted_too() -> None:
    scheduler = make(6, 2, seqs=3, budget=5)
    old, new = first(add(scheduler, range(4), max_tokens=5)), first(add(scheduler, range(10, 18), max_tokens=3))
    assert spans(turn(scheduler)) == [(0, 0, 4), (1, 0, 1)][::-1]
    assert spans(turn(scheduler)) == [(0, 4, 1)]
    assert (old.num_computed, new.num_computed, new.status) == (5, 0, Status.WAITING)


def test_alone_a_request_that_fits_runs_to_its_end() -> None:
    scheduler = make(4, 2)
    seq = first(add(scheduler, range(3), max_tokens=5))
    for _ in range(5):
        turn(scheduler)
    assert len(seq.token_ids) == seq.max_length == 8
    assert scheduler.num_preemptions == 0


def test_samples_share_the_prompt_and_copy_the_page_they_write_to() -> None:
    scheduler = make(10, 2, budget=8)
    request = add(scheduler, range(3), n=3)
    step = turn(scheduler)
    assert (spans(step), step.copies) == ([(0, 0, 3)], ())
    assert step.chunks[0].samples == tuple(request.sequences)
    assert [seq.index for seq in request.sequences] == [0, 1, 2]
    shared = first(request).page_ids
    assert len(shared) == 2
    assert [seq.page_ids for seq in request.sequences] == [shared] * 3
    assert scheduler.pool.num_available == 8

    source = shared[1]
    step = turn(scheduler)
    pages = [seq.page_ids for seq in request.sequences]
    assert step.copies == ((source, pages[0][1]), (source, pages[1][1]))
    assert pages[2][1] == source, "the last one keeps the page"
    assert len({page_ids[1] for page_ids in pages}) == 3
    assert {page_ids[0] for page_ids in pages} == {shared[0]}
    assert (spans(step), step.num_decodes) == ([(0, 3, 1), (1, 3, 1), (2, 3, 1)], 3)
    assert turn(scheduler).copies == ()


def test_samples_of_a_prompt_that_fills_its_pages_copy_nothing() -> None:
    scheduler = make(10, 2)
    request = add(scheduler, range(4), n=2)
    turn(scheduler)
    assert turn(scheduler).copies == ()
    left, right = (seq.page_ids for seq in request.sequences)
    assert left[:2] == right[:2]
    assert left[2] != right[2]


def test_samples_stand_together_before_younger_requests() -> None:
    scheduler = make(6, 2)
    samples = add(scheduler, range(3), n=2, max_tokens=9).sequences
    other = first(add(scheduler, range(10, 14), max_tokens=4))
    turn(scheduler)
    assert spans(turn(scheduler)) == [(0, 3, 1), (2, 3, 1), (1, 4, 1)]
    turn(scheduler)
    assert [seq.status for seq in (*samples, other)] == [Status.RUNNING, Status.RUNNING, Status.WAITING]


def test_giving_way_ends_the_sharing_that_asked_for_a_copy() -> None:
    scheduler = make(2, 2)
    samples = add(scheduler, range(3), n=2, max_tokens=1).sequences
    turn(scheduler)
    step = run(scheduler)
    assert step.copies == (), "no page is free for a copy, and with the other sample gone none is needed"
    assert spans(step) == [(0, 3, 1)]
    assert samples[1].status is Status.WAITING


def test_a_preempted_sample_lives_on_by_itself() -> None:
    scheduler = make(3, 2)
    samples = add(scheduler, range(3), n=2, max_tokens=3).sequences
    turn(scheduler)
    turn(scheduler)
    assert spans(turn(scheduler)) == [(0, 4, 1)]
    scheduler.finish(samples[0], "length")
    step = turn(scheduler)
    assert (spans(step), step.chunks[0].samples) == ([(1, 4, 1)], (samples[1],)), "both its full pages were cached"
    assert samples[1].token_ids == [0, 1, 2, 7, 7, 7]


def test_generated_tokens_are_reused_by_the_next_turn_of_a_chat() -> None:
    scheduler = make(20, 2)
    seq = first(add(scheduler, range(3)))
    for _ in range(4):
        turn(scheduler)
    scheduler.finish(seq, "stop")
    again = add(scheduler, [*seq.token_ids, 50, 51])
    assert spans(turn(scheduler)) == [(1, 6, 3)], "six tokens were computed and fill pages; the seventh was not"
    assert again.num_cached_tokens == 6


def test_prompt_logprobs_need_every_row() -> None:
    scheduler = make(20, 2)
    for params in ({}, {"prompt_logprobs": 0}):
        scheduler.finish(first(add(scheduler, range(6), **params)), "stop")
        request = add(scheduler, range(6), **params)
        assert spans(turn(scheduler))[-1][1:] == (0, 6)
        scheduler.abort(request)


def test_ends_return_pages_at_once() -> None:
    scheduler = make(20, 2, seqs=3)
    running = add(scheduler, range(5), n=2)
    waiting = add(scheduler, range(10, 15), n=2)
    turn(scheduler)
    scheduler.finish(running.sequences[0], "stop", "the end")
    assert scheduler.pool.num_available == 20 - 3
    scheduler.abort(waiting)
    assert (scheduler.num_waiting, waiting.finished, first(waiting).finish_reason) == (0, True, "abort")
    assert not running.finished
    scheduler.abort(running)
    assert running.finished
    assert [(seq.finish_reason, seq.stop_reason) for seq in running.sequences] == [("stop", "the end"), ("abort", None)]
    assert (scheduler.pool.num_available, scheduler.has_work) == (20, False)
    scheduler.finish(running.sequences[0], "length")
    scheduler.abort(running)
    scheduler.abort(waiting)
    assert [seq.finish_reason for seq in running.sequences] == ["stop", "abort"], "the first end counts"
    scheduler.pool.check_invariants()
    add(scheduler, range(5), n=3)
    assert len(turn(scheduler).chunks[0].samples) == 3, "the seats came back too"


def test_a_request_never_added_is_not_finished() -> None:
    request = Request("r", (1, 2), SamplingParams(), arrival=0.0)
    make().abort(request)
    assert not request.finished


def test_an_end_while_the_step_runs() -> None:
    scheduler = make(20, 2)
    gone, kept = add(scheduler, range(5), n=2), add(scheduler, range(10, 14))
    step = scheduler.schedule()
    assert step is not None
    scheduler.abort(gone)
    scheduler.commit(step)
    assert [seq.status for seq in gone.sequences] == [Status.FINISHED] * 2
    assert (first(gone).num_computed, first(kept).num_computed) == (0, 4)
    assert scheduler.pool.match_prefix(range(5)).page_ids == [], "freed pages are not published"
    assert scheduler.pool.num_available == 18
    scheduler.pool.check_invariants()


def test_a_failed_step_is_computed_anew() -> None:
    scheduler = make(20, 2)
    request, other = add(scheduler, range(3), n=2), add(scheduler, range(10, 15))
    turn(scheduler)
    step = scheduler.schedule()
    assert step is not None
    assert step.copies
    scheduler.rollback()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_available) == (0, 3, 20)
    step = turn(scheduler)
    assert [chunk.seq for chunk in step.chunks] == [*request.sequences, first(other)]
    assert [(chunk.start, chunk.length) for chunk in step.chunks] == [(2, 2), (2, 2), (4, 2)]
    assert [chunk.samples for chunk in step.chunks] == [(chunk.seq,) for chunk in step.chunks]


def test_misuse_is_caught() -> None:
    scheduler = make()
    request = add(scheduler, range(3), max_tokens=1)
    seq = first(request)
    with pytest.raises(AssertionError, match="was added before"):
        scheduler.add(request)
    with pytest.raises(AssertionError, match="which is WAITING"):
        scheduler.append(seq, 7)
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(AssertionError, match="before the last step was committed"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="a second token"):
        scheduler.append(seq, 7)
    scheduler.commit(step)
    with pytest.raises(AssertionError, match="not the one in flight"):
        scheduler.commit(step)
    with pytest.raises(AssertionError, match="neither given a token nor finished"):
        scheduler.schedule()
    scheduler.append(seq, 7)
    run(scheduler)
    with pytest.raises(AssertionError, match="has reached its length"):
        scheduler.append(seq, 7)
    scheduler.finish(seq, "length")
    with pytest.raises(AssertionError, match="which is FINISHED"):
        scheduler.append(seq, 7)
