"""From the logits of a step to its tokens: penalties and biases, the draw, log-probabilities."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.runtime.buffers import on_device
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.runner import StepLogits
from fastllama.runtime.sequence import Sequence

_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: keeps the keys of neighbouring seeds and samples apart


@dataclass(frozen=True)
class Draw:
    """The token drawn for a sequence; `logprob` is None unless asked for; `finite`: whether its logits were numbers."""

    seq: Sequence
    token_id: int
    finite: bool
    logprob: TokenLogprob | None


@torch.inference_mode()
def draw(step: StepLogits) -> list[Draw]:
    """One token for each sample of the step.

    Token i of sample j of a request depends on its logits, its parameters, the key (seed, j) and the counter i alone.
    """
    if not step.samples:
        return []
    sequences = [seq for seq, _ in step.samples]
    rows = [row for _, row in step.samples]
    raw = step.logits if rows == list(range(step.logits.shape[0])) else step.logits[rows]
    adjusted = _adjusted(raw, sequences)
    # The largest logit is NaN if any is: a finite one means a distribution that can be drawn from.
    finite = torch.isfinite(adjusted.amax(-1))
    tokens = _sample(torch.where(finite[:, None], adjusted, 0), sequences)
    reports = _reports(raw, sequences, tokens)
    drawn, numbers = torch.stack([tokens, finite.to(tokens.dtype)]).tolist()  # the one wait for the device
    return [Draw(*each) for each in zip(sequences, drawn, map(bool, numbers), reports, strict=True)]


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


def _sample(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    params = [seq.request.params for seq in sequences]
    keys = [((p.seed or 0) + seq.index * _ODD) % 2**63 for p, seq in zip(params, sequences, strict=True)]
    offsets = [len(seq.token_ids) - seq.num_prompt_tokens for seq in sequences]

    def tensor(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return on_device(values, dtype, logits.device)

    tokens, _ = kernels.sample(
        logits,
        temperature=tensor([p.temperature for p in params], torch.float32),
        top_k=tensor([p.top_k for p in params], torch.int64),
        top_p=tensor([p.top_p for p in params], torch.float32),
        min_p=tensor([p.min_p for p in params], torch.float32),
        seed=tensor(keys, torch.int64),
        offset=tensor(offsets, torch.int64),
    )
    return tokens


def _adjusted(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits in fp32 (fp64 stays) with penalties and biases; the same tensor where no sequence wants any."""
    scaled: list[tuple[int, int, float]] = []  # row, token id, repetition penalty
    added: list[tuple[int, int, float]] = []  # row, token id, bias
    for row, seq in enumerate(sequences):
        params = seq.request.params
        if params.repetition_penalty != 1:
            scaled.extend((row, token_id, params.repetition_penalty) for token_id in set(seq.token_ids))
        if params.logit_bias:
            added.extend((row, token_id, bias) for token_id, bias in params.logit_bias.items())
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(seq.token_ids[seq.num_prompt_tokens :])
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


def _reports(logits: Tensor, sequences: list[Sequence], tokens: Tensor) -> list[TokenLogprob | None]:
    """Log-probabilities under the model's own logits, for the sequences that want them."""
    reports: list[TokenLogprob | None] = [None] * len(sequences)
    wanted = [i for i, seq in enumerate(sequences) if seq.request.params.logprobs is not None]
    if wanted:
        tops = [sequences[i].request.params.logprobs or 0 for i in wanted]
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
