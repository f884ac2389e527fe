"""The queue acts as a plain list would, at a cost that hardly depends on the number of waiting requests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning import waiting
from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.planning.waiting import WaitingQueue
from tests.runtime.planning.test_scheduler import add, first, make, turn

PARAMS = SamplingParams(max_tokens=1)


def sequence(length: int, patience: int, number: int = 0) -> Sequence:
    return Sequence(number, Request("r", (), PARAMS, 0.0), 0, [0] * length, length + 1, 1, patience)


class PlainQueue:
    """The policy in its plainest form, over (name, length) and a dictionary of patience."""

    def __init__(self) -> None:
        self.line: list[int] = []
        self.patience: dict[int, int] = {}

    def add(self, name: int, length: int, patience: int) -> None:
        place = len(self.line)
        while place > 0 and self.patience[self.line[place - 1]] >= length:
            place -= 1
        if place < len(self.line):
            self.patience[self.line[place]] -= length
        self.line.insert(place, name)
        self.patience[name] = patience


SMALL = st.integers(0, 12)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), SMALL),
        st.tuples(st.just("first"), st.integers(1, 12), SMALL),
        st.tuples(st.sampled_from(["admit", "remove"]), st.integers(0, 10**6), st.just(0)),
    ),
    max_size=200,
)


@settings(deadline=None)
@given(ACTIONS, st.sampled_from([1, 2, 3, 64]))
def test_it_is_the_plain_queue(actions: list[tuple[str, int, int]], least: int) -> None:
    """The same order after any additions, admissions, preemptions and aborts, and passed requests lose patience."""
    queue, plain, sequences = WaitingQueue(), PlainQueue(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "LEAST_BLOCK", least)
        for action, number, patience in actions:
            name = len(sequences)
            if action == "add":
                sequences.append(sequence(number, patience, name))
                queue.add(sequences[-1])
                plain.add(name, number, patience)
            elif action == "first":
                sequences.append(sequence(number, 0, name))
                queue.put_first(sequences[-1])
                plain.line.insert(0, name)
                plain.patience[name] = 0
            elif plain.line:
                gone = plain.line.pop(0 if action == "admit" else number % len(plain.line))
                assert action != "admit" or queue.head is sequences[gone]
                queue.remove(sequences[gone])
            assert [seq.seq_id for seq in queue] == plain.line
            assert len(queue) == len(plain.line)
            assert all(seq.patience == plain.patience[seq.seq_id] for seq in queue)
            assert all(block.least == min(seq.patience for seq in block.sequences) for block in queue._blocks)


@contextmanager
def lines_run(module: Any) -> Iterator[list[int]]:
    """Counts the lines of a module that run inside."""
    count, before = [0], sys.gettrace()

    def line(frame: FrameType, event: str, arg: object) -> Any:
        count[0] += event == "line"
        return line

    def call(frame: FrameType, event: str, arg: object) -> Any:
        return line if frame.f_code.co_filename == module.__file__ else None

    sys.settrace(call)
    try:
        yield count
    finally:
        sys.settrace(before)


def flood(num_long: int, num_short: int) -> WaitingQueue:
    queue = WaitingQueue()
    for _ in range(num_long):
        queue.add(sequence(2000, 1000))
    for _ in range(num_short):
        queue.add(sequence(1, 0))
    return queue


def shorts_after_longs(count: int) -> None:
    flood(count, count)


def admitting(queue: WaitingQueue) -> None:
    while queue:
        queue.remove(queue.head)


def aborting_the_last(queue: WaitingQueue) -> None:
    for seq in reversed(list(queue)):
        queue.remove(seq)


def preempting(queue: WaitingQueue) -> None:
    for _ in range(len(queue)):
        queue.put_first(sequence(5, 0))


def adding_equals(queue: WaitingQueue) -> None:
    for _ in range(len(queue)):
        queue.add(sequence(1000, 1000))


@pytest.mark.parametrize("work", [admitting, aborting_the_last, preempting, adding_equals])
def test_the_work_for_each_is_at_most_that_of_the_square_root(work: Callable[[WaitingQueue], None]) -> None:
    """In lines run: 16 times as many sequences may take 64 times as many, where a plain list takes 256 times."""
    counts = []
    for num in (250, 4000):
        queue = flood(num // 2, num // 2)
        with lines_run(waiting) as count:
            work(queue)
        counts.append(count[0])
    assert counts[1] <= 1.25 * 64 * counts[0]
    assert counts[1] <= 4000 * 300


def test_short_prompts_pass_long_ones_by_blocks() -> None:
    counts = []
    for num in (250, 4000):
        with lines_run(waiting) as count:
            shorts_after_longs(num)
        counts.append(count[0])
    assert counts[1] <= 1.25 * 64 * counts[0]
    assert counts[1] <= 8000 * 300, "4000 would be passed one by one, 8 million times in all"


def test_a_scheduler_takes_its_queue_from_here() -> None:
    """2000 short prompts after as many long ones, then all are aborted, from the end."""
    scheduler = make(2000, 16, seqs=1, length=4096)
    with lines_run(waiting) as count:
        requests = [add(scheduler, [0] * (1000 if place < 2000 else 1), max_tokens=1) for place in range(4000)]
        for request in reversed(requests):
            scheduler.abort(request)
    assert scheduler.num_waiting == 0
    assert count[0] <= 4000 * 400


@pytest.mark.parametrize(("num_pages", "expected"), [(100, 100), (20, 40)])
def test_without_max_tokens_a_prompt_may_grow_to_the_end_of_context_and_cache(num_pages: int, expected: int) -> None:
    scheduler = make(num_pages, 2, length=100)
    request = add(scheduler, range(10), max_tokens=None)
    assert scheduler.check(10, request.params) == first(request).max_length == expected
    turn(scheduler)
    child = Request("child", request.prompt_token_ids, request.params, arrival=0.0)
    scheduler.fork(first(request), child)
    assert first(child).max_length == expected


def test_a_prompt_without_max_tokens_must_fit_with_one_token_more() -> None:
    scheduler = make(20, 2, length=100)
    assert scheduler.check(39, SamplingParams(max_tokens=None)) == 40
    with pytest.raises(ValueError, match="may grow to 41 tokens; legal: at most 40, the size of the KV cache"):
        scheduler.check(40, SamplingParams(max_tokens=None))
