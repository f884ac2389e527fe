"""From the logits of a step to its tokens: penalties and biases, the draw, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.runtime.buffers import on_device
from fastllama.runtime.inputs import Sample, parameters
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.sequence import Sequence
from fastllama.runtime.step import Chunk

DTYPES = {  # of a draw's parameters
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "offset": torch.int64,
}


@dataclass(frozen=True)
class StepLogits:
    """Logits [R, V] of one step, until the next one runs, and whose they are: see Inputs.samples and Inputs.prompts.

    drawn: what kernels.sample gave for each row with the parameters of `samples`, where that was part of the step.
    """

    logits: Tensor
    samples: list[Sample]
    prompts: list[tuple[Chunk, int, int]]
    drawn: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Draw:
    """The token drawn for a sequence; `logprob` is None unless asked for; `finite`: whether its logits were numbers.

    ahead: what would have to come before it.
    """

    seq: Sequence
    ahead: tuple[int, ...]
    token_id: int
    finite: bool
    logprob: TokenLogprob | None


class Draws:
    """Tokens of a step that are drawn on the device, and on their way to the host.

    tokens: [N] int64, until the next step of the same shape has begun. places: of each sequence in it.
    """

    def __init__(self, samples: Items[Sample], tokens: Tensor, logprobs: Tensor, reports: Items[TokenLogprob | None]):
        self.tokens = tokens
        self._samples, self._reports = samples, reports
        # In one, to wait once, and copied, for the next step may write its own there. Token ids are exact in fp64.
        self._numbers = torch.stack([tokens.double(), logprobs.double()])
        self._arrived: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            host = torch.empty(self._numbers.shape, dtype=torch.float64, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    @property
    def places(self) -> dict[Sequence, int]:
        return {sample.seq: place for place, sample in enumerate(self._samples)}

    def read(self) -> list[Draw]:
        """The tokens, when they are there. NaN says that a row's logits were no numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [
            Draw(sample.seq, sample.ahead, int(token_id), not math.isnan(logprob), report)
            for sample, token_id, logprob, report in zip(
                self._samples, *self._numbers.tolist(), self._reports, strict=True
            )
        ]


@torch.inference_mode()
def start(step: StepLogits) -> Draws:
    """Draw one token for each sample of the step."""
    samples = step.samples
    if not samples:
        nothing = torch.empty(0)
        return Draws(samples, nothing, nothing, [])
    rows = [sample.row for sample in samples]
    every = rows == list(range(step.logits.shape[0]))
    raw = step.logits if every else step.logits[rows]
    adjusted = _adjusted(raw, samples)
    if step.drawn is not None and adjusted is raw:
        tokens, logprobs = step.drawn if every else (drawn[rows] for drawn in step.drawn)
    else:
        tokens, logprobs = kernels.sample(
            adjusted,
            **{name: on_device(values, DTYPES[name], raw.device) for name, values in parameters(samples).items()},
        )
    return Draws(samples, tokens, logprobs, _reports(raw, samples, tokens))


def draw(step: StepLogits) -> list[Draw]:
    """One token for each sample of the step."""
    return start(step).read()


@torch.inference_mode()
def prompt_logprobs(step: StepLogits) -> list[tuple[Sequence, int, list[TokenLogprob]]]:
    """(sequence, first position predicted, log-probabilities from there on) for each chunk that wants them."""
    found = []
    for chunk, row, count in step.prompts:
        first = chunk.start + 1
        targets = chunk.seq.token_ids[first : first + count]
        tops = [chunk.seq.request.params.prompt_logprobs or 0] * count
        found.append((chunk.seq, first, _logprobs(step.logits[row : row + count], targets, tops)))
    return found


def _adjusted(logits: Tensor, samples: Items[Sample]) -> Tensor:
    """Logits in fp32 (fp64 stays) with penalties and biases; the same tensor where no sequence wants any."""
    scaled: list[tuple[int, int, float]] = []  # row, token id, repetition penalty
    added: list[tuple[int, int, float]] = []  # row, token id, bias
    for row, (seq, _, ahead) in enumerate(samples):
        params = seq.request.params
        if params.repetition_penalty != 1:
            scaled.extend((row, token_id, params.repetition_penalty) for token_id in {*seq.token_ids, *ahead})
        if params.logit_bias:
            added.extend((row, token_id, bias) for token_id, bias in params.logit_bias.items())
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter((*seq.token_ids[seq.num_prompt_tokens :], *ahead))
            added.extend(
                (row, token_id, -params.presence_penalty - count * params.frequency_penalty)
                for token_id, count in counts.items()
            )
    if not scaled and not added:
        return logits
    adjusted = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if scaled:
        where, penalty = _places(scaled, adjusted)
        values = adjusted[where]
        adjusted[where] = torch.where(values > 0, values / penalty, values * penalty)
    if added:
        adjusted.index_put_(*_places(added, adjusted), accumulate=True)
    return adjusted


def _places(changes: list[tuple[int, int, float]], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(rows, token ids) and values of some changes, ready to index `logits`."""
    rows, token_ids, values = zip(*changes, strict=True)
    device = logits.device
    where = on_device(rows, torch.int64, device), on_device(token_ids, torch.int64, device)
    return where, on_device(values, logits.dtype, device)


def _reports(logits: Tensor, samples: Items[Sample], tokens: Tensor) -> list[TokenLogprob | None]:
    """Log-probabilities under the model's own logits, for the sequences that want them."""
    reports: list[TokenLogprob | None] = [None] * len(samples)
    asked = [sample.seq.request.params.logprobs for sample in samples]
    wanted = [i for i, top in enumerate(asked) if top is not None]
    if wanted:
        tops = [asked[i] or 0 for i in wanted]
        for i, report in zip(wanted, _logprobs(logits[wanted], tokens[wanted].tolist(), tops), strict=True):
            reports[i] = report
    return reports


def _logprobs(logits: Tensor, targets: list[int], tops: list[int]) -> list[TokenLogprob]:
    """For each row of logits [R, V]: the log-probability of its target and its likeliest `tops[row]` tokens (or V)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(target, logprob, tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (target, logprob, top) in enumerate(zip(targets, chosen, tops, strict=True))
    ]
