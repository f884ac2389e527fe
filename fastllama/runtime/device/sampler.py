"""Samples a step's tokens from its logits: penalties and biases, sampling, log-probabilities."""

from __future__ import annotations

import itertools
import math
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.arithmetic import ceil_div
from fastllama.errors import brief
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.buffers import ALIGNMENT, on_device
from fastllama.runtime.device.logprobs import token_logprobs
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.planning.inputs import SamplingRow, parameters
from fastllama.runtime.planning.sequence import Scoring, Sequence

DTYPES = {  # of the sampling parameters
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "offset": torch.int64,
}


class SampleBuffers(NamedTuple):
    """Device buffers of kernels.sample: tokens [R] int64 and log-probabilities [R] fp32 in one memory, copied at once.

    memory: [N] uint8, which begins with the tokens and ends with the log-probabilities.
    """

    memory: Tensor
    tokens: Tensor
    logprobs: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> SampleBuffers:
        """Allocates buffers for `rows` rows."""
        first = ceil_div(8 * rows, ALIGNMENT) * ALIGNMENT  # offset of the log-probabilities
        memory = torch.empty(first + 4 * rows, dtype=torch.uint8, device=device)
        return cls(memory, memory[: 8 * rows].view(torch.int64), memory[first:].view(torch.float32))


@dataclass(frozen=True)
class StepLogits:
    """Logits [R, V] of one step, valid until the next one runs, and their sequences: see Inputs.samples.

    adjustments: the samples' biases and penalties; None if none has any. ids: of the step [T]; unknown: their rows
    whose tokens are not on the host yet.
    sampled: the sampled tokens of each row, if sampling (adjustments included) was part of the captured step.
    prompts: (sequence, positions) whose logits are reported (Request.reported).
    prompt_logits: the logits of those rows, computed lazily in pieces [P, V].
    """

    logits: Tensor
    samples: list[SamplingRow]
    adjustments: Adjustments | None = None
    ids: Tensor | None = None
    unknown: abc.Mapping[Sequence, int] = field(default_factory=dict)
    sampled: SampleBuffers | None = None
    prompts: abc.Sequence[tuple[Sequence, range]] = ()
    prompt_logits: abc.Iterable[Tensor] = ()


@dataclass(frozen=True)
class SampledToken:
    """A token sampled for a sequence. `logprob`: None unless requested; `finite`: whether its logits were finite.

    ahead: the draft tokens that must be accepted before it.
    """

    seq: Sequence
    ahead: tuple[int, ...]
    token_id: int
    finite: bool
    logprob: TokenLogprob | None


