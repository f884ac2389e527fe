"""A request as its caller sees it: text, tokens and log-probabilities of each completion as they grow."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput, TokenLogprob
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.sequence import Request, Sequence, Status

_FIRST_MARK = 0x100000  # of a private plane of Unicode: stands for a special token where stop strings are sought


class StopStrings:
    """The stop strings of a request, as they are sought in its text.

    A special token ends a text too where a stop string spells it ("<|im_end|>"), although it shows none: there it is
    marked by one private character, which `shown` takes out again.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        special = sorted(tokenizer.special_ids) if params.stop and params.skip_special_tokens else []
        spelled = {i: tokenizer.token_bytes(i, skip_special_tokens=False).decode("utf-8", "replace") for i in special}
        spelled = {i: text for i, text in spelled.items() if text and any(text in stop for stop in params.stop)}
        self.marks = {i: chr(_FIRST_MARK + n) for n, i in enumerate(spelled)}  # by token id
        self._given = {stop: stop for stop in params.stop}
        for stop in params.stop:
            marked = stop
            for i in sorted(spelled, key=lambda i: -len(spelled[i])):
                marked = marked.replace(spelled[i], self.marks[i])
            self._given[marked] = stop
        self._no_marks = dict.fromkeys(map(ord, self.marks.values()))

    def find(self, text: str) -> tuple[int, str] | None:
        """Where the first to be complete begins, the longest of those, and how it was given; None if none is there."""
        ends = [
            (text.index(stop) + len(stop), -len(stop), given) for stop, given in self._given.items() if stop in text
        ]
        if not ends:
            return None
        end, length, given = min(ends)  # so it does not matter how tokens divide the text
        return end + length, given

    def held_back(self, text: str) -> int:
        """How many characters at the end of a text may begin one."""
        return max((_overlap(text, stop) for stop in self._given), default=0)

    def shown(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._no_marks) if self.marks else text


