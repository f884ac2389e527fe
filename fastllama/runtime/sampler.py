"""From the logits of a step to its tokens: penalties and biases, the draw, log-probabilities."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama import kernels
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
    tokens, chosen = _sample(_adjusted(raw, sequences), sequences)
    finite = torch.isfinite(chosen).tolist()
    reports = _reports(raw, sequences, tokens)
    return [Draw(*drawn) for drawn in zip(sequences, tokens.tolist(), finite, reports, strict=True)]


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


def _sample(logits: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    params = [seq.request.params for seq in sequences]
    keys = [((p.seed or 0) + seq.index * _ODD) % 2**63 for p, seq in zip(params, sequences, strict=True)]
    offsets = [len(seq.token_ids) - seq.num_prompt_tokens for seq in sequences]

    def tensor(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return kernels.sample(
        logits,
        temperature=tensor([p.temperature for p in params], torch.float32),
        top_k=tensor([p.top_k for p in params], torch.int64),
        top_p=tensor([p.top_p for p in params], torch.float32),
        min_p=tensor([p.min_p for p in params], torch.float32),
        seed=tensor(keys, torch.int64),
        offset=tensor(offsets, torch.int64),
    )


def _adjusted(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits in fp32 with penalties and biases; the same tensor where no sequence wants any."""
    adjusted = None
    for row, seq in enumerate(sequences):
        params = seq.request.params
        counted = params.presence_penalty or params.frequency_penalty
        if params.repetition_penalty == 1 and not counted and not params.logit_bias:
            continue
        if adjusted is None:
            adjusted = logits.to(torch.float32, copy=True)
        scores = adjusted[row]
        if params.repetition_penalty != 1:
            seen = torch.tensor(list(set(seq.token_ids)), device=scores.device)
            values, penalty = scores[seen], params.repetition_penalty
            scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
        changes = dict(params.logit_bias or {})
        if counted:
            for token_id, count in Counter(seq.token_ids[seq.num_prompt_tokens :]).items():
                penalty = params.presence_penalty + count * params.frequency_penalty
                changes[token_id] = changes.get(token_id, 0.0) - penalty
        if changes:
            scores[list(changes)] += torch.tensor(list(changes.values()), dtype=torch.float32, device=scores.device)
    return logits if adjusted is None else adjusted


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
    """For each row of logits [R, V]: the log-probability of its target and its likeliest `tops[row]` tokens."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(max(tops), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(target, logprob, tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (target, logprob, top) in enumerate(zip(targets, chosen, tops, strict=True))
    ]
