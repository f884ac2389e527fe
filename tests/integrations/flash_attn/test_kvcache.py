"""flash_attn_with_kvcache appends, rotates, masks and reads keys as flash-attn does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flash_attn import flash_attn_with_kvcache
from tests.integrations.flash_attn.explicit import assert_near, attention, rotated
from tests.integrations.flash_attn.libraries import Library


def angles(library: Library, most: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    turns = torch.outer(torch.arange(most), 1 / 100 ** (torch.arange(dim // 2) / (dim // 2)))
    return turns.cos().to(library.device, library.dtype), turns.sin().to(library.device, library.dtype)


@pytest.mark.parametrize("len_q", [1, 3, 70], ids=["one", "few", "many"])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_see_the_tokens_that_their_row_of_the_cache_holds(library: Library, len_q: int, causal: bool) -> None:
    q, k, v = library.randn(2, len_q, 4, 32), library.randn(3, 80, 2, 32), library.randn(3, 80, 2, 32)
    out, lse = library.functions.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=library.ints(75, 71), causal=causal, return_softmax_lse=True
    )
    assert lse.shape == (2, 4, len_q)
    for b, length in enumerate((75, 71)):
        expected, expected_lse = attention(q[b], k[b, :length], v[b, :length], causal)
        assert_near(out[b], expected, q.dtype, 3.0)
        assert_near(lse[b], expected_lse, q.dtype, 6.0)


def test_without_lengths_the_whole_cache_is_seen_and_a_number_is_one_for_all(library: Library) -> None:
    q, k = library.randn(2, 1, 4, 16), library.randn(2, 6, 2, 16)
    for given, length in ((None, 6), (4, 4)):
        out = library.functions.flash_attn_with_kvcache(q, k, k, cache_seqlens=given)
        for b in range(2):
            assert_near(out[b], attention(q[b], k[b, :length], k[b, :length], causal=False)[0], q.dtype, 3.0)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_new_tokens_are_rotated_and_appended_before_attention(
    library: Library, causal: bool, interleaved: bool
) -> None:
    lens, rows = library.ints(3, 0, 7), library.ints(4, 0, 2)
    cos, sin = angles(library, 20)
    cache = library.randn(5, 12, 2, 32), library.randn(5, 12, 2, 32)
    expected_cache = cache[0].clone(), cache[1].clone()
    q, k, v = library.randn(3, 2, 4, 32), library.randn(3, 2, 2, 32), library.randn(3, 2, 2, 32)
    out = library.functions.flash_attn_with_kvcache(
        q, *cache, k, v, cos, sin, lens, rows, causal=causal, rotary_interleaved=interleaved
    )
    for b, (length, row) in enumerate(zip(lens.tolist(), rows.tolist(), strict=True)):
        positions = torch.arange(2, device=library.device) + length
        expected_cache[0][row, length : length + 2] = rotated(k[b], cos, sin, positions, interleaved)
        expected_cache[1][row, length : length + 2] = v[b]
        of_queries = positions if causal else positions[:1].expand(2)
        turned = rotated(q[b], cos, sin, of_queries, interleaved)
        seen = [x[row, : length + 2] for x in expected_cache]
        assert_near(out[b], attention(turned, *seen, causal)[0], q.dtype, 3.0)
    assert_near(cache[0], expected_cache[0], q.dtype, 4.0)
    assert torch.equal(cache[1], expected_cache[1])


def test_new_tokens_are_appended_to_pages(library: Library) -> None:
    page, table = library.page_size, library.ints([3, 0], [1, 2])
    lens = [page - 1, 2]  # the first sequence goes on in its second page
    cache = library.randn(4, page, 2, 16), library.randn(4, page, 2, 16)
    flat = [x.clone() for x in cache]
    q, k, v = library.randn(2, 3, 4, 16), library.randn(2, 3, 2, 16), library.randn(2, 3, 2, 16)
    out = library.functions.flash_attn_with_kvcache(
        q, *cache, k, v, cache_seqlens=library.ints(*lens), block_table=table, causal=True
    )
    for b, length in enumerate(lens):
        for i in range(3):
            at = int(table[b, (length + i) // page]), (length + i) % page
            flat[0][at], flat[1][at] = k[b, i], v[b, i]
        seen = [x[table[b].long()].flatten(0, 1)[: length + 3] for x in flat]
        assert_near(out[b], attention(q[b], *seen, causal=True)[0], q.dtype, 3.0)
    assert torch.equal(cache[0], flat[0])
    assert torch.equal(cache[1], flat[1])


def test_a_left_padding_hides_tokens_and_leaves_positions_as_they_are(library: Library) -> None:
    """Angles are taken at the position in the cache, as in flash-attn's csrc/flash_attn/src/block_info.h."""
    lens, hidden = library.ints(5, 3), library.ints(2, 3)
    cos, sin = angles(library, 12)
    cache = library.randn(2, 12, 2, 32), library.randn(2, 12, 2, 32)
    q, k, v = library.randn(2, 1, 4, 32), library.randn(2, 1, 2, 32), library.randn(2, 1, 2, 32)
    out = library.functions.flash_attn_with_kvcache(
        q, *cache, k, v, cos, sin, cache_seqlens=lens, cache_leftpad=hidden, causal=True
    )
    for b, (length, first) in enumerate(zip(lens.tolist(), hidden.tolist(), strict=True)):
        turned = rotated(q[b], cos, sin, torch.tensor([length], device=library.device), interleaved=True)
        seen = [x[b, first : length + 1] for x in cache]
        assert_near(out[b], attention(turned, *seen, causal=True)[0], q.dtype, 3.0)


