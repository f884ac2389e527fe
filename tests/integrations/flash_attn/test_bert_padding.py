"""unpad_input gathers the rows that a mask keeps, and pad_input puts them back."""

from __future__ import annotations

import pytest
import torch

from fastllama.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastllama.integrations.flash_attn.bert_padding import pad_input, unpad_input
from tests.integrations.flash_attn.libraries import Library


def test_rows_that_the_mask_keeps_follow_each_other(library: Library) -> None:
    x, mask = library.randn(3, 4, 2, 8), library.ints([0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0])
    rows, indices, cu_seqlens, longest, seqused = library.functions.bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert indices.tolist() == [1, 2, 3, 4, 5]
    assert indices.dtype == torch.int64
    assert torch.equal(cu_seqlens, library.ints(0, 3, 5, 5))
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert longest == 3
    assert isinstance(longest, int)
    assert seqused.tolist() == [3, 2, 0]
    padded = library.functions.bert_padding.pad_input(rows, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])


def test_unused_rows_are_kept_and_not_counted_as_used(library: Library) -> None:
    x, mask, unused = library.randn(2, 3, 8), library.ints([1, 1, 0], [1, 0, 0]), library.ints([0, 0, 1], [0, 1, 0])
    rows, indices, cu_seqlens, longest, seqused = library.functions.bert_padding.unpad_input(x, mask, unused)
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert indices.tolist() == [0, 1, 2, 3, 4]
    assert cu_seqlens.tolist() == [0, 3, 5]
    assert (longest, seqused.tolist()) == (3, [2, 1])


def test_gradients_flow_back_to_the_rows_they_came_from() -> None:
    x, mask = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[True, True, False], [False, True, True]])
    rows, indices, *_ = unpad_input(x, mask)
    pad_input(rows * 2, indices, 2, 3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2.0 * mask[..., None].expand(2, 3, 4))


def test_a_mask_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 4\]; legal: \[2, 3\]"):
        unpad_input(torch.randn(2, 3, 8), torch.ones(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"indices has shape \[4\]; legal: \[3\]"):
        pad_input(torch.randn(3, 8), torch.arange(4), 2, 3)


def test_a_padded_batch_attends_as_each_sequence_alone() -> None:
    q, mask = torch.randn(2, 5, 4, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows, indices, bounds, longest, _ = unpad_input(q, mask)
    out = pad_input(
        flash_attn_varlen_func(rows, rows, rows, bounds, bounds, longest, longest, causal=True), indices, 2, 5
    )
    for b, length in enumerate((3, 5)):
        alone = q[b : b + 1, :length]
        torch.testing.assert_close(out[b, :length], flash_attn_func(alone, alone, alone, causal=True)[0])


def test_a_batch_of_nothing_has_no_rows() -> None:
    rows, indices, cu_seqlens, longest, seqused = unpad_input(torch.ones(0, 6, 8), torch.ones(0, 6, dtype=torch.int32))
    assert rows.shape == (0, 8)
    assert (indices.tolist(), cu_seqlens.tolist(), longest, seqused.tolist()) == ([], [0], 0, [])
    assert pad_input(rows, indices, 0, 6).shape == (0, 6, 8)


def test_indices_may_be_32_bits_wide() -> None:
    rows, indices = torch.randn(3, 4), torch.tensor([0, 2, 5])
    assert torch.equal(pad_input(rows, indices.int(), 2, 3), pad_input(rows, indices, 2, 3))


def test_a_mask_has_sequences_and_tokens() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[5\]; legal: \[B, S\]"):
        unpad_input(torch.ones(5), torch.ones(5, dtype=torch.int32))
