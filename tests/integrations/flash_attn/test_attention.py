"""flash_attn_func, flash_attn_varlen_func and the packed forms have flash-attn's shapes, masks and log-sum-exps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastllama.integrations import flash_attn
from fastllama.integrations.flash_attn.conventions import as_rows
from tests.integrations.flash_attn.explicit import assert_near, attention
from tests.integrations.flash_attn.libraries import Library


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("len_q", "len_k"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_sequences_of_one_length_attend_each_to_its_own(library: Library, len_q: int, len_k: int, causal: bool) -> None:
    q, k, v = library.randn(2, len_q, 4, 16), library.randn(2, len_k, 2, 16), library.randn(2, len_k, 2, 16)
    out, lse, probabilities = library.functions.flash_attn_func(q, k, v, 0.0, None, causal, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, len_q)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert not probabilities.numel(), "without dropout flash-attn returns none"
    for b in range(2):
        expected, expected_lse = attention(q[b], k[b], v[b], causal)
        assert_near(out[b], expected, q.dtype, 3.0)
        assert_near(lse[b], expected_lse, q.dtype, 4.0)


def test_rows_without_keys_are_zero_and_their_log_sum_exp_infinite(library: Library) -> None:
    q, k = library.randn(1, 3, 2, 16), library.randn(1, 1, 2, 16)
    out, lse, _ = library.functions.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert not out[:, :2].any()
    assert (lse[..., :2] == math.inf).all(), "FlashAttention 2's mark, where our ops and FlashAttention 3 return -inf"
    assert lse[..., 2].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(library: Library, causal: bool) -> None:
    bounds_q, bounds_k = library.ints(0, 3, 4, 9), library.ints(0, 5, 7, 12)
    q, k, v = library.randn(9, 4, 16), library.randn(12, 2, 16), library.randn(12, 2, 16)
    out, lse, _ = library.functions.flash_attn_varlen_func(
        q, k, v, bounds_q, bounds_k, 5, 5, causal=causal, return_attn_probs=True
    )
    assert lse.shape == (4, 9)
    for (start, end), (first, last) in zip(pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()), strict=True):
        expected, expected_lse = attention(q[start:end], k[first:last], v[first:last], causal)
        assert_near(out[start:end], expected, q.dtype, 3.0)
        assert_near(lse[:, start:end], expected_lse, q.dtype, 4.0)


def test_packed_queries_read_a_cached_prefix_through_a_block_table(library: Library) -> None:
    page, table = library.page_size, library.ints([3, 0], [1, 0])
    pages = library.randn(4, page, 2, 16), library.randn(4, page, 2, 16)
    lengths, bounds = [page + 3, page - 2], library.ints(0, 4, 6)
    q = library.randn(6, 4, 16)
    cu_seqlens_k = library.ints(0, lengths[0], sum(lengths))
    out = library.functions.flash_attn_varlen_func(
        q, *pages, bounds, cu_seqlens_k, 4, max(lengths), causal=True, block_table=table
    )
    for b, (start, end) in enumerate(pairwise(bounds.tolist())):
        k, v = (x[table[b].long()].flatten(0, 1)[: lengths[b]] for x in pages)
        assert_near(out[start:end], attention(q[start:end], k, v, causal=True)[0], q.dtype, 3.0)


def test_the_scale_replaces_that_of_the_head_dimension(library: Library) -> None:
    q, k = library.randn(1, 4, 2, 16), library.randn(1, 4, 2, 16)
    out = library.functions.flash_attn_func(q, k, k, softmax_scale=0.03)
    assert_near(out[0], attention(q[0], k[0], k[0], causal=False, scale=0.03)[0], q.dtype, 3.0)


def test_one_tensor_of_queries_keys_and_values_gives_what_three_give(library: Library) -> None:
    functions, qkv, bounds = library.functions, library.randn(2, 5, 3, 4, 16), library.ints(0, 5, 10)
    q, k, v = qkv.unbind(2)
    expected = functions.flash_attn_func(q, k, v, causal=True)
    packed, kv = qkv.flatten(0, 1), qkv[:, :, 1:]
    for found in (
        functions.flash_attn_qkvpacked_func(qkv, causal=True),
        functions.flash_attn_kvpacked_func(q, kv, causal=True),
        functions.flash_attn_varlen_qkvpacked_func(packed, bounds, 5, causal=True).view_as(expected),
        functions.flash_attn_varlen_kvpacked_func(
            q.flatten(0, 1), kv.flatten(0, 1), bounds, bounds, 5, 5, causal=True
        ).view_as(expected),
    ):
        assert torch.equal(found, expected)


def test_unused_queries_and_keys_are_as_if_they_were_not_there() -> None:
    """FlashAttention 3's seqused: the first rows of each sequence; the rows after them may be anything, NaN too."""
    bounds_q, bounds_k = torch.tensor([0, 3, 4, 9]), torch.tensor([0, 5, 7, 12])
    used_q, used_k = torch.tensor([2, 1, 3]), torch.tensor([4, 0, 5])
    q, k, v = torch.randn(9, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    k[4:7] = v[4:7] = math.nan
    out, lse = flash_attn.flash_attn_varlen_func(
        q, k, v, bounds_q, bounds_k, 5, 5, causal=True, seqused_q=used_q, seqused_k=used_k, return_softmax_lse=True
    )
    for b in range(3):
        start, first = int(bounds_q[b]), int(bounds_k[b])
        rows, keys = slice(start, start + int(used_q[b])), slice(first, first + int(used_k[b]))
        expected, expected_lse = attention(q[rows], k[keys], v[keys], causal=True)
        assert_near(out[rows], expected, q.dtype, 3.0)
        assert_near(lse[:, rows], expected_lse, q.dtype, 4.0)
        assert not out[rows.stop : bounds_q[b + 1]].any()


def test_head_major_keys_are_read_as_token_major_ones_are() -> None:
    """Layouts of transformers' caches, [B, H, S, D]; with a last dimension that is not contiguous, too."""
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16)
    expected = flash_attn.flash_attn_func(q, k, v)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_dim = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(flash_attn.flash_attn_func(*by_head), expected)
    assert torch.equal(flash_attn.flash_attn_func(*by_dim), expected)


