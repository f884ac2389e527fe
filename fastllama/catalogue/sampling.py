"""Calls of `sample`, and of `adjust_logits` before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from fastllama.catalogue.maker import Arguments, Maker
from fastllama.kernels import sample_workspace

Filters = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
# Top-k and top-p in every row; no min-p, which FlashInfer does not combine with them. All are exact in fp32.
TOP_K_AND_TOP_P: Sequence[Filters] = ((0.75, 50, 0.875, 0.0),)
# Repetition, presence and frequency; all are exact in fp32.
PENALTIES = ((1.25, 0.5, 0.25), (0.75, -0.5, 0.125), (1.0, 0.25, -0.25))


def sample(
    m: Maker,
    rows: int,
    vocab: int,
    *,
    filters: Sequence[Filters] = TOP_K_AND_TOP_P,
    integers: torch.dtype = torch.int32,
) -> Arguments:
    """filters: of the rows, repeated cyclically. integers: the dtype of top_k."""
    logits = 2 * m.normal(rows, vocab)
    temperature, top_k, top_p, min_p = zip(*islice(cycle(filters), rows), strict=True) if rows else ((),) * 4
    return {
        "logits": logits,
        "temperature": m.tensor(temperature, torch.float32),
        "top_k": m.tensor(top_k, integers),
        "top_p": m.tensor(top_p, torch.float32),
        "min_p": m.tensor(min_p, torch.float32),
        "seed": torch.arange(rows, dtype=torch.int64, device=m.device) + 12345,
        "offset": 7 * torch.arange(rows, dtype=torch.int64, device=m.device),
        "tokens": m.fresh(rows, dtype=torch.int64),
        "logprobs": m.fresh(rows, dtype=torch.float32),
        "workspace": m.workspace(sample_workspace, logits),
    }


def adjust_logits(
    m: Maker,
    rows: int,
    vocab: int,
    *,
    recent: int = 1,
    slots: Sequence[int] | None = None,
    num_slots: int | None = None,
) -> Arguments:
    """recent: tokens of each row that are not yet counted. slots: of the rows, distinct where None; negative for a row
    without adjustments. num_slots: rows of the tables, as many as rows where None. A third of all tokens count as seen,
    in the prompt or up to three times.
    """
    num_slots = rows if num_slots is None else num_slots
    repetition, presence, frequency = zip(*islice(cycle(PENALTIES), rows), strict=True) if rows else ((),) * 3
    starts = recent * torch.arange(rows, dtype=torch.int64, device=m.device)
    counts = m.integers(0, 8, num_slots, vocab, dtype=torch.int32)
    counts *= m.integers(0, 3, num_slots, vocab, dtype=torch.int32) == 0
    return {
        "logits": 2 * m.normal(rows, vocab),
        "tokens": m.integers(0, vocab, recent * rows, dtype=torch.int64),
        "starts": starts,
        "ends": starts + recent,
        "slots": m.tensor(range(rows) if slots is None else slots, torch.int64),
        "bias": m.normal(num_slots, vocab, dtype=torch.float32),
        "counts": counts,
        "repetition_penalty": m.tensor(repetition, torch.float32),
        "presence_penalty": m.tensor(presence, torch.float32),
        "frequency_penalty": m.tensor(frequency, torch.float32),
        "out": m.fresh(rows, vocab, dtype=torch.promote_types(m.dtype, torch.float32)),
    }
