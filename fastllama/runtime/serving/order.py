"""A request of an AsyncEngine, and which of its output has been sent to its reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastllama.errors import RequestError
from fastllama.runtime.generation import Generation
from fastllama.runtime.outputs import CompletionOutput
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.serving.mailbox import Mailbox, wake
from fastllama.runtime.serving.statistics import Statistics


@dataclass
class _Sent:
    """The part of one sample that has been sent to the request's reader."""

    num_tokens: int = 0
    num_logprobs: int = 0
    time: float = 0.0  # of its last token
    finished: bool = False


@dataclass(eq=False)
class Order:
    """One request of an AsyncEngine; all but its id and the mailbox belongs to the engine's thread.

    deadline: by time.monotonic(). generation: None until the engine has the request. begun: it was scheduled. failure:
    the error for its reader if it was aborted. on_added: called when the engine has the request, or it has ended
    before.
    """

    request_id: str
    deadline: float | None
    arrival: float = field(default_factory=time.monotonic)
    mailbox: Mailbox = field(default_factory=Mailbox)
    generation: Generation | None = None
    begun: bool = False
    ended: bool = False
    failure: RequestError | None = None
    on_added: list[Callable[[], None]] = field(default_factory=list)
    _sent: dict[int, _Sent] = field(default_factory=dict)

    def publish(self, statistics: Statistics) -> asyncio.Future[None] | None:
        """Put the request's new output into the mailbox; returns the waiting reader, to be woken."""
        generation = self.generation
        assert generation is not None
        first = not self._sent
        with statistics.lock:
            now = time.monotonic()
            found = [self._gain(generation, seq, now, statistics) for seq in generation.request.sequences]
            if first and generation.first_token_time is not None:
                statistics.first_token_seconds.observe(generation.first_token_time - self.arrival)
        return self.mailbox.put(
            [gain for gain in found if gain is not None],
            prompt_logprobs=generation.all_prompt_logprobs() if first else None,
            metrics=generation.metrics() if generation.finished and generation.error is None else None,
        )

    def end(self, error: BaseException | None) -> None:
        """End the stream: its reader gets the output so far, then the error or the reason of an abort."""
        failure = error or self.failure
        if failure is None and self.generation is not None:
            failure = self.generation.failure()
        self.ended = True
        wake([self.mailbox.end(failure)])

    def _gain(
        self, generation: Generation, seq: Sequence, now: float, statistics: Statistics
    ) -> CompletionOutput | None:
        """Returns the new output of one sample, or None. A failed request's end is sent as its error instead."""
        sample, sent = generation.sample(seq), self._sent.setdefault(seq.index, _Sent())
        token_ids = tuple(seq.token_ids[seq.num_prompt_tokens + sent.num_tokens :])
        logprobs = tuple(sample.logprobs[sent.num_logprobs :])
        text = sample.stream.take() if sample.stream is not None else ""
        ends = seq.finish_reason is not None and not sent.finished
        if ends:
            statistics.num_finished[seq.finish_reason or "abort"] += 1
        if token_ids:
            statistics.num_generated_tokens += len(token_ids)
            if sent.num_tokens:
                count = len(token_ids)
                statistics.inter_token_seconds.observe((now - sent.time) / count, times=count)
            sent.time = now
        sent.num_tokens += len(token_ids)
        sent.num_logprobs += len(logprobs)
        sent.finished = sent.finished or ends
        shows_end = ends and generation.error is None
        if not (token_ids or text or shows_end):
            return None
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            finish_reason=seq.finish_reason if shows_end else None,
            stop_reason=seq.stop_reason if shows_end else None,
            logprobs=logprobs if generation.request.params.logprobs is not None else None,
        )
