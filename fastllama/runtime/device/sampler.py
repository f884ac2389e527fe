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

DTYPES = {  # of a draw's parameters
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
        """Memory for so many rows."""
        first = ceil_div(8 * rows, ALIGNMENT) * ALIGNMENT  # of the log-probabilities
        memory = torch.empty(first + 4 * rows, dtype=torch.uint8, device=device)
        return cls(memory, memory[: 8 * rows].view(torch.int64), memory[first:].view(torch.float32))


@dataclass(frozen=True)
class StepLogits:
    """Logits [R, V] of one step, until the next one runs, and whose they are: see Inputs.samples.

    adjustments: what has the samples' biases and penalties; None where none has any. ids: of the step [T]; unknown:
    where in them the last tokens are of sequences that the host does not know.
    drawn: what kernels.sample gave for each row with the parameters of `samples`, adjustments included, where that was
    part of the step.
    prompts: (sequence, positions) whose logits are reported (Request.reported).
    prompt_logits: of those rows, in pieces [P, V] that are computed one after another, as they are asked for.
    """

    logits: Tensor
    samples: list[SamplingRow]
    adjustments: Adjustments | None = None
    ids: Tensor | None = None
    unknown: abc.Mapping[Sequence, int] = field(default_factory=dict)
    drawn: SampleBuffers | None = None
    prompts: abc.Sequence[tuple[Sequence, range]] = ()
    prompt_logits: abc.Iterable[Tensor] = ()


@dataclass(frozen=True)
class SampledToken:
    """A token sampled for a sequence; `logprob` is None unless asked for; `finite`: whether its logits were numbers.

    ahead: the draft tokens that have to be accepted before it.
    """

    seq: Sequence
    ahead: tuple[int, ...]
    token_id: int
    finite: bool
    logprob: TokenLogprob | None


class PendingTokens:
    """Tokens of a step that are sampled on the device, and their asynchronous copy to the host.

    drawn: their buffers, until the next step samples there. rows: in them, of each sampling row.
    """

    def __init__(
        self,
        samples: abc.Sequence[SamplingRow],
        rows: abc.Sequence[int],
        drawn: SampleBuffers,
        reports: abc.Sequence[TokenLogprob | None],
    ) -> None:
        self.drawn = drawn
        self._samples, self._rows, self._reports = samples, rows, reports
        self._num_rows = drawn.tokens.shape[0]
        # Copied, for the next step may draw there before these are read.
        self._arrived: torch.cuda.Event | None = None
        if drawn.memory.device.type == "cuda":
            self._numbers = torch.empty(drawn.memory.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            self._numbers.copy_(drawn.memory, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(drawn.memory.device))
        else:
            self._numbers = drawn.memory.clone()

    def rows_of(self, sequences: abc.Sequence[Sequence]) -> list[int]:
        """Where `drawn` holds the token of each sequence."""
        row_of = {sample.seq: row for sample, row in zip(self._samples, self._rows, strict=True)}
        return [row_of[seq] for seq in sequences]

    def read(self) -> list[SampledToken]:
        """The tokens, when they are there. NaN says that a row's logits were no numbers."""
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
    """Sample one token for each sampling row of the step, on its device."""
    samples, logits = step.samples, step.logits
    rows = [sample.row for sample in samples]
    if step.drawn is not None:
        host_bound = [sample for sample in samples if sample.seq.request.params.host_bound]
        if host_bound:
            again, at = _sampled(replace(step, samples=host_bound)), [sample.row for sample in host_bound]
            where = on_device(at, torch.int64, logits.device)
            step.drawn.tokens.index_copy_(0, where, again.tokens)
            step.drawn.logprobs.index_copy_(0, where, again.logprobs)
        return PendingTokens(samples, rows, step.drawn, _reports(logits, rows, samples, step.drawn.tokens, rows))
    places = range(len(samples))
    if not samples:
        return PendingTokens(samples, places, SampleBuffers.empty(0, torch.device("cpu")), [])
    drawn = _sampled(step)
    return PendingTokens(samples, places, drawn, _reports(logits, rows, samples, drawn.tokens, places))


def _sampled(step: StepLogits) -> SampleBuffers:
    """A token for each of the step's samples."""
    samples, logits = step.samples, step.logits
    rows = [sample.row for sample in samples]
    if rows != list(range(logits.shape[0])):
        logits = logits[on_device(rows, torch.int64, logits.device)]
    drawn = SampleBuffers.empty(len(samples), logits.device)
    kernels.sample(
        _sampled_from(logits, step),
        **{name: on_device(values, DTYPES[name], logits.device) for name, values in parameters(samples).items()},
        tokens=drawn.tokens,
        logprobs=drawn.logprobs,
    )
    return drawn


def draw(step: StepLogits) -> list[SampledToken]:
    """The token sampled for each sampling row of the step."""
    return start(step).read()


@torch.inference_mode()
def prompt_logprobs(step: StepLogits) -> list[tuple[Sequence, int, list[TokenLogprob]]]:
    """(sequence, position of the first token reported, log-probabilities from there on) of each that wants them."""
    rows: list[tuple[Scoring | None, int]] = []  # what asks, and the position of the token that the row predicts
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
        _show(logits, rows[part])  # last, for who sees them may change them
        del logits  # or it would stay until the next has been computed
    remaining = iter(reports)
    return [(seq, shown.start + 1, list(itertools.islice(remaining, len(shown)))) for seq, shown in step.prompts]


def _show(logits: Tensor, rows: abc.Sequence[tuple[Scoring | None, int]]) -> None:
    """Give each request the logits of its own rows that asked to see them."""
    first = 0
    for scoring, group in itertools.groupby(rows, key=lambda row: row[0]):
        positions = [position for _, position in group]
        if scoring is not None and scoring.on_logits is not None:
            with _of_the_request("on_logits"):
                scoring.on_logits(positions[0], logits[first : first + len(positions)])
        first += len(positions)


def _sampled_from(logits: Tensor, step: StepLogits) -> Tensor:
    """The logits [R, V] of the samples with biases, penalties and bans, as the logits processors leave them."""
    samples, adjustments = step.samples, step.adjustments
    if adjustments is not None:
        logits = adjustments.adjusted(logits, samples, step.ids, step.unknown)
        bans = [(place, i) for place, sample in enumerate(samples) for i in adjustments.banned(sample)]
        if bans:
            at, token_ids = (on_device(each, torch.int64, logits.device) for each in zip(*bans, strict=True))
            logits[at, token_ids] = -math.inf
    # Nothing is drafted for them: such rows of a step with drafts count for nothing, and no processor is to see them.
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
    """What is raised within is the request's alone, SystemExit too; Ctrl-C is not."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt)):
            raise
        raise RuntimeError(f"{what} raised {error!r}") from error


def _processed(logits: Tensor, sample: SamplingRow) -> Tensor:
    """A row of logits [V], as the request's processors leave it, one after another."""
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
    """Log-probabilities under the model's own logits, for the sequences that want them.

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
