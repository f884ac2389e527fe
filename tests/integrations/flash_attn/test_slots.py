"""Pages and lengths out of range are never followed by flash_attn_with_kvcache, and tensors of any strides are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from tests.integrations.flash_attn.explicit import assert_near, attention

WRAPPING = 2**56  # times a page of 256 tokens is 2**64, which int64 takes for 0


def strided(x: Tensor) -> Tensor:
    """The same numbers, every other one of twice as many along the last dimension."""
    return torch.stack((x, torch.full_like(x, -7)), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("hidden", [None, 1])
@pytest.mark.parametrize("by", ["block_table", "cache_batch_idx"])
@pytest.mark.parametrize("page", [-1, 4, WRAPPING, WRAPPING + 1, -WRAPPING])
def test_a_page_outside_of_the_cache_is_not_written_and_gives_nan(page: int, by: str, hidden: int | None) -> None:
    cache = torch.randn(2, 4, 256, 1, 8).unbind()
    before = [x.clone() for x in cache]
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 1, 8)
    table = torch.tensor([page])
    given = {by: table[:, None] if by == "block_table" else table}
    pad = None if hidden is None else torch.tensor([hidden])
    out = flash_attn_with_kvcache(q, *cache, k, k, cache_seqlens=torch.tensor([3]), cache_leftpad=pad, **given)
    assert out.isnan().all()
    assert all(torch.equal(x, held) for x, held in zip(cache, before, strict=True))


@pytest.mark.parametrize("hidden", [None, 0, 1])
@pytest.mark.parametrize("length", [-1, -2, -(2**31), -(2**62)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_negative_length_writes_nothing_and_gives_nan(count: int, length: int, hidden: int | None) -> None:
    cache = torch.randn(2, 2, 6, 1, 8).unbind()
    before = [x.clone() for x in cache]
    q, k = torch.randn(2, 2, 2, 8), torch.randn(2, count, 1, 8)
    lens = torch.tensor([length, 1], dtype=torch.int64 if length < -(2**31) else torch.int32)
    pad = None if hidden is None else torch.tensor([hidden, 0])
    out = flash_attn_with_kvcache(q, *cache, k, k, cache_seqlens=lens, cache_leftpad=pad)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    for x, held in zip(cache, before, strict=True):
        assert torch.equal(x[0], held[0])
        assert torch.equal(x[1, 1 : 1 + count], k[1])


@pytest.mark.parametrize("hidden", [None, 1])
def test_a_table_without_pages_has_no_room(hidden: int | None) -> None:
    cache = torch.randn(2, 2, 6, 1, 8).unbind()
    before = [x.clone() for x in cache]
    table, pad = torch.zeros(1, 0, dtype=torch.int32), None if hidden is None else torch.tensor([hidden])
    k = torch.randn(1, 2, 1, 8)
    q = torch.randn(1, 1, 2, 8)
    out = flash_attn_with_kvcache(q, *cache, k, k, cache_seqlens=0, block_table=table, cache_leftpad=pad)
    assert out.isnan().all()
    assert all(torch.equal(x, held) for x, held in zip(cache, before, strict=True))


@pytest.mark.parametrize("appended", [False, True])
def test_lengths_and_tables_may_have_any_strides(appended: bool) -> None:
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16)
    new = (k, k) if appended else ()
    found, expected = (
        flash_attn_with_kvcache(
            q,
            torch.arange(6 * 4 * 32.0).view(6, 4, 2, 16) % 7,
            torch.arange(6 * 4 * 32.0).view(6, 4, 2, 16) % 5,
            *new,
            cache_seqlens=lay(torch.tensor([5, 9], dtype=torch.int32)),
            block_table=lay(torch.tensor([[4, 1, 0], [2, 3, 5]], dtype=torch.int32)),
        )
        for lay in (strided, torch.clone)
    )
    assert torch.equal(found, expected)


def test_bounds_and_numbers_of_used_keys_may_have_any_strides() -> None:
    q, k = torch.randn(5, 4, 16), torch.randn(3, 4, 2, 16)
    bounds, used, table = torch.tensor([0, 2, 5]), torch.tensor([3, 4]), torch.tensor([[2], [0]])
    found, expected = (
        flash_attn_varlen_func(
            q, k, k, lay(bounds), seqused_q=lay(torch.tensor([1, 3])), seqused_k=lay(used), block_table=lay(table)
        )
        for lay in (strided, torch.clone)
    )
    assert torch.equal(found, expected)
    packed = k.flatten(0, 1)
    found, expected = (
        flash_attn_varlen_func(q, packed, packed, lay(bounds), lay(torch.tensor([0, 4, 9])), seqused_k=lay(used))
        for lay in (strided, torch.clone)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("which", ["seqused_q", "seqused_k"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("count", [2**32 + 1, 2**40, -1, -(2**32) + 1])
def test_used_numbers_past_32_bits_give_nan(count: int, which: str, paged: bool) -> None:
    """The bounds are int32, in which 2^32 + 1 would be 1."""
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    keys = {"k": k, "v": k, "cu_seqlens_k": bounds}
    if paged:
        pages = torch.randn(2, 4, 2, 16)
        keys = {"k": pages, "v": pages, "cu_seqlens_k": bounds, "block_table": torch.tensor([[1], [0]])}
    out = flash_attn_varlen_func(q, cu_seqlens_q=bounds, **keys, **{which: torch.tensor([count, 2])})
    assert out[:1].isnan().all()


def test_the_last_keys_of_sequences_may_be_unused_without_pages() -> None:
    q, k, v = torch.randn(4, 4, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
    bounds, used = torch.tensor([0, 1, 4]), torch.tensor([1, 2])
    out = flash_attn_varlen_func(q, k, v, bounds, torch.tensor([0, 2, 6]), seqused_k=used)
    for rows, keys in ((slice(0, 1), slice(0, 1)), (slice(1, 4), slice(2, 4))):
        assert_near(out[rows], attention(q[rows], k[keys], v[keys], causal=False)[0], q.dtype, 3.0)
