"""Log-probabilities of tokens from logits, without an fp32 copy of all logits."""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.runtime.device.buffers import on_device
from fastllama.runtime.outputs import TokenLogprob

ROWS = 16  # reduced at once: the temporaries, 5 bytes per logit, stay small beside a step's logits
SERIAL = 2**15  # elements from which torch's CPU ops use several threads, and synchronize them at each op


@torch.inference_mode()
def token_logprobs(
    logits: Tensor, rows: abc.Sequence[int], targets: abc.Sequence[int], tops: abc.Sequence[int]
) -> list[TokenLogprob]:
    """Returns for each of these rows of logits [R, V] the target's log-probability and rank, and the likeliest tokens.

    tops: how many likeliest tokens, at most V. A row's result is bit-identical whatever the other rows.
    """
    reports: list[TokenLogprob] = []
    size = ROWS if logits.device.type != "cpu" else max(min(ROWS, (SERIAL - 1) // logits.shape[1]), 1)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        chosen = logits[on_device(rows[part], torch.int64, logits.device)]
        reports.extend(_reports(chosen, targets[part], tops[part]))
    return reports


def _reports(logits: Tensor, targets: abc.Sequence[int], tops: abc.Sequence[int]) -> list[TokenLogprob]:
    num_rows, device = len(targets), logits.device
    none, off = (torch.zeros(num_rows, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    # As in greedy sampling: -log(sum(exp(logits - largest))), which sums in one order, unlike torch.logsumexp.
    likeliest, base = kernels.sample(logits, off, none, off + 1, off, none, none)
    largest = logits.gather(1, likeliest[:, None]).float()

    def logprobs(values: Tensor) -> list[list[float]]:
        return (values.float() - largest + base[:, None]).tolist()

    chosen = logits.gather(1, on_device(targets, torch.int64, device)[:, None])
    ranks = (logits > chosen).sum(-1, dtype=torch.int32) + 1
    top = logits.topk(min(max(tops), logits.shape[1]), dim=-1)
    return [
        TokenLogprob(target, logprob, tuple(zip(ids[:count], values[:count], strict=True)), rank)
        for target, count, (logprob,), ids, values, rank in zip(
            targets, tops, logprobs(chosen), top.indices.tolist(), logprobs(top.values), ranks.tolist(), strict=True
        )
    ]
