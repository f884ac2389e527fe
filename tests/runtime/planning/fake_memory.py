"""Drives a scheduler over a fake KV memory, written and read back as its steps prescribe."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest

from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import BlockPool
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.sequence import Request, Scoring, Sequence, Status
from fastllama.runtime.planning.step import Step

GARBAGE = -1


class Simulation:
    """Drives a scheduler as an engine would, and checks every step against what it knows by itself.

    What a real model would keep at a position depends on all tokens up to it, so the fake memory keeps a hash of them:
    a page shared, overwritten, not copied, or reused for another prefix cannot read back right.
    """

    def __init__(
        self, num_pages: int, page_size: int, budget: int, seqs: int, length: int, num_host_pages: int = 0
    ) -> None:
        self.pool = BlockPool(num_pages, page_size, num_host_pages)
        self.scheduler = Scheduler(self.pool, max_num_batched_tokens=budget, max_num_seqs=seqs, max_model_len=length)
        self.memory = [[GARBAGE] * page_size for _ in range(num_pages + num_host_pages)]
        self.requests: list[Request] = []  # in order of arrival
        self.line: list[Sequence] = []  # those of them that have not finished, as the scheduler should prefer them
        self.family: dict[Request, Request] = {}  # the request from which each was forked at last, or itself
        self.num_passing: Counter[Request] = Counter()  # tokens of those that passed it and none before it
        self.num_computed: dict[Sequence, int] = {}
        self.num_copies = self.num_transfers = self.num_forks = self.num_passed = 0
        self._contents: defaultdict[Sequence, list[int]] = defaultdict(list)

    def sequences(self, *statuses: Status) -> list[Sequence]:
        """Sequences of unfinished requests, oldest first."""
        return [seq for seq in self.line if seq.status in statuses]

    def contents(self, seq: Sequence) -> list[int]:
        """The expected contents at each position of a sequence."""
        contents = self._contents[seq]
        for token_id in seq.token_ids[len(contents) :]:
            contents.append(hash((contents[-1] if contents else 0, token_id)))
        return contents

    def add(self, prompt: list[int], start: int | None = None, **params: Any) -> None:
        """A request that generates tokens, or one whose prompt is scored from `start` on."""
        request = Request(str(len(self.requests)), tuple(prompt), SamplingParams(**params), arrival=0.0)
        limit = self.scheduler.max_model_len
        length, longest = min(len(prompt) + request.params.max_tokens, limit), limit - 1
        if start is not None:
            request.scoring = Scoring(min(start, len(prompt)), last_token_id=0)
            length, longest = len(prompt), limit
        fits = length <= self.pool.num_pages * self.pool.page_size and request.params.n <= self.scheduler.max_num_seqs
        if 0 < len(prompt) <= longest and fits:
            self.scheduler.add(request)
            self._queue(request)
            self.family[request] = request
        else:
            with pytest.raises(ValueError, match="legal: "):
                self.scheduler.add(request)
            assert not request.sequences

    def fork(self, which: int, max_tokens: int) -> None:
        """A request that goes on from an unfinished one of one sample, if the cache has room for it."""
        unfinished = [
            seq
            for seq in self.sequences(Status.RUNNING, Status.WAITING)
            if seq.request.params.n == 1 and seq.request.scoring is None
        ]
        pages = self.pool.num_pages * self.pool.page_size
        unfinished = [seq for seq in unfinished if len(seq.token_ids) + max_tokens <= pages]
        if not unfinished:
            return
        seq = unfinished[which % len(unfinished)]
        params = replace(seq.request.params, max_tokens=len(seq.token_ids) - seq.num_prompt_tokens + max_tokens)
        request = Request(str(len(self.requests)), seq.request.prompt_token_ids, params, arrival=0.0)
        has_seat = sum(map(self.seats, self.sequences(Status.RUNNING))) < self.scheduler.max_num_seqs
        self.scheduler.fork(seq, request)
        (child,) = request.sequences
        at_once = has_seat and self.num_computed.get(seq) == len(seq.token_ids) - 1
        assert (child.status is Status.RUNNING) == at_once
        assert (child.token_ids, child.page_ids) == (seq.token_ids, seq.page_ids if at_once else [])
        if at_once:
            self.num_computed[child] = self.num_computed[seq]
            self.line.insert(self.line.index(seq) + 1, child)
            self.requests.append(request)
            self.num_forks += 1
        else:
            self._queue(request)
        self.family[request] = self.family[seq.request]

    def _queue(self, request: Request) -> None:
        """Note where the scheduler put an arrival, and that those it passed may be passed by it."""
        self.requests.append(request)
        queue, (seq,) = list(self.scheduler._waiting), request.sequences
        passed = queue[queue.index(seq) + 1 :]
        self.line.insert(self.line.index(passed[0]) if passed else len(self.line), seq)
        for other in passed:
            assert other.request.num_cached_tokens is None, "it has begun, and an arrival passed it"
            assert 2 * len(seq.token_ids) <= len(other.token_ids), "by half shorter ones alone"
        if passed:
            self.num_passing[passed[0].request] += len(seq.token_ids)
            assert 2 * self.num_passing[passed[0].request] <= len(passed[0].token_ids), "too many passed it"

    def schedule(self) -> Step | None:
        """A step, if there is work, with every property checked that holds before it runs."""
        before, unfinished = self.sequences(Status.RUNNING), self.sequences(Status.RUNNING, Status.WAITING)
        num_preemptions = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        if step is None:
            assert not unfinished
            return None
        for chunk in step.chunks:
            place = self.line.index(chunk.seq) + 1
            self.line[place:place] = chunk.samples[1:]
        lengths = [chunk.length for chunk in step.chunks]
        assert sum(lengths) <= self.scheduler.max_num_batched_tokens
        assert min(lengths) > 0
        assert [length == 1 for length in lengths] == [k < step.num_decodes for k in range(len(lengths))]
        chosen = [chunk.seq for chunk in step.chunks]
        assert len(set(chosen)) == len(chosen)
        assert unfinished[0] in chosen, "the oldest always advances"
        for seq in before:
            if seq.status is Status.RUNNING and self.num_computed[seq] == len(seq.token_ids) - 1:
                assert seq in chosen, "a decode was left out"
        preempted = [seq for seq in before if seq.status is Status.WAITING]
        assert preempted == before[len(before) - len(preempted) :], "an older one gave way to a newer one"
        assert self.scheduler.num_preemptions == num_preemptions + len(preempted)
        found = [seq for chunk in step.chunks for seq in chunk.samples or (chunk.seq,)]
        self._let_pass([seq for seq in found if seq not in before])
        for seq in preempted:
            del self.num_computed[seq]
        if not preempted and sum(lengths) < self.scheduler.max_num_batched_tokens:
            self._check_that_no_other_fits()
        return step

    def _let_pass(self, admitted: list[Sequence]) -> None:
        """Moves sequences that waited before the last admitted one after it: another computes their prefix."""
        if not admitted:
            return
        end = max(map(self.line.index, admitted)) + 1
        passed = [seq for seq in self.line[:end] if seq.status is Status.WAITING]
        for seq in passed:
            assert self._waits_for(seq), "it was passed, and waits for no page"
        self.num_passed += len(passed)
        ahead = [seq for seq in self.line[:end] if seq.status is not Status.WAITING]
        self.line[:end] = [*ahead, *passed]

    def _waits_for(self, seq: Sequence, num_cached: int | None = None) -> bool:
        """Whether a running sequence computes a page of its prompt that this one can use, after those cached."""
        size, usable = self.pool.page_size, self._usable(seq)
        return any(
            other.token_ids[:end] == usable[:end]
            for other in self.sequences(Status.RUNNING)
            if (end := (other.num_published + 1) * size) <= other.num_prompt_tokens
            and end < len(usable)
            and num_cached in (None, other.num_published)
        )

    @staticmethod
    def _usable(seq: Sequence) -> list[int]:
        """The tokens that may come from the cache, except the last: no logits of earlier positions are needed."""
        scoring, params = seq.request.scoring, seq.request.params
        if scoring is not None:
            return seq.token_ids[: scoring.start]
        return seq.token_ids if params.prompt_logprobs is None or seq.num_prompt_tokens == 1 else []

    def _check_that_no_other_fits(self) -> None:
        running = self.sequences(Status.RUNNING)
        held = {page_id for seq in running for page_id in seq.page_ids}
        for seq in self.sequences(Status.WAITING):
            prefix = self.pool.match_prefix(self._usable(seq))
            if sum(map(self.seats, running)) + self.seats(seq) > self.scheduler.max_num_seqs:
                return
            if not self._waits_for(seq, len(prefix.page_ids)):
                need = self.pool.pages_for(len(seq.token_ids)) - len(held & set(prefix.page_ids))
                assert need > self.pool.num_available
                return

    @staticmethod
    def seats(seq: Sequence) -> int:
        return 1 if len(seq.request.sequences) == seq.request.params.n else seq.request.params.n

    def transfer(self, step: Step, fails: bool = False) -> None:
        """Execute the step's transfers between device and host; a failure leaves the destinations undefined."""
        self.num_transfers += len(step.transfers)
        for source, destination in step.transfers:
            assert (source < self.pool.num_pages) != (destination < self.pool.num_pages)
            assert fails or GARBAGE not in self.memory[source], "what was never written moves"
            self.memory[destination] = [GARBAGE] * self.pool.page_size if fails else list(self.memory[source])

    def run(self, step: Step, fails: bool = False) -> None:
        """Execute a step on the fake memory."""
        size, memory = self.pool.page_size, self.memory
        sources, destinations = [source for source, _ in step.copies], [page_id for _, page_id in step.copies]
        assert len(set(destinations)) == len(destinations)
        assert not set(sources) & set(destinations)
        self.num_copies += len(step.copies)
        for source, destination in step.copies:
            memory[destination] = [GARBAGE] * size if fails else list(memory[source])
        written: set[tuple[int, int]] = set()
        for chunk in step.chunks:
            seq, end = chunk.seq, chunk.start + chunk.length
            if seq in self.num_computed:
                assert chunk.start == self.num_computed[seq], "a position is computed twice, or never"
            else:
                assert chunk.start % size == 0, "newly admitted: only full pages can be reused"
                assert chunk.start <= max(len(self._usable(seq)) - 1, 0), "logits that are asked for are not computed"
            for position in range(chunk.start, end):
                page_id, offset = seq.page_ids[position // size], position % size
                assert (page_id, offset) not in written
                written.add((page_id, offset))
                memory[page_id][offset] = GARBAGE if fails else self.contents(seq)[position]
            self.num_computed[seq] = end
            if end < len(seq.token_ids) or seq.request.scoring is not None:
                assert chunk.samples == ()
                continue
            assert chunk.samples[0] is seq
            first_draw = seq.index == 0 and len(seq.token_ids) == seq.num_prompt_tokens
            siblings = set(seq.request.sequences) if first_draw else {seq}
            assert siblings >= set(chunk.samples)
            for sample in chunk.samples:
                assert sample.token_ids == seq.token_ids
                self.num_computed[sample] = end
                if not fails:
                    self.check_contents(sample, end)

    def check_contents(self, seq: Sequence, end: int) -> None:
        """The sequence reads its own past through its pages."""
        size = self.pool.page_size
        held = [value for page_id in seq.page_ids for value in self.memory[page_id]]
        assert len(seq.page_ids) * size == len(held) >= end
        assert held[:end] == self.contents(seq)[:end]

    def settle(self, step: Step, rng: random.Random, fails: bool = False) -> None:
        """Does what an engine does after a step: each sample ends or gets a token."""
        if fails:
            self.scheduler.rollback()
            self.num_computed.clear()
            return
        self.scheduler.commit(step)
        for chunk in step.chunks:
            ended = chunk.start + chunk.length == len(chunk.seq.token_ids)
            if chunk.seq.request.scoring is not None and ended:
                assert chunk.seq.status is Status.FINISHED
            for seq in chunk.samples:
                if seq.status is Status.FINISHED:
                    continue
                if rng.random() < 0.05:
                    self.scheduler.finish(seq, "stop")
                    continue
                self.scheduler.append(seq, rng.randrange(2))
                if len(seq.token_ids) == seq.max_length:
                    self.scheduler.finish(seq, "length")

    def step(
        self, rng: random.Random, *, fails: bool = False, transfer_fails: bool = False, abort: int | None = None
    ) -> bool:
        """A whole step; `abort` ends a request while it runs. False if there was no work."""
        step = self.schedule()
        if step is None:
            return False
        self.transfer(step, transfer_fails)
        if transfer_fails:
            self.pool.forget(step.transfers)
        fails = fails or transfer_fails
        self.run(step, fails)
        if abort is not None:
            self.abort(abort)
        self.settle(step, rng, fails)
        self.check()
        return True

    def abort(self, index: int) -> None:
        if self.requests:
            request = self.requests[index % len(self.requests)]
            self.scheduler.abort(request)
            assert request.finished

    def check(self) -> None:
        """Invariants between steps."""
        running, waiting = self.sequences(Status.RUNNING), self.sequences(Status.WAITING)
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(running), len(waiting))
        assert [*running, *waiting] == self.sequences(Status.RUNNING, Status.WAITING), "a request was overtaken"
        assert sum(map(self.seats, running)) <= self.scheduler.max_num_seqs
        assert not any(seq.page_ids for seq in self.sequences(Status.WAITING, Status.FINISHED))
        self.line = self.sequences(Status.RUNNING, Status.WAITING)
        self.pool.check_invariants()
        holders: defaultdict[int, list[tuple[Sequence, int]]] = defaultdict(list)
        for seq in running:
            assert self.num_computed[seq] == seq.num_computed
            self.check_contents(seq, seq.num_computed)
            for index, page_id in enumerate(seq.page_ids):
                holders[page_id].append((seq, index))
        assert self.pool.num_available == self.pool.num_pages - len(holders), "a page is lost"
        for page_id, holding in holders.items():
            assert self.pool.is_shared(page_id) == (len(holding) > 1)
            if len(holding) > 1:
                self._check_sharing(holding)

    def _check_sharing(self, holding: list[tuple[Sequence, int]]) -> None:
        (one, index), *others = holding
        end = (index + 1) * self.pool.page_size
        for other, other_index in others:
            assert other_index == index
            if end > min(one.num_computed, other.num_computed):
                assert self.family[one.request] is self.family[other.request], (
                    "only forks share a page that is not full"
                )
                assert one.num_computed == other.num_computed, "written before it was copied"
                assert one.request is not other.request or one.num_computed == one.num_prompt_tokens
            assert one.token_ids[: min(end, one.num_computed)] == other.token_ids[: min(end, other.num_computed)]

    def drain(self, rng: random.Random) -> None:
        """Everything ends, and every page comes back."""
        # The oldest sequence advances in every step and is never set back, so there are no more steps than tokens.
        tokens = sum(seq.max_length * self.seats(seq) for seq in self.sequences(Status.RUNNING, Status.WAITING))
        for _ in range(tokens):
            if not self.step(rng):
                break
        assert not self.scheduler.has_work
        assert all(request.finished and len(request.sequences) > 0 for request in self.requests)
        assert self.pool.num_available == self.pool.num_pages
        self.pool.check_invariants()
