"""Continuous batching: chooses the tokens of each step's forward pass, and allocates their KV pages."""

from __future__ import annotations

import itertools
from collections import abc
from collections.abc import Iterator

from fastllama.errors import check_range
from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import BlockPool
from fastllama.runtime.planning.lookups import Lookups
from fastllama.runtime.planning.sequence import UNKNOWN, Request, Sequence, Status
from fastllama.runtime.planning.step import Chunk, Step
from fastllama.runtime.planning.waiting import WaitingQueue

MOST_PASSED = 64  # most sequences passed over in one step because they wait for another sequence's pages


class Scheduler:
    """One step: `schedule()`, run it, `commit()` (or `rollback()` if it failed), `append()` or `finish()` each sample.

    There are no separate prefill and decode phases: a decode is a chunk of one token. Every running decode gets its
    token; prompt chunks share what is left of max_num_batched_tokens; the rest admits waiting requests in queue order.
    An admitted sequence has pages for all its known tokens, so only a decode can run out of pages. It then preempts the
    newest running sequence, which is recomputed later, through the prefix cache where its pages survive. So every
    running sequence is ahead of every waiting one, the oldest is never preempted, and each request ends.
    Chunked prefill: Agrawal et al. 2023 (arXiv 2308.16369); paging, preemption: Kwon et al. 2023 (arXiv 2309.06180).

    Long prompts do not hold up short ones. The queue is first come, first served, but a waiting prompt lets later ones
    pass until they have had half as many tokens as itself (waiting.py): a flood of short prompts delays a long one by
    half its tokens and half of those ahead of it. While prompts are being computed, up to half of a step admits prompts
    that fit into it whole.

    Prompts with a common prefix are computed once even if they arrive together: the others wait for the running one's
    pages.
    """

    def __init__(self, pool: BlockPool, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        check_range("max_num_seqs", max_num_seqs, 1)
        check_range("max_num_batched_tokens", max_num_batched_tokens, max_num_seqs)  # or some decode would have to wait
        check_range("max_model_len", max_model_len, 2)
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # oldest first
        self._num_seats = 0  # taken by running sequences
        self._seq_ids = itertools.count()
        self._lookups = Lookups(pool)
        self.in_flight: list[Step] = []  # scheduled and not committed, in order
        self._num_expected = 0  # steps in flight passed to `expect`

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, and changes nothing, if it could never run."""
        assert not request.sequences, f"request {request.request_id!r} was added before"
        length, n = len(request.prompt_token_ids), request.params.n
        max_length = self.check(length, request.params, scores=request.scoring is not None)
        seq = Sequence(next(self._seq_ids), request, 0, list(request.prompt_token_ids), max_length, n, length // 2)
        request.sequences.append(seq)
        self._waiting.add(seq)

    def fork(self, seq: Sequence, request: Request) -> None:
        """Add a request that shares another's prompt and continues from the current end of that one's only sequence.

        The new sequence runs in the same pages, with the same age, if all tokens of `seq` but the last are computed and
        a seat is free. Otherwise it waits like a prompt of all these tokens, and reuses pages of the prefix cache.
        """
        assert not request.sequences, f"request {request.request_id!r} was added before"
        assert seq.status is not Status.FINISHED, f"a fork of sequence {seq.seq_id}, which is FINISHED"
        assert seq.request.params.n == request.params.n == 1, "a fork of several samples, or into several"
        length, max_length = len(seq.token_ids), self.check(seq.num_prompt_tokens, request.params)
        assert length < max_length, f"a fork of {length} tokens that may grow to {max_length}"
        child = seq.fork(next(self._seq_ids), request=request, max_length=max_length, patience=length // 2)
        request.sequences.append(child)
        if child.status is Status.RUNNING and child.num_computed == length - 1 and self._num_seats < self.max_num_seqs:
            request.begin(min(child.num_computed, child.num_prompt_tokens))
            self._num_seats += 1
            self._join(child, seq)
        else:
            child.release_pages()
            child.status = Status.WAITING
            self._waiting.add(child)

    def check(self, length: int, params: SamplingParams, *, scores: bool = False) -> int:
        """Returns the tokens that a prompt of `length` may grow to; ValueError if it could never run. Thread-safe.

        scores: generates nothing and scores one token more than `length`.
        """
        n, max_tokens = params.n, params.max_tokens
        if scores:
            return self._check_scored(length)
        if length == 0:
            raise ValueError("the prompt has 0 tokens; legal: at least 1")
        if length >= self.max_model_len:
            raise ValueError(
                f"the prompt has {length} tokens; legal: at most {self.max_model_len - 1}, one less than max_model_len"
            )
        if n > self.max_num_seqs:
            raise ValueError(f"n is {n}; legal: at most {self.max_num_seqs}, which is max_num_seqs")
        held = self.pool.num_pages * self.pool.page_size
        # Without max_tokens, up to the end of the context or of the KV cache.
        wanted = max(held, length + 1) if max_tokens is None else length + max_tokens
        max_length = min(wanted, self.max_model_len)
        if max_length > held:
            raise ValueError(
                f"a prompt of {length} tokens with max_tokens {max_tokens} may grow to {max_length} tokens; "
                f"legal: at most {held}, the size of the KV cache"
            )
        return max_length

    def _check_scored(self, length: int) -> int:
        if length == 0:
            raise ValueError("the prompt has 1 token; legal: at least 2, as the first is not scored")
        held = self.pool.num_pages * self.pool.page_size
        for limit, name in ((self.max_model_len, "max_model_len"), (held, "the size of the KV cache")):
            if length > limit:
                raise ValueError(
                    f"the prompt has {length + 1} tokens; legal: at most {limit + 1} to be scored, one more than {name}"
                )
        return length

    def schedule(self) -> Step | None:
        """Returns the next step, to be run and then committed or rolled back; None if there is no work."""
        assert len(self.in_flight) == self._num_expected, "schedule() before the last step was committed or expected"
        num_preemptions = self.num_preemptions
        single: list[tuple[Sequence, int]] = []
        longer: list[tuple[Sequence, int]] = []
        prefills: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        for seq in self._running:  # preemption pops from the end: this sequence, or one not yet visited
            pending = len(seq.token_ids) - seq.num_computed
            if len(seq.token_ids) == seq.max_length and (pending == 0 or seq.token_ids[-1] == UNKNOWN):
                continue  # ends with the step in flight: its last score, or a token being sampled
            if pending > 1:
                prefills.append(seq)
            else:
                assert pending == 1, f"sequence {seq.seq_id} was neither given a token nor finished"
                if self._make_writable(seq, copies):
                    single.append((seq, 1))
        budget = self.max_num_batched_tokens - len(single)
        # No admissions after a preemption: they would take the pages just freed.
        may_admit = self.num_preemptions == num_preemptions
        if may_admit and self._waiting:
            self._lookups.begin(self._running)
        beside = self._admissions(budget // 2) if prefills and may_admit else iter(())
        admitted = self._admissions() if may_admit else iter(())
        candidates = itertools.chain(beside, prefills, admitted)
        while budget and (candidate := next(candidates, None)):
            length = min(len(candidate.token_ids) - candidate.num_computed, budget)
            budget -= length
            (single if length == 1 else longer).append((candidate, length))
        self._lookups.end()
        if not single and not longer:
            assert self.in_flight or not self.has_work, "nothing can be scheduled although there is work"
            return None
        assert not {source for source, _ in copies} & {destination for _, destination in copies}
        chunks = tuple(self._chunk(seq, length) for seq, length in itertools.chain(single, longer))
        self.in_flight.append(Step(chunks, len(single), tuple(copies), self.pool.take_transfers()))
        return self.in_flight[-1]

    def expect(self, step: Step) -> None:
        """Assume that the step in flight has run and sampled a token, as yet UNKNOWN, for each of its samples.

        So the next step can be scheduled while it runs. commit() and append() follow with the results.
        """
        self._check_in_flight(step, self.in_flight)
        self._num_expected = 1
        for chunk in step.chunks:
            for seq in chunk.samples or (chunk.seq,):
                if seq.status is Status.RUNNING:
                    seq.num_computed = chunk.start + chunk.length
                    if chunk.samples:
                        seq.token_ids.append(UNKNOWN)

    def reserve(self, step: Step, count: int) -> bool:
        """Reserve pages for `count` drafts after each chunk of a decode step; returns False, unchanged, without room.

        The drafts must fit into max_num_batched_tokens, max_model_len and the available pages: nothing is preempted.
        """
        self._check_in_flight(step, self.in_flight)
        assert step.num_decodes == len(step.chunks), "drafts in a step of prompts"
        sequences = [chunk.seq for chunk in step.chunks]
        longest = max(len(seq.token_ids) for seq in sequences) + count
        if len(sequences) * (1 + count) > self.max_num_batched_tokens or longest > self.max_model_len:
            return False
        wanted: list[tuple[Sequence, int]] = []  # pages to allocate: (sequence, index in its page table)
        for seq in sequences:
            later = range(seq.num_computed // self.pool.page_size + 1, self.pool.pages_for(len(seq.token_ids) + count))
            held = len(seq.page_ids)
            wanted.extend((seq, i) for i in later if i >= held or self.pool.is_shared(seq.page_ids[i]))
        if len(wanted) > self.pool.num_available:
            return False
        for seq, index in wanted:
            page_id = self.pool.allocate()
            self.pool.free(seq.page_ids[index : index + 1])
            seq.page_ids[index : index + 1] = [page_id]
        return True

    def extend(self, step: Step, drafts: abc.Sequence[tuple[int, ...]]) -> Step:
        """Returns the step with the reserved number of drafts after each decode; its own transfers are done."""
        self._check_in_flight(step, self.in_flight)
        self.in_flight[0] = Step(
            tuple(
                Chunk(chunk.seq, chunk.start, 1 + len(own), chunk.samples, own)
                for chunk, own in zip(step.chunks, drafts, strict=True)
            ),
            step.num_decodes,
            step.copies,
            self.pool.take_transfers(),
        )
        return self.in_flight[0]

    def commit(self, step: Step) -> None:
        """Record that the step has run: advance its unfinished sequences and publish their full pages.

        Sequences scored to their end finish here.
        """
        self._check_in_flight(step, self.in_flight[:1])
        del self.in_flight[0]
        self._num_expected = 0
        for chunk in step.chunks:
            end = chunk.start + chunk.length - len(chunk.drafts)
            for seq in chunk.samples or (chunk.seq,):
                if seq.status is Status.RUNNING:
                    self._advance(seq, end)
                    if seq.request.scoring is not None and end == seq.max_length:
                        self.finish(seq, "length")

    def rollback(self) -> None:
        """Undo the steps in flight, which failed: their pages are undefined, so all running sequences are preempted."""
        self.in_flight.clear()
        self._num_expected = 0
        while self._running:
            self._preempt_newest()
        for seq in self._waiting:
            seq.forget_unknown()

    def append(self, seq: Sequence, token_id: int) -> None:
        """Append a sampled token to its sequence; the next step feeds it."""
        expected = seq.token_ids[-1] == UNKNOWN  # and perhaps preempted since
        assert seq.status is Status.RUNNING or expected, (
            f"a token for sequence {seq.seq_id}, which is {seq.status.name}"
        )
        assert seq.num_computed == len(seq.token_ids) or expected, f"a second token for sequence {seq.seq_id}"
        seq.forget_unknown()
        assert len(seq.token_ids) < seq.max_length, f"sequence {seq.seq_id} has reached its length"
        seq.token_ids.append(token_id)

    def keep_draft(self, seq: Sequence) -> None:
        """Accept the draft that was just sampled: its KV is computed, and the token sampled after it counts too."""
        assert seq.num_computed == len(seq.token_ids) - 1, f"sequence {seq.seq_id} has no draft token to accept"
        self._advance(seq, len(seq.token_ids))

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence in any state and free its pages at once. No effect on a finished one."""
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
            self._release(seq)
        elif seq.status is Status.WAITING:
            self._waiting.remove(seq)
        else:
            return
        seq.forget_unknown()
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        seq.status = Status.FINISHED  # last: what an interrupt leaves unfinished, Generation.abort finishes

    def abort(self, request: Request, reason: FinishReason = "abort", stop_reason: str | None = None) -> None:
        """End all unfinished sequences of a request, for the same reason."""
        for seq in request.sequences:
            self.finish(seq, reason, stop_reason)

    def _make_writable(self, seq: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Give a sequence a page of its own for its next position; False if it was preempted itself, as the newest."""
        page_ids, index = seq.page_ids, seq.num_computed // self.pool.page_size
        # Checked again after each preemption, which may free a page or end the sharing.
        while (fresh := index == len(page_ids)) or self.pool.is_shared(page_ids[index]):
            if self.pool.num_available == 0:
                if self._preempt_newest() is seq:
                    return False
                continue
            page_id = self.pool.allocate()
            if fresh:
                page_ids.append(page_id)
            else:
                copies.append((page_ids[index], page_id))
                self.pool.free(page_ids[index : index + 1])
                page_ids[index] = page_id
        return True

    def _preempt_newest(self) -> Sequence:
        seq = self._running.pop()
        self._release(seq)
        seq.status, seq.patience = Status.WAITING, 0
        self._waiting.put_first(seq)
        self.num_preemptions += 1
        return seq

    def _admissions(self, most: int | None = None) -> Iterator[Sequence]:
        """Admit waiting sequences one by one, with pages, until the next lacks a seat or pages.

        A sequence whose next page a running one is computing waits for it; later ones pass. most: tokens to compute for
        all of them together; None for no limit.
        """
        lookups, size, num_passed = self._lookups, self.pool.page_size, 0
        for seq in self._waiting:
            if num_passed == MOST_PASSED:
                return
            if lookups.waits(seq):
                num_passed += 1
                continue
            if self._num_seats + seq.num_seats > self.max_num_seqs or lookups.lacks_room(seq, most):
                return
            prefix = lookups.find(seq)
            if prefix is None:
                num_passed += 1
                continue
            length = len(seq.token_ids)
            if most is not None:
                most -= length - len(prefix.page_ids) * size
                if most < 0:
                    return
            page_ids = self.pool.acquire(length, prefix)
            if page_ids is None:
                return
            seq.page_ids, seq.prefix_id, seq.num_published = page_ids, prefix.prefix_id, len(prefix.page_ids)
            seq.num_computed = seq.num_published * size
            seq.request.begin(min(seq.num_computed, seq.num_prompt_tokens))
            seq.status = Status.RUNNING
            self._num_seats += seq.num_seats
            self._waiting.remove(seq)
            self._running.append(seq)
            lookups.admitted(seq)
            yield seq

    def _chunk(self, seq: Sequence, length: int) -> Chunk:
        if seq.request.scoring is not None or seq.num_computed + length < len(seq.token_ids):
            samples: tuple[Sequence, ...] = ()
        else:
            samples = (seq,) if seq.num_seats == 1 else self._split(seq)
        return Chunk(seq, seq.num_computed, length, samples)

    def _split(self, seq: Sequence) -> tuple[Sequence, ...]:
        """Returns all n sequences of the request: the children share the first one's pages and age."""
        request = seq.request
        seq.num_seats = 1
        for index in range(1, request.params.n):
            child = seq.fork(next(self._seq_ids), index=index)
            self._join(child, request.sequences[-1])
            request.sequences.append(child)
        return tuple(request.sequences)

    def _join(self, child: Sequence, other: Sequence) -> None:
        """Insert a fork right after a sequence with the same pages, and share them.

        So sequences that copy one page are adjacent, and none between them can preempt its last holder, take the page,
        and have it written before it is copied.
        """
        self.pool.share(child.page_ids)
        self._running.insert(self._running.index(other) + 1, child)

    def _advance(self, seq: Sequence, num_computed: int) -> None:
        """Set the number of computed tokens and publish the pages they fill."""
        seq.num_computed = num_computed
        while (seq.num_published + 1) * self.pool.page_size <= num_computed:
            self._publish_next(seq)

    def _publish_next(self, seq: Sequence) -> None:
        size, index = self.pool.page_size, seq.num_published
        tokens = tuple(seq.token_ids[index * size : (index + 1) * size])
        seq.prefix_id = self.pool.publish(seq.page_ids[index], seq.prefix_id, tokens)
        seq.num_published += 1

    @staticmethod
    def _check_in_flight(step: Step, steps: list[Step]) -> None:
        assert [id(each) for each in steps] == [id(step)], "the step is not the one in flight"

    def _release(self, seq: Sequence) -> None:
        self._num_seats -= seq.num_seats
        self.pool.free(seq.release_pages())