class PendingTokens:
    """Tokens of a step that are being sampled on the device, and their asynchronous copy to the host.

    sampled: their buffers, valid until the next step samples into them. rows: of each sampling row in the buffers.
    """

    def __init__(
        self,
        samples: abc.Sequence[SamplingRow],
        rows: abc.Sequence[int],
        sampled: SampleBuffers,
        reports: abc.Sequence[TokenLogprob | None],
    ) -> None:
        self.sampled = sampled
        self._samples, self._rows, self._reports = samples, rows, reports
        self._num_rows = sampled.tokens.shape[0]
        # Copied, since the next step may overwrite the buffers before these are read.
        self._arrived: torch.cuda.Event | None = None
        if sampled.memory.device.type == "cuda":
            self._numbers = torch.empty(sampled.memory.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._numbers.copy_(sampled.memory, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(sampled.memory.device))
        else:
            self._numbers = sampled.memory.clone()

    def rows_of(self, sequences: abc.Sequence[Sequence]) -> list[int]:
        """Returns the row of each sequence's token in `sampled`."""
        row_of = {sample.seq: row for sample, row in zip(self._samples, self._rows, strict=True)}
        return [row_of[seq] for seq in sequences]

    def read(self) -> list[SampledToken]:
        """Wait for the tokens and return them. A NaN log-probability marks a row whose logits were not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers, count = self._numbers.numpy(), self._num_rows
        tokens = numbers[: 8 * count].view(np.int64).tolist()
        logprobs = numbers[numbers.shape[0] - 4 * count :].view(np.float32).tolist()
        return [
            SampledToken(sample.seq, sample.ahead, tokens[row], not math.isnan(logprobs[row]), report)
            for sample, row, report in zip(self._samples, self._rows, self._reports, strict=True)
        ]


@torch.inference_mode()
def start(step: StepLogits) -> PendingTokens:
    """Sample one token for each sampling row of the step, on its device, without waiting."""
    samples, logits = step.samples, step.logits
    rows = [sample.row for sample in samples]
    if step.sampled is not None:
        host_bound = [sample for sample in samples if sample.seq.request.params.host_bound]
        if host_bound:
            again, at = _sampled(replace(step, samples=host_bound)), [sample.row for sample in host_bound]
            where = on_device(at, torch.int64, logits.device)
            step.sampled.tokens.index_copy_(0, where, again.tokens)
            step.sampled.logprobs.index_copy_(0, where, again.logprobs)
        return PendingTokens(samples, rows, step.sampled, _reports(logits, rows, samples, step.sampled.tokens, rows))
    places = range(len(samples))
    if not samples:
        return PendingTokens(samples, places, SampleBuffers.empty(0, torch.device("cpu")), [])
    sampled = _sampled(step)
    return PendingTokens(samples, places, sampled, _reports(logits, rows, samples, sampled.tokens, places))


def _sampled(step: StepLogits) -> SampleBuffers:
    """Samples a token for each of the step's samples."""
    samples, logits = step.samples, step.logits
    rows = [sample.row for sample in samples]
    if rows != list(range(logits.shape[0])):
        logits = logits[on_device(rows, torch.int64, logits.device)]
    sampled = SampleBuffers.empty(len(samples), logits.device)
    kernels.sample(
        _sampled_from(logits, step),
        **{name: on_device(values, DTYPES[name], logits.device) for name, values in parameters(samples).items()},
        tokens=sampled.tokens,
        logprobs=sampled.logprobs,
    )
    return sampled


def sample(step: StepLogits) -> list[SampledToken]:
    """Sample one token for each sampling row of the step, and wait for them."""
    return start(step).read()


@torch.inference_mode()
def prompt_logprobs(step: StepLogits) -> list[tuple[Sequence, int, list[TokenLogprob]]]:
    """Returns (sequence, position of the first token reported, log-probabilities) for each that requests them."""
    rows: list[tuple[Scoring | None, int]] = []  # the request's scoring, and the predicted position
    targets: list[int] = []
    tops: list[int] = []
    for seq, shown in step.prompts:
        rows.extend((seq.request.scoring, position + 1) for position in shown)
        targets.extend(seq.request.targets(shown))
        tops.extend([seq.request.params.prompt_logprobs or 0] * len(shown))
    reports: list[TokenLogprob] = []
    for logits in step.prompt_logits:
        part = slice(len(reports), len(reports) + logits.shape[0])
        reports.extend(token_logprobs(logits, range(logits.shape[0]), targets[part], tops[part]))
        _show(logits, rows[part])  # last, since on_logits may change them
        del logits  # frees them before the next piece is computed
    remaining = iter(reports)
    return [(seq, shown.start + 1, list(itertools.islice(remaining, len(shown)))) for seq, shown in step.prompts]


def _show(logits: Tensor, rows: abc.Sequence[tuple[Scoring | None, int]]) -> None:
    """Call on_logits of each scoring request with the logits of its own rows."""
    first = 0
    for scoring, group in itertools.groupby(rows, key=lambda row: row[0]):
        positions = [position for _, position in group]
        if scoring is not None and scoring.on_logits is not None:
            with _of_the_request("on_logits"):
                scoring.on_logits(positions[0], logits[first : first + len(positions)])
        first += len(positions)


def _sampled_from(logits: Tensor, step: StepLogits) -> Tensor:
    """Returns the logits [R, V] of the samples after biases, penalties, bans and logits processors."""
    samples, adjustments = step.samples, step.adjustments
    if adjustments is not None:
        logits = adjustments.adjusted(logits, samples, step.ids, step.unknown)
        bans = [(place, i) for place, sample in enumerate(samples) for i in adjustments.banned(sample)]
        if bans:
            at, token_ids = (on_device(each, torch.int64, logits.device) for each in zip(*bans, strict=True))
            logits[at, token_ids] = -math.inf
    # Requests with logits processors have no drafts: their filler rows in a step with drafts are unused, so no
    # processor sees them.
    processed = [
        place for place, (seq, _, ahead) in enumerate(samples) if seq.request.params.logits_processors and not ahead
    ]
    if processed and adjustments is None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    for place in processed:
        logits[place] = _processed(logits[place], samples[place])
    return logits


@contextmanager
def _of_the_request(what: str) -> Iterator[None]:
    """Turns any exception raised inside, except Ctrl-C, into an Exception that fails only this request."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt)):
            raise
        raise RuntimeError(f"{what} raised {error!r}") from error


def _processed(logits: Tensor, sample: SamplingRow) -> Tensor:
    """Returns a row of logits [V] after the request's processors, called in order."""
    seq, shape = sample.seq, logits.shape
    for processor in seq.request.params.logits_processors:
        with _of_the_request("a logits processor"):
            logits = processor(seq.token_ids[seq.num_prompt_tokens :], logits)
        if not isinstance(logits, Tensor) or logits.shape != shape or not logits.is_floating_point():
            raise TypeError(
                f"logits processor {brief(processor)} returned {brief(logits)}; legal: a floating tensor of {shape[0]}"
            )
    return logits


def _reports(
    logits: Tensor,
    rows: abc.Sequence[int],
    samples: abc.Sequence[SamplingRow],
    tokens: Tensor,
    places: abc.Sequence[int],
) -> list[TokenLogprob | None]:
    """Log-probabilities under the model's own logits, for the sequences that request them.

    rows, places: of each sample, in logits and in tokens.
    """
    reports: list[TokenLogprob | None] = [None] * len(samples)
    asked = [sample.seq.request.params.logprobs for sample in samples]
    wanted = [i for i, top in enumerate(asked) if top is not None]
    if wanted:
        tops, targets = [asked[i] or 0 for i in wanted], tokens[[places[i] for i in wanted]].tolist()
        found = token_logprobs(logits, [rows[i] for i in wanted], targets, tops)
        for i, report in zip(wanted, found, strict=True):
            reports[i] = report
    return reports
