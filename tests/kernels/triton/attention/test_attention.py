"""What only the Triton attention kernels have: splits of the keys, blocks of queries, tiles that cross pages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.launch import tuning
from fastllama.kernels.triton.attention import flash
from fastllama.kernels.triton.attention.decode import workspace_size
from tests.kernels.honest import assert_equal, public
from tests.kernels.ops.test_attention import HEADS, Packed, assert_both_honest, bounds, packed, paged

pytestmark = pytest.mark.interpreter

BF16, FP32 = torch.bfloat16, torch.float32
SPLIT = tuning.decode(torch.device("cpu"), queries=1, head_dim=16, itemsize=4).split


def varlen(*args: Any, **options: Any) -> Any:
    return public("attention_varlen", "triton")(*args, **options)


def prefill(*args: Any, **options: Any) -> Any:
    return public("attention_prefill", "triton")(*args, **options)


def decode(*args: Any, **options: Any) -> Any:
    return public("attention_decode", "triton")(*args, **options)


def tables(batch: Packed, page_size: int) -> tuple[Tensor, ...]:
    cache = paged(batch, page_size)
    return cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens


@pytest.mark.parametrize(("queries", "heads", "dtype"), [(1, "GQA 8", BF16), (3, "MHA", FP32)])
def test_splits_around_their_edges(queries: int, heads: str, dtype: torch.dtype) -> None:
    """Lengths of one split, of two, either side, and none; the last queries may lie in different splits."""
    lengths = [SPLIT - 1, SPLIT, SPLIT + 1, SPLIT + 2, 2 * SPLIT + 77, 3, 0]
    batch = packed([queries] * len(lengths), lengths, heads, dtype)
    args = (batch.q, *tables(batch, 64))
    out, lse = decode(*args, return_lse=True)
    assert_both_honest((out, lse), batch)
    assert_equal(decode(*args), out)


@pytest.mark.parametrize("causal", [True, False])
def test_splits_of_scaled_pages_and_log_sum_exps_in_any_strides(causal: bool) -> None:
    """The scale of values multiplies the reduced splits, once; without a mask draft tokens see those after them."""
    batch = packed([2] * 3, [SPLIT + 1, 2 * SPLIT, 3], "MHA")
    scaled = Packed(batch.q, batch.k * 0.5, batch.v * 4.0, batch.queries, batch.lengths)
    buffer = torch.full((3, 7), 7.0)
    lse_out = buffer[:, :6].t()
    out, _ = decode(batch.q, *tables(batch, 64), causal=causal, k_scale=0.5, v_scale=4.0, lse_out=lse_out)
    assert_both_honest((out, lse_out), scaled, causal)
    assert (buffer[:, 6] == 7.0).all()


def test_a_split_sequence_does_not_depend_on_the_others() -> None:
    """Nor on the width of the page table, nor on which pages it got: bit for bit."""
    lengths = [9, 2 * SPLIT + 5, SPLIT]
    batch = packed([1] * 3, lengths, "GQA 8", BF16)
    together = decode(batch.q, *tables(batch, 64))
    k, v = batch.k[9 : 9 + lengths[1]], batch.v[9 : 9 + lengths[1]]
    alone = Packed(batch.q[1:2], k, v, [1], lengths[1:2])
    assert_equal(decode(alone.q, *tables(alone, 64)), together[1:2])
    *pages, table, seq_lens = tables(alone, 64)
    wide = torch.nn.functional.pad(table, (0, 40))
    assert_equal(decode(alone.q, *pages, wide, seq_lens), together[1:2])


@pytest.mark.parametrize("chunk", [7, 33])
def test_a_prompt_in_chunks_is_the_prompt_in_one(chunk: int) -> None:
    """Bit for bit, wherever blocks of queries begin."""
    length = 70
    batch = packed([length], [length], "GQA 4", BF16)
    *pages, table, _ = tables(batch, 16)
    whole = prefill(batch.q, *pages, table, torch.tensor([length], dtype=torch.int32), bounds([length]))
    parts = []
    for start in range(0, length, chunk):
        q = batch.q[start : start + chunk]
        seen = torch.tensor([start + q.shape[0]], dtype=torch.int32)
        parts.append(prefill(q, *pages, table, seen, bounds([q.shape[0]])))
    assert_equal(torch.cat(parts), whole)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_are_keys_in_a_row(page_size: int) -> None:
    """Paged and contiguous keys give the same numbers, bit for bit."""
    batch = packed([5, 40], [90, 40], "GQA 4", BF16)
    cu = (bounds(batch.queries), bounds(batch.lengths))
    assert_equal(prefill(batch.q, *tables(batch, page_size), cu[0]), varlen(batch.q, batch.k, batch.v, *cu))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_head_dimensions_of_models(head_dim: int) -> None:
    batch = packed([2, 1], [40, 19], "GQA 4", BF16, head_dim)
    assert_both_honest(prefill(batch.q, *tables(batch, 16), bounds(batch.queries), return_lse=True), batch)
    batch = packed([1, 1], [40, 19], "GQA 4", BF16, head_dim)
    assert_both_honest(decode(batch.q, *tables(batch, 16), return_lse=True), batch)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=5),
    st.sampled_from(list(HEADS)),
    st.integers(1, 33),
    st.booleans(),
)
def test_any_batch(sizes: list[tuple[int, int]], heads: str, page_size: int, causal: bool) -> None:
    """Queries and cached tokens before them, in any number, in pages of any size."""
    queries, lengths = [new for new, _ in sizes], [new + old for new, old in sizes]
    batch = packed(queries, lengths, heads)
    cu = (bounds(queries), bounds(lengths))
    found = varlen(batch.q, batch.k, batch.v, *cu, causal=causal, return_lse=True)
    assert_both_honest(found, batch, causal)
    found = prefill(batch.q, *tables(batch, page_size), cu[0], causal=causal, return_lse=True)
    assert_both_honest(found, batch, causal)


def test_scale_is_not_taken_twice() -> None:
    """A scale of 0 makes every weight equal."""
    batch = packed([1], [37], "MHA")
    out, lse = decode(batch.q, *tables(batch, 16), scale=0.0, return_lse=True)
    torch.testing.assert_close(out[0], batch.v.mean(0))
    torch.testing.assert_close(lse, torch.full((1, 3), math.log(37)))


def test_a_workspace_holds_anything_before() -> None:
    """Also the splits of a larger call."""
    batch = packed([2] * 3, [2 * SPLIT + 5, 9, SPLIT + 1], "GQA 4", BF16)
    args = (batch.q, *tables(batch, 64))
    expected = decode(*args, return_lse=True)
    size = workspace_size(args[0], args[1], args[3])
    assert size == 6 * 8 * 3 * 17  # queries, heads, splits (the table is a page wider than it need be), numbers of each
    for filling in (math.nan, 1e30):
        workspace = torch.full((size,), filling)
        for found, value in zip(decode(*args, return_lse=True, workspace=workspace), expected, strict=True):
            assert_equal(found, value)


def test_with_a_workspace_nothing_else_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = packed([1], [SPLIT + 1], "GQA 4")
    args = (batch.q, *tables(batch, 64))
    out, workspace = torch.empty_like(batch.q), torch.empty(workspace_size(args[0], args[1], args[3]))
    expected = decode(*args)
    monkeypatch.setattr(torch, "empty", None)
    assert_equal(decode(*args, out=out, workspace=workspace), expected)


def test_a_workspace_that_is_too_small_is_refused_before_anything_is_written() -> None:
    batch = packed([1], [SPLIT + 1], "GQA 4")
    args, out = (batch.q, *tables(batch, 64)), torch.full_like(batch.q, 7.0)
    size = workspace_size(args[0], args[1], args[3])
    message = f"^workspace has {size - 1} elements; legal for these tensors: at least {size}$"
    with pytest.raises(ValueError, match=message):
        decode(*args, out=out, workspace=torch.empty(size - 1))
    assert (out == 7.0).all()


def test_the_public_function_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the kernel needs, and none without a kernel."""
    batch = packed([1], [SPLIT + 1], "GQA 4")
    q, k_pages, _, table, _ = (batch.q, *tables(batch, 64))
    assert kernels.attention_workspace(q, k_pages, table).numel() == 0
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    made = kernels.attention_workspace(q, k_pages, table)
    assert (made.numel(), made.dtype) == (workspace_size(q, k_pages, table), torch.float32)
    assert kernels.attention_workspace(q, k_pages, table[:, : SPLIT // 64]).numel() == 0  # one split, written to out


def test_e4m3_as_newer_gpus_convert_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-identical to conversion by shifts, and NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()].view(1, 1, 1, -1)
    scales, one = torch.full((1, 1, 1), 0.37), torch.ones(1, dtype=torch.int32)
    rest = {"page_table": torch.zeros(1, 1, dtype=torch.int32), "seq_lens": one, "k_scales": scales, "v_scales": scales}
    for dtype in (torch.float32, torch.float16, BF16):
        q = torch.zeros(1, 1, codes.shape[-1], dtype=dtype)
        monkeypatch.setattr(flash, "_converts_e4m3", lambda arch: False)
        shifted = decode(q, codes, codes, **rest)
        monkeypatch.setattr(flash, "_converts_e4m3", lambda arch: True)
        assert_equal(decode(q, codes, codes, **rest), shifted)
    broken = codes.clone()
    broken[..., 3] = math.nan
    assert decode(q, codes, broken, **rest)[0, 0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("arch", "able"),
    [
        ("sm_80", False),
        ("sm_86", False),
        ("sm_89", True),
        ("sm_90", True),
        ("sm_120", True),
        ("gfx942", False),
        ("cpu", False),
    ],
)
def test_which_gpus_convert_e4m3(arch: str, able: bool) -> None:
    assert flash._converts_e4m3(arch) == able
