"""Renders the deltas of a job as a response: server-sent events, or one body at the end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET

from fastllama.runtime.outputs import CompletionOutput, RequestDelta
from fastllama.serve import wire
from fastllama.serve.errors import ApiError, deadline_exceeded
from fastllama.serve.jobs import Job
from fastllama.serve.logprobs import ChatEntries, LogprobsTable, joined
from fastllama.serve.model import ServedModel

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


def answer_of(job: Job, model: ServedModel, request_id: str) -> Answer:
    """Returns an empty response to a job; request_id: of the request, part of the response's id."""
    return (_ChatAnswer if job.kind == "chat" else _CompletionAnswer)(job, model, request_id)


def error_event(error: ApiError) -> bytes:
    """Returns the event that ends a failed stream: clients take a truncated one for a whole answer."""
    return _event(error.body)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class Answer(ABC):
    """A response under construction. Choices are numbered prompt by prompt: prompt index x n + sample.

    Counts are totals so far. num_cached_tokens: prompt tokens found in the prefix cache; num_generated_tokens: of all
    samples, shown or not.
    """

    _response: ClassVar[type[wire.ChatCompletion | wire.TextCompletion]]  # not streamed

    def __init__(self, job: Job, model: ServedModel, request_id: str) -> None:
        self._job, self._tokenizer = job, model.tokenizer
        kind, prefix = (wire.ChatChunk, "chatcmpl") if job.kind == "chat" else (wire.TextCompletion, "cmpl")
        self._chunk: wire.ChatChunk | wire.TextCompletion = kind(  # every event is this one with other choices
            id=f"{prefix}-{request_id}",
            created=int(time.time()),
            model=job.model,
            choices=[],
            system_fingerprint=model.fingerprint,
            usage=None if job.include_usage else UNSET,
        )
        self._num_choices = len(job.prompts) * job.params.n
        self._gains: list[list[CompletionOutput]] = [[] for _ in range(self._num_choices)]  # unless it streams
        self.num_cached_tokens = self.num_generated_tokens = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return self._job.num_prompt_tokens

    def opening(self) -> bytes:
        """Returns events to send before the first token."""
        return b""

    def take(self, prompt_index: int, delta: RequestDelta) -> bytes:
        """Add what a prompt's samples gained; returns the events for it if the job streams, else nothing.

        Raises ApiError if the deadline cut a sample short. An aborted or failed one is shown unfinished: the engine
        raises its error next.
        """
        for output in delta.outputs:
            self.num_generated_tokens += len(output.token_ids)
        if delta.metrics is not None:
            self.num_cached_tokens += delta.metrics.num_cached_tokens
        first, events = prompt_index * self._job.params.n, []
        for output in delta.outputs:
            shown = output if output.finish_reason is None else self._ended(output)
            if self._job.stream:
                events.append(self._events(first + output.index, shown))
            else:
                self._gains[first + output.index].append(shown)
        return b"".join(events)

    def closing(self) -> bytes:
        """Returns the last events of a stream: the usage if requested, and [DONE]."""
        if not self._job.include_usage:
            return _DONE
        self._chunk.usage = self._usage()
        return self._event_of() + _DONE

    def body(self) -> bytes:
        """Returns the whole response, after the last delta."""
        response = self._response(
            id=self._chunk.id,
            created=self._chunk.created,
            model=self._chunk.model,
            choices=[self._choice(index, _whole(gains)) for index, gains in enumerate(self._gains)],
            usage=self._usage(),
            system_fingerprint=self._chunk.system_fingerprint,
        )
        return _encode(response)

    def _ended(self, output: CompletionOutput) -> CompletionOutput:
        """Returns the output with the finish reason to show."""
        if output.finish_reason == "deadline":
            raise deadline_exceeded()
        return output if output.finish_reason in ("stop", "length") else replace(output, finish_reason=None)

    def _ended_by_token(self, output: CompletionOutput) -> bool:
        """Whether the last token is one of `stop_token_ids`, which ends the text and is not part of it."""
        ended = output.finish_reason == "stop" and len(output.token_ids) > 0
        return ended and output.token_ids[-1] in self._job.params.stop_token_ids

    @abstractmethod
    def _events(self, index: int, output: CompletionOutput) -> bytes:
        """Returns the events for a choice's new output; nothing while no text is certain."""

    @abstractmethod
    def _choice(self, index: int, output: CompletionOutput) -> Any:
        """Returns a choice of the response."""

    def _event_of(self, *choices: Any) -> bytes:
        self._chunk.choices = [*choices]
        return _event(_encode(self._chunk))

    def _usage(self) -> wire.Usage:
        num_shown = self.num_generated_tokens if self._job.show_tokens else 0
        return wire.Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_shown,
            total_tokens=self.num_prompt_tokens + num_shown,
            prompt_tokens_details=wire.PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )


def _whole(gains: Sequence[CompletionOutput]) -> CompletionOutput:
    """Joins a choice's outputs; finish_reason: of the last one."""
    return replace(
        gains[-1],
        text="".join([gain.text for gain in gains]),
        token_ids=tuple([token_id for gain in gains for token_id in gain.token_ids]),
        logprobs=tuple([report for gain in gains for report in gain.logprobs or ()]),
    )


class _ChatAnswer(Answer):
    _response = wire.ChatCompletion

    def __init__(self, job: Job, model: ServedModel, request_id: str) -> None:
        super().__init__(job, model, request_id)
        skips = job.params.skip_special_tokens
        self._entries = [
            ChatEntries(model.tokenizer, begun=job.continues_text, skip_special_tokens=skips)
            for _ in range(self._num_choices)
        ]

    def opening(self) -> bytes:
        role = wire.ChatDelta(role="assistant", content="")
        return b"".join([self._event_of(wire.ChunkChoice(index=i, delta=role)) for i in range(self._num_choices)])

    def _events(self, index: int, output: CompletionOutput) -> bytes:
        events = b""
        if output.text or output.logprobs:
            delta, logprobs = wire.ChatDelta(content=output.text), self._logprobs(index, output)
            events = self._event_of(wire.ChunkChoice(index=index, delta=delta, logprobs=logprobs))
        if output.finish_reason is not None:
            last = wire.ChunkChoice(index=index, delta=wire.ChatDelta(), finish_reason=output.finish_reason)
            events += self._event_of(last)
        return events

    def _choice(self, index: int, output: CompletionOutput) -> wire.ChatChoice:
        assert output.finish_reason is not None, f"choice {index} has not finished"
        return wire.ChatChoice(
            index=index,
            message=wire.AnswerMessage(content=output.text),
            logprobs=self._logprobs(index, output),
            finish_reason=output.finish_reason,
        )

    def _logprobs(self, index: int, output: CompletionOutput) -> wire.ChatLogprobs | None:
        if self._job.logprobs is None:
            return None
        return self._entries[index].of(output.logprobs or (), ended=self._ended_by_token(output))


class _CompletionAnswer(Answer):
    _response = wire.TextCompletion

    def __init__(self, job: Job, model: ServedModel, request_id: str) -> None:
        super().__init__(job, model, request_id)
        self._echoes = [job.echo] * self._num_choices  # whether the prompt is still to be shown
        self._prompt_logprobs: dict[int, wire.CompletionLogprobs] = {}  # by prompt index
        self._tables: dict[int, LogprobsTable] = {}  # by choice

    def take(self, prompt_index: int, delta: RequestDelta) -> bytes:
        if self._job.echo and self._job.logprobs is not None and delta.prompt_logprobs is not None:
            table = LogprobsTable(self._tokenizer, shows_top=self._job.logprobs > 0)
            token_ids = self._job.prompts[prompt_index].token_ids
            self._prompt_logprobs[prompt_index] = table.of(token_ids, delta.prompt_logprobs)
        return super().take(prompt_index, delta)

    def _ended(self, output: CompletionOutput) -> CompletionOutput:
        output = super()._ended(output)
        if output.finish_reason is None or self._job.show_tokens:
            return output
        return replace(output, finish_reason="length")  # also if the hidden token is EOS

    def _events(self, index: int, output: CompletionOutput) -> bytes:
        choice = self._choice(index, output)
        is_empty = not (choice.text or choice.finish_reason or (choice.logprobs and choice.logprobs.tokens))
        return b"" if is_empty else self._event_of(choice)

    def _choice(self, index: int, output: CompletionOutput) -> wire.CompletionChoice:
        prompt_index = index // self._job.params.n
        text = output.text if self._job.show_tokens else ""
        logprobs = None if self._job.logprobs is None else self._logprobs(index, output)
        if self._echoes[index]:
            self._echoes[index] = False
            text = self._job.prompts[prompt_index].text + text
            if logprobs is not None and prompt_index in self._prompt_logprobs:
                logprobs = joined(self._prompt_logprobs[prompt_index], logprobs)
        return wire.CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=output.finish_reason)

    def _logprobs(self, index: int, output: CompletionOutput) -> wire.CompletionLogprobs:
        if index not in self._tables:
            prompt = self._job.prompts[index // self._job.params.n]
            self._tables[index] = LogprobsTable(
                self._tokenizer,
                prompt.token_ids,
                offset=len(prompt.text) if self._job.echo else 0,
                skip_special_tokens=self._job.params.skip_special_tokens,
                shows_top=bool(self._job.logprobs),
            )
        reports = (output.logprobs or ()) if self._job.show_tokens else ()
        token_ids = [report.token_id for report in reports]
        return self._tables[index].of(token_ids, reports, ended=self._ended_by_token(output))
