"""Other spellings in FlashAttention 3 and older stacks: queries packed beside fewer keys, rows by their indices."""

from __future__ import annotations

import pytest
import torch

from fastllama.integrations.flash_attn import bert_padding, flash_attn_func, flash_attn_qkvpacked_func
from tests.integrations.signatures.calls import numbers


def test_queries_may_be_packed_beside_fewer_keys_and_values() -> None:
    qkv = numbers(2, 3, 8, 16)
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    packed = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    torch.testing.assert_close(packed, flash_attn_func(q, k, v, causal=True), rtol=0, atol=0)


def test_of_three_packed_tensors_the_number_of_heads_is_not_used() -> None:
    qkv = numbers(2, 3, 3, 4, 16)
    torch.testing.assert_close(flash_attn_qkvpacked_func(qkv, num_heads_q=4), flash_attn_qkvpacked_func(qkv))


@pytest.mark.parametrize("heads", [0, 3, 8, 9])
def test_heads_that_leave_no_keys_for_values_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_heads_q is {heads}; legal: a number that leaves .* qkv's 8$"):
        flash_attn_qkvpacked_func(numbers(2, 3, 8, 16), num_heads_q=heads)


def test_rows_are_taken_by_index() -> None:
    rows, indices = numbers(5, 2, 16), torch.tensor([4, 0, 0], dtype=torch.int64)
    assert torch.equal(bert_padding.index_first_axis(rows, indices), rows[[4, 0, 0]])
