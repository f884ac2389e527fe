"""Calls of `sample`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from fastllama.catalogue.maker import Arguments, Maker
from fastllama.kernels import sample_workspace

Filters = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
# Top-k and top-p in every row; no min-p, which FlashInfer does not combine with them. All are exact in fp32.
TOP_K_AND_TOP_P: Sequence[Filters] = ((0.75, 50, 0.875, 0.0),)


def sample(
    m: Maker,
    rows: int,
    vocab: int,
    *,
    filters: Sequence[Filters] = TOP_K_AND_TOP_P,
    integers: torch.dtype = torch.int32,
) -> Arguments:
    """filters: of the first rows, and of those after them again. integers: the dtype of top_k."""
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
