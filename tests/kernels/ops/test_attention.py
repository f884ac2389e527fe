"""attention_varlen, attention_prefill and attention_decode against loops in fp64 and torch's own attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import reference
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, on_cpu, public

HEADS = {"MHA": (3, 3), "GQA 4": (8, 2), "GQA 8": (8, 1), "MQA": (5, 1)}
OPS = ("attention_varlen", "attention_prefill", "attention_decode")
everywhere = pytest.mark.parametrize(
    ("op", "backend"),
    [
        *((op, each) for op in OPS for each in on_cpu(op)),
        *(pytest.param(op, "triton", marks=pytest.mark.interpreter) for op in OPS),
    ],
)
# HND: a page of one head is contiguous, as our cache has it. NHD: a token is, as drop-in callers have it.
PAGES = [(5, "HND"), (16, "NHD"), (64, "HND")]


def lengths_for(page_size: int) -> list[int]:
    """One token, either side of a page's edge, several pages and a rest, and padding."""
    return [1, page_size - 1, page_size, page_size + 1, 255, 0]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def loops(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence by the definition, one number after another: q [Lq, Hq, D], k and v [Lk, Hkv, D], all fp64."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf)
    for i in range(q.shape[0]):
        visible = min(k.shape[0], max(0, i + 1 + k.shape[0] - q.shape[0])) if causal else k.shape[0]
        for h in range(q.shape[1]):
            weights = [math.exp(scale * float(q[i, h] @ k[j, h // group])) for j in range(visible)]
            if weights:
                mean = sum(weight * v[j, h // group] for j, weight in enumerate(weights)) / sum(weights)
                out[i, h], lse[i, h] = mean, math.log(sum(weights))
    return out, lse


def torch_own(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence through scaled_dot_product_attention (queries that see no key give 0), and fp32 log-sum-exps."""
    if not q.shape[0] or not k.shape[0]:
        return torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        seen = seen.tril(k.shape[0] - q.shape[0])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], seen, enable_gqa=True)[0]
    k = k.float().repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = (q.float() / math.sqrt(q.shape[-1])) @ k.transpose(1, 2)  # scaled first, as torch's own attention does
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
    return out.masked_fill(~seen.any(-1)[:, None], 0).transpose(0, 1), lse.transpose(0, 1)


@dataclass
class Packed:
    """Sequences one after another: q [Tq, Hq, D], k and v [Tk, Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    queries: list[int]
    lengths: list[int]

    def parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """For each sequence its rows of q, k and v."""
        return list(zip(self.q.split(self.queries), *(tensor.split(self.lengths) for tensor in tensors), strict=True))

    def plain(self, causal: bool = True) -> tuple[Tensor, ...]:
        """What plain torch gives in the same dtype: out and log-sum-exp."""
        each = [torch_own(q, k, v, causal) for q, k, v in self.parts(self.k, self.v)]
        return tuple(torch.cat(parts) for parts in zip(*each, strict=True))

    def exact(self, causal: bool = True) -> tuple[Tensor, Tensor]:
        q, k, v = double(self.q, self.k, self.v)
        cu = (bounds(self.queries), bounds(self.lengths))
        return reference.attention_varlen(q, k, v, *cu, 1 / math.sqrt(q.shape[-1]), causal)


def packed(
    queries: list[int], lengths: list[int], heads: str, dtype: torch.dtype = torch.float32, head_dim: int = 16
) -> Packed:
    num_q_heads, num_kv_heads = HEADS[heads]
    q = torch.randn(sum(queries), num_q_heads, head_dim).to(dtype)
    k, v = (torch.randn(sum(lengths), num_kv_heads, head_dim).to(dtype) for _ in "kv")
    return Packed(q, k, v, queries, lengths)


@dataclass
class Paged:
    """Keys and values in shuffled pages; slots that no sequence owns are poison."""

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    seq_lens: Tensor


def paged(batch: Packed, page_size: int, order: str = "HND", poison: float = math.nan) -> Paged:
    """The batch's keys and values in pages; entries of the page table past a sequence's length name no page at all."""
    counts = [-(-length // page_size) for length in batch.lengths]
    num_pages, (_, num_kv_heads, head_dim) = sum(counts) + 2, batch.k.shape
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    if order == "NHD":
        shape = (num_pages, page_size, num_kv_heads, head_dim)
    pages = [torch.full(shape, poison, dtype=batch.q.dtype) for _ in "kv"]
    if order == "NHD":
        pages = [tensor.transpose(1, 2) for tensor in pages]
    free = torch.randperm(num_pages).tolist()
    page_table = torch.full((len(counts), max(counts, default=0) + 1), 1 << 30, dtype=torch.int32)
    for b, (_, *held) in enumerate(batch.parts(batch.k, batch.v)):
        for i in range(counts[b]):
            page_table[b, i] = page = free.pop()
            for tensor, tokens in zip(pages, held, strict=True):
                block = tokens[i * page_size : (i + 1) * page_size]
                tensor[page, :, : block.shape[0]] = block.transpose(0, 1)
    return Paged(*pages, page_table, torch.tensor(batch.lengths, dtype=torch.int32))


def op_arguments(op: str, batch: Packed, cache: Paged) -> tuple[Tensor, ...]:
    """What an attention op takes after its queries."""
    tables = (cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    return {
        "attention_varlen": (batch.k, batch.v, bounds(batch.queries), bounds(batch.lengths)),
        "attention_prefill": (*tables, bounds(batch.queries)),
        "attention_decode": tables,
    }[op]


def assert_both_honest(found: tuple[Tensor, Tensor], batch: Packed, causal: bool = True) -> None:
    """Out and log-sum-exp."""
    for ours, plain, exact in zip(found, batch.plain(causal), batch.exact(causal), strict=True):
        assert_honest(ours, plain, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_the_reference_is_the_definition(heads: str, causal: bool) -> None:
    """Including more queries than keys, no keys, no queries, and rows of no sequence at the end."""
    batch = packed([1, 3, 4, 2, 0, 2], [5, 3, 2, 0, 3, 0], heads)
    q, k, v = double(batch.q, batch.k, batch.v)
    cu = (bounds(batch.queries[:-1]), bounds(batch.lengths[:-1]))
    out, lse = reference.attention_varlen(q, k, v, *cu, 0.3, causal)
    expected = [loops(*part, 0.3, causal) for part in Packed(q, k, v, batch.queries, batch.lengths).parts(k, v)]
    for found, parts in zip((out, lse), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", HEADS)
def test_the_paged_references_are_the_definition(heads: str, queries: int) -> None:
    batch = packed([queries] * 3, [11, 5, 2], heads)
    batch = Packed(*double(batch.q, batch.k, batch.v), batch.queries, batch.lengths)
    cache = paged(batch, 5)
    pages = (cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    unscaled = (None,) * 4
    expected = [torch.cat(x) for x in zip(*(loops(*p, 0.3, True) for p in batch.parts(batch.k, batch.v)), strict=True)]
    decoded = reference.attention_decode(batch.q, *pages, *unscaled, 0.3)
    prefilled = reference.attention_prefill(batch.q, *pages, bounds(batch.queries), *unscaled, 0.3)
    for found in (*zip(decoded, expected, strict=True), *zip(prefilled, expected, strict=True)):
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.in_turn("heads")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("attention_varlen"))
def test_varlen(backend: str, dtype: torch.dtype, heads: str, causal: bool) -> None:
    batch = packed([1, 17, 33, 4, 0, 3], [40, 17, 50, 2, 7, 0], heads, dtype)
    cu = (bounds(batch.queries), bounds(batch.lengths))
    run = public("attention_varlen", backend)
    assert_both_honest(run(batch.q, batch.k, batch.v, *cu, causal=causal, return_lse=True), batch, causal)
    assert_honest(run(batch.q, batch.k, batch.v, *cu, causal=causal), batch.plain(causal)[0], batch.exact(causal)[0])


@pytest.mark.in_turn("heads", "page_size")
@pytest.mark.parametrize(("page_size", "order"), PAGES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("attention_decode"))
def test_decode(backend: str, dtype: torch.dtype, heads: str, page_size: int, order: str) -> None:
    lengths = lengths_for(page_size)
    batch = packed([1] * len(lengths), lengths, heads, dtype)
    cache = paged(batch, page_size, order)
    args = (batch.q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    found = public("attention_decode", backend)(*args, return_lse=True)
    assert_both_honest(found, batch)
    assert_equal(public("attention_decode", backend)(*args), found[0])


@pytest.mark.in_turn("heads", "page_size")
@pytest.mark.parametrize(("page_size", "order"), PAGES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("attention_prefill"))
def test_prefill(backend: str, dtype: torch.dtype, heads: str, page_size: int, order: str) -> None:
    """Whole prompts, chunks after a cached prefix, single tokens, padding, and rows of no sequence at the end."""
    lengths = lengths_for(page_size)
    queries = [1, page_size - 1, 2, page_size, 9, 0]
    batch = packed(queries, lengths, heads, dtype)
    cache = paged(batch, page_size, order)
    q = torch.cat((batch.q, torch.full_like(batch.q[:2], math.nan)))
    args = (q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens, bounds(queries))
    run = public("attention_prefill", backend)
    out, lse = run(*args, return_lse=True)
    assert_both_honest((out[:-2], lse[:-2]), batch)
    alone = run(*args)
    assert_honest(alone[:-2], batch.plain()[0], batch.exact()[0])
    assert (torch.cat((out[-2:], alone[-2:])) == 0).all()
    assert (lse[-2:] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("attention_decode"))
def test_decode_of_several_queries(backend: str, dtype: torch.dtype) -> None:
    """Verifying drafts: the last three tokens of each sequence, causal; more queries than tokens see what there is."""
    lengths = [3, 20, 64, 2, 0]
    batch = packed([3] * 5, lengths, "GQA 4", dtype)
    cache = paged(batch, 16)
    args = (batch.q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    assert_both_honest(public("attention_decode", backend)(*args, return_lse=True), batch)


@pytest.mark.parametrize("head_dim", [1, 10, 128])
@everywhere
def test_head_dimensions(op: str, backend: str, head_dim: int) -> None:
    lengths = [9, 33]
    queries = [1, 1] if op == "attention_decode" else [9, 12]
    batch = packed(queries, lengths, "GQA 4", torch.bfloat16, head_dim)
    cache = paged(batch, 16)
    args = op_arguments(op, batch, cache)
    assert_both_honest(public(op, backend)(batch.q, *args, return_lse=True), batch)


@pytest.mark.parametrize("poison", [math.nan, 3e4])
@pytest.mark.parametrize("op", ["attention_decode", "attention_prefill"])
def test_poison_would_be_seen(op: str, poison: float) -> None:
    """The tests above prove something only if one token too many spoils the output."""
    batch = packed([1, 1], [5, 16], "GQA 4", torch.float32)
    cache = paged(batch, 16, poison=poison)
    lengths = cache.seq_lens + torch.tensor([1, 0], dtype=torch.int32)
    args = (batch.q, cache.k_pages, cache.v_pages, cache.page_table, lengths)
    extra = (bounds([1, 1]),) if op == "attention_prefill" else ()
    out = public(op, on_cpu(op)[0])(*args, *extra)
    assert not (out[0].abs() < 100).all()
    assert (out[1].abs() < 100).all()


@pytest.mark.parametrize("backend", backends("attention_decode"))
def test_a_sequence_does_not_depend_on_the_others(backend: str) -> None:
    lengths = [9, 70, 33]
    batch = packed([1] * 3, lengths, "GQA 8", torch.bfloat16)
    cache = paged(batch, 16)
    run = public("attention_decode", backend)
    together = run(batch.q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    for b in range(3):
        row = slice(b, b + 1)
        alone = run(batch.q[row], cache.k_pages, cache.v_pages, cache.page_table[row], cache.seq_lens[row])
        assert_equal(alone, together[row])


@everywhere
def test_strided_queries_scale_and_outputs(op: str, backend: str) -> None:
    """q is a slice of a fused projection and out a slice of a wider buffer, whose other columns are left alone."""
    lengths = [6, 21, 1]
    queries = [1] * 3 if op == "attention_decode" else [2, 21, 1]
    batch = packed(queries, lengths, "GQA 4")
    cache = paged(batch, 5)
    fused = torch.full((sum(queries), 300), math.nan)
    q = fused[:, 20:148].view(-1, 8, 16)
    q.copy_(batch.q)
    buffer = torch.full((sum(queries), 10, 16), 7.0)
    out = buffer[:, 1:9]
    args = op_arguments(op, batch, cache)
    assert public(op, backend)(q, *args, scale=0.5, out=out) is out
    doubles = double(batch.q, batch.k, batch.v)
    exact = reference.attention_varlen(*doubles, bounds(queries), bounds(lengths), 0.5)[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    assert (buffer[:, [0, 9]] == 7.0).all()


@everywhere
def test_the_log_sum_exp_to_base_2(op: str, backend: str) -> None:
    """Natural times log2(e), also over several splits; -inf stays."""
    lengths = [6, 600, 0]
    queries = [1] * 3 if op == "attention_decode" else [2, 21, 2]
    batch = packed(queries, lengths, "GQA 4")
    args = op_arguments(op, batch, paged(batch, 16))
    run = public(op, backend)
    (out, natural), (same, base2) = (run(batch.q, *args, return_lse=True, base2=base2) for base2 in (False, True))
    assert_equal(same, out)
    assert (natural[-queries[-1] :] == -math.inf).all()
    torch.testing.assert_close(base2, natural / math.log(2), rtol=1e-6, atol=1e-6)


@everywhere
def test_nothing_to_do(op: str, backend: str) -> None:
    """No tokens and no sequences, and sequences that all are empty."""
    for queries in ([], [0, 0]):
        batch = packed(queries, queries, "GQA 4")
        cache = paged(batch, 16)
        args = op_arguments(op, batch, cache)
        out, lse = public(op, backend)(batch.q, *args, return_lse=True)
        assert out.shape == (0, 8, 16)
        assert lse.shape == (0, 8)


@pytest.mark.parametrize("backend", backends("attention_decode"))
def test_scores_far_apart_and_far_from_zero(backend: str) -> None:
    """Scores of +-1e4: one key takes all, and the log-sum-exp is its score."""
    q = torch.full((1, 1, 4), 100.0)
    keys = torch.tensor([-25.0, 25.0, 0.0])[:, None].expand(3, 4)
    k_pages, v_pages = keys[None, None].clone(), torch.arange(12.0).view(1, 1, 3, 4)
    out, lse = public("attention_decode", backend)(
        q, k_pages, v_pages, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32),
        scale=1.0, return_lse=True,
    )  # fmt: skip
    assert_equal(out, torch.tensor([[[4.0, 5.0, 6.0, 7.0]]]))
    assert_equal(lse, torch.tensor([[1e4]]))


@pytest.mark.parametrize("broken", ["q", "k", "v"])
@pytest.mark.parametrize("backend", backends("attention_decode"))
def test_nan_is_not_hidden(backend: str, broken: str) -> None:
    """A NaN of the sequence's own reaches its output, and no other sequence's."""
    batch = packed([1, 1], [9, 9], "MHA")
    getattr(batch, broken)[0] = math.nan
    cache = paged(batch, 5, poison=0.0)
    args = (batch.q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    out = public("attention_decode", backend)(*args)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
