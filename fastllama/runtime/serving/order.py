"""A request between its reader and the engine, and what of it the reader has been told."""

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
class _Told:
    """What the reader of a request has been sent of one sample."""

    num_tokens: int = 0
    num_logprobs: int = 0
    time: float = 0.0  # of its last token
    finished: bool = False


@dataclass(eq=False)
class Order:
    """One request of an AsyncEngine; all but its id and the mailbox belongs to the engine's thread.

    deadline: by time.monotonic(). generation: None until the engine has it. begun: it has left the queue. failure: what
    its reader gets if it was aborted. on_added: called when the engine has it, or when it has ended without.
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
    _told: dict[int, _Told] = field(default_factory=dict)

    def tell(self, statistics: Statistics) -> asyncio.Future[None] | None:
        """Put what the request gained into the mailbox; the reader to wake."""
        generation = self.generation
        assert generation is not None
        first = not self._told
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
        """Nothing follows. Its reader is woken, and gets the error, or why it was aborted, behind what came."""
        failure = error or self.failure
        if failure is None and self.generation is not None:
            failure = self.generation.failure()
        self.ended = True
        wake([self.mailbox.end(failure)])

    def _gain(
        self, generation: Generation, seq: Sequence, now: float, statistics: Statistics
    ) -> CompletionOutput | None:
        """What one sample gained; None if that is nothing. How a request ended that raised, its error says."""
        sample, told = generation.sample(seq), self._told.setdefault(seq.index, _Told())
        token_ids = tuple(seq.token_ids[seq.num_prompt_tokens + told.num_tokens :])
        logprobs = tuple(sample.logprobs[told.num_logprobs :])
        text = sample.stream.take() if sample.stream is not None else ""
        ends = seq.finish_reason is not None and not told.finished
        if ends:
            statistics.num_finished[seq.finish_reason or "abort"] += 1
        if token_ids:
            statistics.num_generated_tokens += len(token_ids)
            if told.num_tokens:
                count = len(token_ids)
                statistics.inter_token_seconds.observe((now - told.time) / count, times=count)
            told.time = now
        told.num_tokens += len(token_ids)
        told.num_logprobs += len(logprobs)
        told.finished = told.finished or ends
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
