"""Checks of the values of tensors, for debugging: ids, positions, slots, lengths, pages and bounds.

They copy tensors to the host, so ops run them only with FASTLLAMA_CHECK=1. Without it an illegal value returns NaN, or
nothing is written for it, as kernels/reference defines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.reference.attention import ascend, room


def check_adjust_logits(
    logits: Tensor, tokens: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, bias: Tensor, *others: Any
) -> None:
    """Raise ValueError for an illegal slot or bound. All checks here take the arguments of their op."""
    _check_below("slots", slots.clamp(min=0), max(bias.shape[0], 1))
    for name, bounds in (("starts", starts), ("ends", ends)):
        _check_below(name, bounds, tokens.shape[0] + 1)


def check_embedding(ids: Tensor, weight: Tensor, out: Tensor) -> None:
    _check_below("ids", ids, weight.shape[0])


def check_rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, *others: Any) -> None:
    _check_below("positions", positions, cos_sin.shape[0])


def check_rope_and_write_kv(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, k_pages: Tensor, *others: Any
) -> None:
    _check_below("positions", positions, cos_sin.shape[0])
    _check_slots(slots, k_pages)


def check_write_kv(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, *others: Any) -> None:
    _check_slots(slots, k_pages)


def check_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *others: Any) -> None:
    _check_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    _check_bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])


def check_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *others: Any,
) -> None:
    _check_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_decode(q, k_pages, v_pages, page_table, seq_lens)


def check_decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor, *others: Any
) -> None:
    num_pages, _, page_size, _ = k_pages.shape
    _check_below("seq_lens", seq_lens, room(k_pages, page_table) + 1)
    used = -(-seq_lens // page_size)
    unused = torch.arange(page_table.shape[1], dtype=torch.int32, device=page_table.device) >= used[:, None]
    _check_below("page_table", page_table.masked_fill(unused, 0), max(num_pages, 1))


def _check_slots(slots: Tensor, k_pages: Tensor) -> None:
    num_pages, _, page_size, _ = k_pages.shape
    _check_below("slots", slots.clamp(min=0), num_pages * page_size)


def _check_below(name: str, numbers: Tensor, end: int) -> None:
    """Raise ValueError for the first number that is not from 0 to end - 1."""
    wrong = ((numbers < 0) | (numbers >= end)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        legal = f"from 0 to {end - 1}" if end else f"none, as the tensor that {name} index is empty"
        raise ValueError(f"{name}{list(place)} is {int(numbers[place])}; legal: {legal}")


def _check_bounds(name: str, bounds: Tensor, rows: int) -> None:
    """Raise ValueError unless bounds ascend from 0 to at most the number of rows."""
    seen: Sequence[int] = bounds.tolist()
    if not ascend([*seen], rows):
        raise ValueError(f"{name} is {seen}; legal: ascending from 0 to at most {rows}, the number of rows")