def test_packed_queries_and_new_keys_have_bounds_of_their_own() -> None:
    """FlashAttention 3's cu_seqlens_q and cu_seqlens_k_new; rows past the last bound give 0 and are not written."""
    bounds_q, bounds_k, start = torch.tensor([0, 2, 5]), torch.tensor([0, 1, 3]), torch.tensor([9, 4])
    cache = torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    expected = cache[0].clone(), cache[1].clone()
    cos, sin = angles(Library(pytest, "cpu", torch.float32, 1), 16, 8)
    q, k, v = torch.randn(6, 4, 16), torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    out, lse = flash_attn_with_kvcache(
        q,
        *cache,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=torch.tensor([3, 5]),
        cu_seqlens_q=bounds_q,
        cu_seqlens_k_new=bounds_k,
        rotary_seqlens=start,
        causal=True,
        return_lse=True,
    )
    assert lse.shape == (4, 6)
    assert not out[5].any()
    for b, length in enumerate((3, 5)):
        new, rows = slice(bounds_k[b], bounds_k[b + 1]), slice(bounds_q[b], bounds_q[b + 1])
        count = int(bounds_k[b + 1] - bounds_k[b])
        at = torch.arange(3) + start[b]
        expected[0][b, length : length + count] = rotated(k[new], cos, sin, at[:count], interleaved=True)
        expected[1][b, length : length + count] = v[new]
        turned = rotated(q[rows], cos, sin, at[: rows.stop - rows.start], interleaved=True)
        seen = [x[b, : length + count] for x in expected]
        assert_near(out[rows], attention(turned, *seen, causal=True)[0], q.dtype, 3.0)
    assert_near(cache[0], expected[0], q.dtype, 4.0)
    assert torch.equal(cache[1], expected[1])


@pytest.mark.parametrize("paged", [False, True])
def test_what_has_no_room_is_not_written_to_others_rows_and_its_sequence_is_nan(paged: bool) -> None:
    cache = torch.randn(3, 4, 2, 16), torch.randn(3, 4, 2, 16)
    before = cache[0].clone(), cache[1].clone()
    q, k = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 16)
    table = torch.tensor([[0], [2]]) if paged else None
    rows = None if paged else torch.tensor([0, 2])
    lens = torch.tensor([3, 1])
    out = flash_attn_with_kvcache(q, *cache, k, k, cache_seqlens=lens, cache_batch_idx=rows, page_table=table)
    assert out[0].isnan().all(), "four tokens of room for five"
    assert_near(out[1], attention(q[1], cache[0][2, :3], cache[1][2, :3], causal=False)[0], q.dtype, 3.0)
    for found, held in zip(cache, before, strict=True):
        assert torch.equal(found[1], held[1])
        assert torch.equal(found[0, 3], k[0, 0])
        assert torch.equal(found[0, :3], held[0, :3])


@pytest.mark.parametrize("layout", ["sliced", "by head", "one row"])
def test_a_left_padding_takes_caches_of_any_strides(layout: str) -> None:
    rows = 1 if layout == "one row" else 3
    k, v = torch.randn(2, rows, 9, 2, 16)
    if layout == "sliced":
        k, v = torch.randn(2, 5, 12, 2, 16)[:, 1:4, 2:11]
    elif layout == "one row":  # of which no other begins anywhere
        k, v = (x.as_strided(x.shape, (7, *x.stride()[1:])) for x in (k, v))
    else:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q, hidden = torch.randn(rows, 2, 4, 16), torch.arange(rows) + 1
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=8, cache_leftpad=hidden)
    for b in range(rows):
        assert_near(out[b], attention(q[b], k[b, b + 1 : 8], v[b, b + 1 : 8], causal=False)[0], q.dtype, 3.0)


def test_a_left_padding_of_all_tokens_leaves_no_key() -> None:
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 6, 2, 16)
    out, lse = flash_attn_with_kvcache(q, k, k, cache_seqlens=3, cache_leftpad=torch.tensor([5]), return_lse=True)
    assert not out.any()
    assert (lse == math.inf).all()