class TextStream:
    """The text of one sample. Whatever might begin a stop string is held back until it is certain that it does not.

    A model may have more embeddings than its tokenizer has pieces; an id without a piece adds no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: tuple[int, ...], params: SamplingParams) -> None:
        self._tokenizer, self._num_pieces = tokenizer, tokenizer.vocab_size
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            (token_id for token_id in prompt_ids if token_id < self._num_pieces),
            skip_special_tokens=params.skip_special_tokens,
        )
        self._stops = StopStrings(tokenizer, params)
        self._held = ""
        self._released: list[str] = []
        self._num_taken = 0

    def fork(self, params: SamplingParams) -> TextStream:
        """Another that goes on from here, all of its text still to be taken.

        The stop strings of `params` are sought in what follows and what is held back.
        """
        other = copy.copy(self)
        other._detokenizer = self._detokenizer.fork(skip_special_tokens=params.skip_special_tokens)
        other._stops, other._held = StopStrings(self._tokenizer, params), self._stops.shown(self._held)
        other._released = list(self._released)
        other._num_taken = 0
        return other

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._released)

    def take(self) -> str:
        """What was released since the last call."""
        new = "".join(self._released[self._num_taken :])
        self._num_taken = len(self._released)
        return new

    def push(self, token_id: int) -> str | None:
        """Add a token; the stop string that the text has now reached, cut off with all behind it, or None."""
        text = self._detokenizer.push(token_id) if token_id < self._num_pieces else ""
        return self._take(text + self._stops.marks.get(token_id, ""))

    def close(self) -> str | None:
        """No token follows: release what is held. The stop string that the last characters complete, or None."""
        stop = self._take(self._detokenizer.flush())
        self._release(len(self._held))
        return stop

    def _take(self, text: str) -> str | None:
        self._held += text
        found = self._stops.find(self._held)
        if found is None:
            self._release(len(self._held) - self._stops.held_back(self._held))
            return None
        start, stop = found
        self._release(start)
        self._held = ""
        return stop

    def _release(self, length: int) -> None:
        self._released.append(self._stops.shown(self._held[:length]))
        self._held = self._held[length:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass
class Completion:
    """One of a request's n samples so far; `stream` is None without a tokenizer."""

    seq: Sequence
    stream: TextStream | None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def push(self, token_id: int, eos_token_ids: Collection[int]) -> tuple[FinishReason, str | int | None] | None:
        """Add the text of the token that the sequence has just gained; why it ends there, and what stopped it."""
        params, stream = self.seq.request.params, self.stream
        ends = token_id in params.stop_token_ids
        stop: str | int | None = token_id if ends else None
        ends = ends or (not params.ignore_eos and token_id in eos_token_ids)
        full = len(self.seq.token_ids) >= self.seq.max_length
        if stream is not None:
            # A stop token asked for by id is the caller's mark, not text.
            reached = stream.push(token_id) if stop is None else None
            if reached is None and (ends or full):
                reached = stream.close()
            if reached is not None:
                ends, stop = True, reached
        if ends:
            return "stop", stop
        return ("length", None) if full else None

    def output(self) -> CompletionOutput:
        """The completion as a value."""
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
    """A request in the engine: hold on to it to follow or abort it."""

    request: Request
    prompt: str | None
    tokenizer: Tokenizer | None
    samples: dict[int, Completion] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position; the first token has none
    first_token_time: float | None = None
    finish_time: float | None = None
    error: Exception | None = None  # what the request failed with, where the engine isolates failures

    @property
    def finished(self) -> bool:
        """Whether all its samples are, and the engine is through with them."""
        return self.finish_time is not None

    def sample(self, seq: Sequence) -> Completion:
        """The completion that a sequence grows."""
        found = self.samples.get(seq.index)
        if found is None:
            request = self.request
            stream = TextStream(self.tokenizer, request.prompt_token_ids, request.params) if self.tokenizer else None
            found = self.samples[seq.index] = Completion(seq, stream)
        return found

    def fork(self, request: Request) -> Generation:
        """The generation of `request`, forked from this one: a copy, but for its times."""
        sample, (seq,) = self.sample(self.request.sequences[0]), request.sequences
        stream = sample.stream.fork(request.params) if sample.stream is not None else None
        samples = {seq.index: Completion(seq, stream, list(sample.logprobs))}
        return Generation(request, self.prompt, self.tokenizer, samples, dict(self.prompt_logprobs))

    def abort(self, reason: FinishReason = "abort") -> None:
        """End now: what has not finished does for this reason, and its text is all that is certain of it.

        A sequence that an interrupt kept from finishing, although it has all its tokens, ends by its "length".
        """
        for seq in self.request.sequences:
            if seq.status is not Status.FINISHED:
                seq.forget_unknown()
                seq.finish_reason = "length" if len(seq.token_ids) >= seq.max_length else reason
                seq.status = Status.FINISHED
        self.finish_time = time.monotonic()
        for sample in self.samples.values():
            if sample.stream is not None and sample.seq.finish_reason in (reason, "length"):
                sample.stream.close()

    def metrics(self) -> RequestMetrics:
        """Timings and counts up to now."""
        request = self.request
        return RequestMetrics(
            arrival_time=request.arrival,
            first_token_time=self.first_token_time,
            finish_time=self.finish_time,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=request.num_cached_tokens or 0,
            num_generated_tokens=sum(len(seq.token_ids) - seq.num_prompt_tokens for seq in request.sequences),
            num_draft_tokens=request.num_drafted,
            num_accepted_tokens=request.num_accepted,
        )

    def all_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """One entry for each token of the prompt, None where it has not come; None where none were asked for."""
        if self.request.params.prompt_logprobs is None:
            return None
        return tuple(map(self.prompt_logprobs.get, range(len(self.request.prompt_token_ids))))

    def output(self) -> RequestOutput:
        """The request as a value, finished or not."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=tuple(self.sample(seq).output() for seq in self.request.sequences),
            prompt_logprobs=self.all_prompt_logprobs(),
            metrics=self.metrics(),
        )
