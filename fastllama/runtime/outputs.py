"""Results of a request: texts, tokens, log-probabilities and timings, as immutable values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastllama.arithmetic import exp

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token, as SamplingParams.logprobs defines it.

    top: the likeliest (token id, log-probability) at its position, best first.
    rank: 1 for the likeliest token, else one more than the number of likelier ones; None if not computed.
    text: the token's own text, U+FFFD for each part of a character, special tokens spelled out; None without a
    tokenizer.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a prompt; finished when `finish_reason` is set.

    text: without the stop string that ended it, unless include_stop_str_in_output. stop_reason: the stop string, the
    stop token id, or the error.
    logprobs: one entry per generated token; None if none were requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole sequence of tokens, the sum of theirs; None if none were requested."""
        return None if self.logprobs is None else math.fsum(each.logprob for each in self.logprobs)


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds on one monotonic clock, None until they occur; token counts summed over the samples.

    first_scheduled_time: when its prompt was first admitted to a step; before, it was queued.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0  # draft tokens verified
    num_accepted_tokens: int = 0  # draft tokens accepted: generated tokens beyond one per step


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and its samples so far, in order of their index.

    prompt: None if token ids were given.
    prompt_logprobs: one entry per prompt token, None for the first; None if none were requested.
    seed: the one used for sampling, from SamplingParams or chosen.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    metrics: RequestMetrics
    seed: int = 0

    @property
    def finished(self) -> bool:
        """Whether every sample has finished."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Log-probabilities of a prompt's own tokens, each given those before it.

    prompt: None if token ids were given. start: position of the first scored token.
    logprobs: one entry for each of prompt_token_ids[start:]; empty if the request failed, and the figures below are
    NaN.
    metrics: its num_prompt_tokens counts the tokens fed, one less than prompt_token_ids has.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    start: int
    logprobs: tuple[TokenLogprob, ...]
    metrics: RequestMetrics

    @property
    def cumulative_logprob(self) -> float:
        """Natural log-probability of all scored tokens together, the sum of theirs."""
        return math.fsum(each.logprob for each in self.logprobs) if self.logprobs else math.nan

    @property
    def is_greedy(self) -> bool:
        """Whether each scored token is the likeliest after those before it, ties included."""
        return bool(self.logprobs) and all(each.rank == 1 for each in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of the scored tokens."""
        return exp(-self.cumulative_logprob / max(len(self.logprobs), 1))


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """The new output of a request since its last delta.

    outputs: the samples that gained something, by index; text, token_ids and logprobs contain only what is new. The
    last one of a sample has its finish_reason and stop_reason.
    prompt_logprobs: as in RequestOutput, in the delta with the first token.
    metrics: of the whole request, in its last delta; None before.
    """

    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the last delta."""
        return self.metrics is not None
