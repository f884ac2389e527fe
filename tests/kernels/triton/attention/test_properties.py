"""The Triton attention kernels on any batch, in any pages: within fp32's own errors, and bit for bit the same alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllama.kernels.launch import tuning
from tests.kernels.honest import DTYPES, assert_equal, public
from tests.kernels.ops.test_attention import Packed, bounds, paged

# Others have each edge; here they meet at random.
pytestmark = [pytest.mark.interpreter, pytest.mark.exhaustive]

HEAD_DIMS = [8, 16, 64, 80]
CPU = torch.device("cpu")
DECODES = [
    tuning.decode(CPU, queries=1, head_dim=dim, itemsize=dtype.itemsize) for dim in HEAD_DIMS for dtype in DTYPES
]
SIZES = [(dim, dtype.itemsize) for dim in HEAD_DIMS for dtype in DTYPES]
PREFILLS = [tuning.prefill(CPU, head_dim=dim, itemsize=size, key_itemsize=size) for dim, size in SIZES]
KEYS = {launch.keys for launch in (*DECODES, *PREFILLS)}

a_few = settings(max_examples=24, derandomize=True)
page_sizes = st.one_of(st.sampled_from([1, 16, 32, 64]), st.integers(1, 64))
orders = st.sampled_from(["HND", "NHD"])
Run = Callable[[Packed], tuple[Tensor, Tensor]]  # a batch -> out and log-sum-exp


def edges(of: set[int]) -> list[int]:
    """An edge of a tile or split, and either side of it."""
    return sorted({edge + step for edge in of for step in (-1, 0, 1)})


def around(of: set[int]) -> st.SearchStrategy[int]:
    """A length at an edge, 0, 1, or anything up to a few tiles."""
    return st.one_of(st.sampled_from([*edges(of), 0, 1]), st.integers(0, 100))


@st.composite
def batches(draw: st.DrawFn, op: str) -> Packed:
    """Two or three sequences, with keys in the order of tokens or of heads. When decoding, one of about a split."""
    count, kv_heads = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    lengths = draw(st.lists(around(KEYS), min_size=count, max_size=count))
    if op == "attention_decode":
        queries, group = [draw(st.integers(1, 8))] * count, draw(st.sampled_from([1, 2, 3, 4, 8]))
        lengths[draw(st.integers(0, count - 1))] = draw(st.sampled_from(edges({launch.split for launch in DECODES})))
    else:
        new = around({launch.rows for launch in PREFILLS})
        queries, group = draw(st.lists(new, min_size=count, max_size=count)), draw(st.sampled_from([1, 2, 3]))
    if op == "attention_prefill":
        lengths = [sum(pair) for pair in zip(queries, lengths, strict=True)]
    head_dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(DTYPES))
    torch.manual_seed(0)
    q = torch.randn(sum(queries), kv_heads * group, head_dim).to(dtype)
    k, v = (torch.randn(sum(lengths), kv_heads, head_dim).to(dtype) for _ in "kv")
    if draw(st.booleans()):
        k, v = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (k, v))
    return Packed(q, k, v, queries, lengths)


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_near(found: tuple[Tensor, Tensor], batch: Packed, causal: bool) -> None:
    """Errors are at most fp32's in any order of summation, and two roundings to the dtype: of weights and output.

    A score is off by D + 4 roundings of the largest it can be; a weight by that, twice; a sum by one for each term. No
    bound of a plain implementation's: on one short row that may be exact by luck.
    """
    out, lse = batch.exact(causal)
    head_dim, unit = batch.q.shape[2], 2.0**-24
    scores = largest(batch.q.norm(dim=-1)) * largest(batch.k.norm(dim=-1)) / math.sqrt(head_dim)
    score, terms = (head_dim + 4) * unit * scores, (max(batch.lengths) + 8) * unit
    of_out = largest(batch.v) * (2 * score + 2 * terms + torch.finfo(batch.q.dtype).eps)
    of_lse = score + terms + 4 * unit * largest(lse.nan_to_num(neginf=0.0))
    for ours, exact, bound in zip(found, (out, lse), (of_out, of_lse), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)


def check(run: Run, batch: Packed, causal: bool = True) -> None:
    """The results are near; each sequence by itself, in pages shuffled anew, gives what it gave among the others."""
    together = run(batch)
    assert_near(together, batch, causal)
    rows = [each.split(batch.queries) for each in together]
    for i, (q, k, v) in enumerate(batch.parts(batch.k, batch.v)):
        alone = run(Packed(q, k, v, batch.queries[i : i + 1], batch.lengths[i : i + 1]))
        for found, expected in zip(alone, rows, strict=True):
            assert_equal(found, expected[i])


@a_few
@given(batches("attention_decode"), page_sizes, orders)
def test_decode(batch: Packed, page_size: int, order: str) -> None:
    def run(batch: Packed) -> tuple[Tensor, Tensor]:
        cache = paged(batch, page_size, order)
        tables = (cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
        return public("attention_decode", "triton")(batch.q, *tables, return_lse=True)

    check(run, batch)


@a_few
@given(batches("attention_prefill"), page_sizes, orders)
def test_prefill(batch: Packed, page_size: int, order: str) -> None:
    def run(batch: Packed) -> tuple[Tensor, Tensor]:
        cache = paged(batch, page_size, order)
        tables = (cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens, bounds(batch.queries))
        return public("attention_prefill", "triton")(batch.q, *tables, return_lse=True)

    check(run, batch)


@a_few
@given(batches("attention_varlen"), st.booleans())
def test_varlen(batch: Packed, causal: bool) -> None:
    def run(batch: Packed) -> tuple[Tensor, Tensor]:
        cu = (bounds(batch.queries), bounds(batch.lengths))
        return public("attention_varlen", "triton")(batch.q, batch.k, batch.v, *cu, causal=causal, return_lse=True)

    check(run, batch, causal)