def test_the_distance_between_heads_does_not_grow_with_the_sequence() -> None:
    """The stride is a constant of the Triton kernels, compiled anew for each token of a head-major cache otherwise."""
    for length in (5, 6):
        by_head = torch.randn(1, 2, length, 16).transpose(1, 2)
        rows = as_rows(by_head)
        assert rows.stride() == (32, 16, 1)
        assert torch.equal(rows, by_head[0])
    fused = torch.randn(2, 3, 8, 16)[:, :, 2:4]
    assert as_rows(fused).data_ptr() == fused.data_ptr(), "slices of a wider tensor are read where they lie"


def test_the_result_is_written_where_it_is_asked_for() -> None:
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    expected, out = flash_attn.flash_attn_func(q, k, k), torch.full((2, 3, 8, 16), 7.0)
    assert flash_attn.flash_attn_func(q, k, k, out=out[:, :, 4:]).data_ptr() == out[:, :, 4:].data_ptr()
    assert torch.equal(out[:, :, 4:], expected)
    assert (out[:, :, :4] == 7.0).all()
    with pytest.raises(ValueError, match=r"out has strides .*; legal: all tokens at one stride"):
        flash_attn.flash_attn_func(q, k, k, out=torch.empty(2, 5, 4, 16)[:, :3])


def test_hints_change_nothing() -> None:
    q, bounds = torch.randn(4, 2, 16), torch.tensor([0, 1, 4])
    expected = flash_attn.flash_attn_varlen_func(q, q, q, bounds, bounds, 3, 3)
    hints = {"deterministic": True, "num_splits": 7, "pack_gqa": True, "sm_margin": 3, "fa_version": 3}
    found = flash_attn.flash_attn_varlen_func(
        q, q, q, bounds, bounds, None, torch.tensor(-1), scheduler_metadata=torch.ones(3), **hints
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [(-1, -1), [-1, -1], (None, None), (-1, 0)])
def test_a_window_that_hides_nothing_more_is_none(window: object) -> None:
    q = torch.randn(1, 4, 2, 16)
    expected = flash_attn.flash_attn_func(q, q, q, causal=True)
    assert torch.equal(flash_attn.flash_attn_func(q, q, q, causal=True, window_size=window, softcap=None), expected)
