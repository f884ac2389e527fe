"""The caller's view of a request: the text, tokens and log-probabilities of each completion so far."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from fastllama.errors import RequestError
from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
    TokenLogprob,
)
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.sequence import Request, Sequence, Status
from fastllama.runtime.stop_strings import StopSearch, stop_strings


class TextStream:
    """The text of one sample; holds back its end while that may be the start of a stop string.

    prompt_ids: the prompt that the text continues; () for a text of its own, decoded as by Tokenizer.decode.
    A model may have more embeddings than its tokenizer has tokens; an id without a token adds no text. One thread may
    push tokens while another takes the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
    ) -> None:
        self.tokenizer, self._num_pieces = tokenizer, tokenizer.vocab_size
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            [token_id for token_id in prompt_ids if token_id < self._num_pieces],
            skip_special_tokens=params.skip_special_tokens,
        )
        self._search = StopSearch(stop_strings(tokenizer, params))
        self._includes_stop = params.include_stop_str_in_output
        self._released: list[str] = []
        self._num_taken = 0

    def fork(self, params: SamplingParams) -> TextStream:
        """Returns a copy that continues from here, with all of its text still to be taken.

        It searches for the stop strings of `params` in the text held back and all that follows.
        """
        other = copy.copy(self)
        other._detokenizer = self._detokenizer.fork(skip_special_tokens=params.skip_special_tokens)
        other._search = StopSearch(stop_strings(self.tokenizer, params), before=self._search.held)
        other._includes_stop = params.include_stop_str_in_output
        other._released = list(self._released)
        other._num_taken = 0
        return other

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._released)

    def take(self) -> str:
        """Returns the text released since the last call."""
        new = self._released[self._num_taken :]
        self._num_taken += len(new)
        return "".join(new)

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that it completes, which is cut off with all text after it, or None.

        may_stop: False ignores the stop strings that this token completes.
        """
        text = self._detokenizer.push(token_id) if token_id < self._num_pieces else ""
        return self._take_in(text + self._search.stops.marks.get(token_id, ""), may_stop)

    def close(self, *, may_stop: bool = True) -> str | None:
        """End the text and release what is held back; returns the stop string that its end completes, or None."""
        stop = self._take_in(self._detokenizer.flush(), may_stop)
        self._released.append(self._search.held)
        self._search = StopSearch(self._search.stops)
        return stop

    def _take_in(self, text: str, may_stop: bool) -> str | None:
        certain, stop = self._search.push(text, may_stop=may_stop)
        self._released.append(certain)
        if stop is not None and self._includes_stop:
            self._released.append(stop)
        return stop


def _spelled(tokenizer: Tokenizer | None, report: TokenLogprob) -> TokenLogprob:
    """Returns the report with its token's text: "" for an id without a token."""
    if tokenizer is None:
        return report
    known = report.token_id < tokenizer.vocab_size
    data = tokenizer.token_bytes(report.token_id, skip_special_tokens=False) if known else b""
    return replace(report, text=data.decode("utf-8", "replace"))


@dataclass
class Completion:
    """One of a request's n samples so far. `stream` is None without a tokenizer."""

    seq: Sequence
    stream: TextStream | None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def may_stop(self) -> bool:
        """Whether its last token may end it: one of the first min_tokens may not."""
        return len(self.seq.token_ids) - self.seq.num_prompt_tokens > self.seq.request.params.min_tokens

    def report(self, logprob: TokenLogprob) -> None:
        """Add the log-probability of the sequence's newest token."""
        self.logprobs.append(_spelled(self.stream.tokenizer if self.stream else None, logprob))

    def push(self, token_id: int, eos_token_ids: Collection[int]) -> tuple[FinishReason, str | int | None] | None:
        """Add the text of the sequence's newest token; returns (finish reason, stop reason) if it ends the sample."""
        params, stream, may_stop = self.seq.request.params, self.stream, self.may_stop
        ends = may_stop and token_id in params.stop_token_ids
        stop: str | int | None = token_id if ends else None
        ends = ends or (may_stop and not params.ignore_eos and token_id in eos_token_ids)
        full = len(self.seq.token_ids) >= self.seq.max_length
        if stream is not None:
            # A stop token requested by id is a marker, not text.
            reached = stream.push(token_id, may_stop=may_stop) if stop is None else None
            if reached is None and (ends or full):
                reached = stream.close(may_stop=may_stop)
            if reached is not None:
                ends, stop = True, reached
        if ends:
            return "stop", stop
        return ("length", None) if full else None

    def output(self) -> CompletionOutput:
        """Returns the completion so far as a value."""
        seq = self.seq
        return CompletionOutput(
            index=seq.index,
            text=self.stream.text if self.stream else "",
            token_ids=tuple(seq.token_ids[seq.num_prompt_tokens :]),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            logprobs=tuple(self.logprobs) if seq.request.params.logprobs is not None else None,
        )


