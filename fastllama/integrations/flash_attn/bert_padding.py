"""Converts padded batches to packed sequences, and back. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.integrations.flash_attn.conventions import check_tensors


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the rows of a padded batch that its masks select.

    hidden_states: [B, S, ...]. attention_mask: [B, S] bool or integers, 1 for tokens. unused_mask: [B, S], 1 for rows
    that are kept but unused.
    Returns (rows [total, ...], indices [total] int64 into the flattened batch, cu_seqlens [B + 1] int32, the longest
    sequence as an int, seqused [B] int32: tokens of attention_mask alone). The number of rows and the longest sequence
    are read from the device, unlike in the other functions here.
    Raises ValueError for a shape. Source: flash-attn 2.8.3, `bert_padding.py`.
    """
    check_tensors({"hidden_states": hidden_states, "attention_mask": attention_mask}, unused_mask=unused_mask)
    check_shape("attention_mask", attention_mask, ("B", "S"))
    check_shape("attention_mask", attention_mask, hidden_states.shape[:2])
    kept = attention_mask
    if unused_mask is not None:
        check_shape("unused_mask", unused_mask, attention_mask.shape)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    rows = hidden_states.flatten(0, 1).index_select(0, indices)
    return rows, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def index_first_axis(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Rows of hidden_states [total, ...] at indices [n] int32 or int64, as `unpad_input` returns them."""
    return hidden_states.index_select(0, indices)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Rows back into a padded batch: [total, ...] to [batch, seqlen, ...], zeros where there was padding.

    indices: [total] int32 or int64, as `unpad_input` returns them.
    """
    check_tensors({"hidden_states": hidden_states, "indices": indices})
    check_shape("indices", indices, hidden_states.shape[:1])
    shape = (batch * seqlen, *hidden_states.shape[1:])
    padded = torch.zeros(shape, dtype=hidden_states.dtype, device=hidden_states.device)
    return padded.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))
