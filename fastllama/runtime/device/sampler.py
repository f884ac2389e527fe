"""Samples a step's tokens from its logits: penalties and biases, sampling, log-probabilities."""

from __future__ import annotations

import itertools
import math
from collections import Counter, abc
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.arithmetic import ceil_div
from fastllama.runtime.device.buffers import ALIGNMENT, on_device
from fastllama.runtime.device.logprobs import token_logprobs
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.planning.inputs import SamplingRow, parameters
from fastllama.runtime.planning.sequence import Sequence
from fastllama.runtime.planning.step import Chunk

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

    drawn: what kernels.sample gave for each row with the parameters of `samples`, where that was part of the step.
    prompts: (chunk, rows) where prompt log-probabilities are wanted; row i predicts token start + i + 1.
    prompt_logits: of those rows, in pieces [P, V] that are computed one after another, as they are asked for.
    """

    logits: Tensor
    samples: list[SamplingRow]
    drawn: SampleBuffers | None = None
    prompts: abc.Sequence[tuple[Chunk, int]] = ()
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
    changes = _changes(samples)
    if step.drawn is not None and not any(changes):
        return PendingTokens(samples, rows, step.drawn, _reports(logits, rows, samples, step.drawn.tokens, rows))
    places = range(len(samples))
    if not samples:
        return PendingTokens(samples, places, SampleBuffers.empty(0, torch.device("cpu")), [])
    raw = logits if rows == list(range(logits.shape[0])) else logits[rows]
    drawn = SampleBuffers.empty(len(samples), raw.device)
    kernels.sample(
        _adjusted(raw, *changes),
        **{name: on_device(values, DTYPES[name], raw.device) for name, values in parameters(samples).items()},
        tokens=drawn.tokens,
        logprobs=drawn.logprobs,
    )
    return PendingTokens(samples, places, drawn, _reports(raw, places, samples, drawn.tokens, places))


def draw(step: StepLogits) -> list[SampledToken]:
    """The token sampled for each sampling row of the step."""
    return start(step).read()


@torch.inference_mode()
def prompt_logprobs(step: StepLogits) -> list[tuple[Sequence, int, list[TokenLogprob]]]:
    """(sequence, first position predicted, log-probabilities from there on) for each chunk that wants them."""
    targets: list[int] = []
    tops: list[int] = []
    for chunk, count in step.prompts:
        targets.extend(chunk.seq.token_ids[chunk.start + 1 : chunk.start + 1 + count])
        tops.extend([chunk.seq.request.params.prompt_logprobs or 0] * count)
    reports: list[TokenLogprob] = []
    for logits in step.prompt_logits:
        rows = slice(len(reports), len(reports) + logits.shape[0])
        reports.extend(token_logprobs(logits, targets[rows], tops[rows]))
        del logits  # or it would stay until the next has been computed
    remaining = iter(reports)
    return [(chunk.seq, chunk.start + 1, list(itertools.islice(remaining, count))) for chunk, count in step.prompts]


_Change = tuple[int, int, float]  # place of a sample, token id, how much


def _changes(samples: abc.Sequence[SamplingRow]) -> tuple[list[_Change], list[_Change]]:
    """Repetition penalties, then what is added to logits: biases and the other penalties."""
    scaled: list[_Change] = []
    added: list[_Change] = []
    for place, (seq, _, ahead) in enumerate(samples):
        params = seq.request.params
        if params.repetition_penalty != 1:
            scaled.extend((place, token_id, params.repetition_penalty) for token_id in {*seq.token_ids, *ahead})
        if params.logit_bias:
            added.extend((place, token_id, bias) for token_id, bias in params.logit_bias.items())
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter((*seq.token_ids[seq.num_prompt_tokens :], *ahead))
            added.extend(
                (place, token_id, -params.presence_penalty - count * params.frequency_penalty)
                for token_id, count in counts.items()
            )
    return scaled, added


def _adjusted(logits: Tensor, scaled: list[_Change], added: list[_Change]) -> Tensor:
    """Logits in fp32 (fp64 stays) with these changes; the same tensor where there are none.

    A change that overflows is as large as can be, so that logits which are numbers stay some.
    """
    if not scaled and not added:
        return logits
    adjusted = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if scaled:
        where, penalty = _places(scaled, adjusted)
        values, limit = adjusted[where], _limit(adjusted)
        changed = torch.where(values > 0, values / penalty, values * penalty).clamp(-limit, limit)
        adjusted[where] = torch.where(values.isfinite(), changed, values)
    if added:
        adjusted.index_put_(*_places(added, adjusted), accumulate=True)
    return adjusted


def _places(changes: list[_Change], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(rows, token ids) and values of some changes, ready to index `logits`."""
    rows, token_ids, values = zip(*changes, strict=True)
    device = logits.device
    where = on_device(rows, torch.int64, device), on_device(token_ids, torch.int64, device)
    limit = _limit(logits)
    return where, on_device([min(max(value, -limit), limit) for value in values], logits.dtype, device)


def _limit(logits: Tensor) -> float:
    """The largest change of a logit: a few of them add up to a finite number."""
    return torch.finfo(logits.dtype).max / 4


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
        found = token_logprobs(logits[[rows[i] for i in wanted]], targets, tops)
        for i, report in zip(wanted, found, strict=True):
            reports[i] = report
    return reports