@dataclass(eq=False)
class Generation:
    """A request in the engine; keep it to follow or abort the request.

    continues_text: whether the samples' texts continue the prompt's; otherwise each is a text of its own, as in a chat.
    """

    request: Request
    prompt: str | None
    tokenizer: Tokenizer | None
    samples: dict[int, Completion] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position; the first token has none
    continues_text: bool = True
    first_token_time: float | None = None
    finish_time: float | None = None
    error: Exception | None = None  # the exception that the request failed with

    @property
    def finished(self) -> bool:
        """Whether all its samples have ended and the engine has dropped it."""
        return self.finish_time is not None

    def sample(self, seq: Sequence) -> Completion:
        """Returns the completion of a sequence."""
        found = self.samples.get(seq.index)
        if found is None:
            request, tokenizer = self.request, self.tokenizer
            before = request.prompt_token_ids if self.continues_text else ()
            stream = TextStream(tokenizer, before, request.params) if tokenizer else None
            found = self.samples.setdefault(seq.index, Completion(seq, stream))
        return found

    def fork(self, request: Request) -> Generation:
        """Returns the generation of `request`, forked from this one: a copy, except for its times."""
        sample, (seq,) = self.sample(self.request.sequences[0]), request.sequences
        stream = sample.stream.fork(request.params) if sample.stream is not None else None
        samples = {seq.index: Completion(seq, stream, list(sample.logprobs))}
        return Generation(
            request, self.prompt, self.tokenizer, samples, dict(self.prompt_logprobs), self.continues_text
        )

    def abort(self, reason: FinishReason = "abort") -> None:
        """End all unfinished samples now, for this reason; text held back is released.

        A sequence that has all its tokens, but was kept from finishing by an interrupt, ends with "length".
        """
        for seq in self.request.sequences:
            if seq.status is not Status.FINISHED:
                seq.forget_unknown()
                seq.finish_reason = "length" if len(seq.token_ids) >= seq.max_length else reason
                seq.status = Status.FINISHED
        self.finish_time = time.monotonic()
        for sample in self.samples.values():
            if sample.stream is not None and sample.seq.finish_reason in (reason, "length"):
                sample.stream.close(may_stop=sample.may_stop)

    def failure(self) -> RequestError | None:
        """Returns the error of a request that failed, was aborted or was not scored in time; None otherwise."""
        name, ends = f"request {self.request.request_id!r}", {seq.finish_reason for seq in self.request.sequences}
        if self.error is not None:
            failure = RequestError(f"{name} failed: {self.error!r}")
            failure.__cause__ = self.error
            return failure
        if "error" in ends:
            reasons = [seq.stop_reason for seq in self.request.sequences if seq.finish_reason == "error"]
            return RequestError(f"{name} failed: {reasons[0]}")
        if "deadline" in ends and self.request.scoring is not None:
            return RequestError(f"{name} was not scored by its deadline", reason="deadline")
        return RequestError(f"{name} was aborted", reason="abort") if "abort" in ends else None

    def metrics(self) -> RequestMetrics:
        """Returns the timings and counts so far."""
        request = self.request
        return RequestMetrics(
            arrival_time=request.arrival,
            first_scheduled_time=request.first_scheduled,
            first_token_time=self.first_token_time,
            finish_time=self.finish_time,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=request.num_cached_tokens or 0,
            num_generated_tokens=sum(len(seq.token_ids) - seq.num_prompt_tokens for seq in request.sequences),
            num_draft_tokens=request.num_drafted,
            num_accepted_tokens=request.num_accepted,
        )

    def report_prompt(self, first: int, logprobs: Iterable[TokenLogprob]) -> None:
        """Add log-probabilities of the prompt's tokens, starting at position `first`."""
        self.prompt_logprobs.update(enumerate((_spelled(self.tokenizer, each) for each in logprobs), first))

    def all_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Returns one entry per prompt token, None where not computed yet; None if none were requested."""
        if self.request.params.prompt_logprobs is None:
            return None
        return tuple(map(self.prompt_logprobs.get, range(len(self.request.prompt_token_ids))))

    def output(self) -> RequestOutput:
        """Returns the request as a value, finished or not."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=tuple(self.sample(seq).output() for seq in self.request.sequences),
            prompt_logprobs=self.all_prompt_logprobs(),
            metrics=self.metrics(),
            seed=self.request.seed,
        )

    def score(self) -> ScoreOutput:
        """Returns the scores of a request whose prompt is scored; without log-probabilities if it failed."""
        request, scoring = self.request, self.request.scoring
        assert scoring is not None, "a request that generates tokens"
        ids = (*request.prompt_token_ids, scoring.last_token_id)
        reports = map(self.prompt_logprobs.get, range(scoring.start, len(ids)))
        return ScoreOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=ids,
            start=scoring.start,
            logprobs=() if self.failure() is not None else tuple(each for each in reports if each is not None),
            metrics=self.metrics(),
        )
