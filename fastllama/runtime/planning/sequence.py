"""A request, and its sequences (one per sample)."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastllama.runtime.bad_words import BadWords
from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.block_pool import ROOT

PageKey = tuple[int, tuple[int, ...]]  # prefix cache key: the prefix id of the pages before, and the page's tokens
UNKNOWN = -1  # placeholder for a token that is still being sampled


class Status(enum.Enum):
    """The state of a sequence in the scheduler; only running sequences own pages."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """Options of a request that scores its prompt's tokens and generates none.

    start: position of the first token to score. last_token_id: the token after the prompt, scored but not fed.
    on_logits: called piecewise with the position of a token and the logits [R, V] of it and the tokens after it.
    """

    start: int
    last_token_id: int
    on_logits: Callable[[int, Any], None] | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One request. The scheduler makes its first sequence when it is added, the rest when its prompt is computed."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: float  # seconds, by time.monotonic()
    seed: int = 0  # of its samples: from its parameters, or chosen
    bad_words: BadWords | None = None  # None where its parameters have none
    scoring: Scoring | None = None  # None where tokens are generated
    first_scheduled: float | None = None  # when it was first admitted, on the same clock; None until then
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at that time
    num_drafted: int = 0  # draft tokens verified
    num_accepted: int = 0  # draft tokens accepted
    sequences: list[Sequence] = field(default_factory=list, repr=False)

    def begin(self, num_cached_tokens: int) -> None:
        """Record the first admission; later ones, after a preemption, are ignored."""
        if self.first_scheduled is None:
            self.first_scheduled, self.num_cached_tokens = time.monotonic(), num_cached_tokens

    @property
    def reported(self) -> range:
        """Prompt positions whose logits give a reported log-probability, that of the next token."""
        length = len(self.prompt_token_ids)
        if self.scoring is not None:
            return range(self.scoring.start - 1, length)
        return range(0 if self.params.prompt_logprobs is None else length - 1)

    def targets(self, positions: range) -> tuple[int, ...]:
        """Returns the tokens after these positions, which are in `reported`."""
        known, scoring = self.prompt_token_ids[positions.start + 1 : positions.stop + 1], self.scoring
        if scoring is not None and positions.stop == len(self.prompt_token_ids):
            return (*known, scoring.last_token_id)
        return known

    @property
    def finished(self) -> bool:
        """Whether the request was added and all its sequences have finished."""
        return bool(self.sequences) and all(seq.status is Status.FINISHED for seq in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and generated tokens of one sample, and the KV pages that hold the first `num_computed` of them.

    The slot of position p is page_ids[p // page_size] * page_size + p % page_size. Changed only by the scheduler.
    """

    seq_id: int
    request: Request
    index: int
    token_ids: list[int]
    max_length: int  # prompt and generated tokens at which the engine must finish it with "length"
    num_seats: int  # of max_num_seqs: n of its request until the prompt is computed, then 1
    patience: int = 0  # tokens of later prompts that may still be admitted before it
    status: Status = Status.WAITING
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    num_published: int = 0  # leading pages in the prefix cache
    prefix_id: int = ROOT  # the prefix cache's id of those pages
    awaits: tuple[Sequence, int] | None = None  # (sequence, pages): waits until that sequence has published so many
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def reusable(self) -> abc.Sequence[int]:
        """Its tokens up to the first whose logits are reported: cached keys and values of earlier ones can be used."""
        reported = self.request.reported
        return self.token_ids[: reported.start + 1] if reported else self.token_ids

    def page_key(self, page_size: int) -> PageKey | None:
        """Returns the cache key of the next prompt page to publish; None where there is none."""
        end = (self.num_published + 1) * page_size
        if end > self.num_prompt_tokens:
            return None
        return self.prefix_id, tuple(self.token_ids[end - page_size : end])

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def fork(self, seq_id: int, **changes: Any) -> Sequence:
        """Returns a copy that holds the same tokens and pages; the caller adds the page references."""
        return dataclasses.replace(
            self, seq_id=seq_id, token_ids=list(self.token_ids), page_ids=list(self.page_ids), **changes
        )

    def forget_unknown(self) -> None:
        """Drop the placeholder of a token that is still being sampled."""
        if self.token_ids[-1] == UNKNOWN:
            self.token_ids.pop()

    def release_pages(self) -> list[int]:
        """Reset to nothing computed and return the pages, for the caller to free."""
        page_ids, self.page_ids = self.page_ids, []
        self.num_computed = self.num_published = 0
        self.prefix_id = ROOT
        return page_ids


def check_fork(request: Request, params: SamplingParams) -> None:
    """Check whether an unfinished request can be forked with these sampling parameters. Raises ValueError."""
    for name, n in (("n of the request to fork", request.params.n), ("n", params.n)):
        if n != 1:
            raise ValueError(f"{name} is {n}; legal: 1")
    num_generated = len(request.sequences[0].token_ids) - len(request.prompt_token_ids)
    if params.max_tokens is not None and params.max_tokens <= num_generated:
        raise ValueError(
            f"max_tokens is {params.max_tokens}, and {num_generated} are already generated; "
            f"legal: at least {num_generated + 1}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and getattr(request.params, name) is None:
            raise ValueError(f"{name} is {value}, but the request to fork reports none; legal: None")
