"""Inputs for every op at representative shapes, and the formula that says what must come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastllama.verify import integers, oracle, sampling
from fastllama.verify.case import EPS, Case, Random, Results
from fastllama.verify.products import products

HELD = 7.0  # what a page holds where nothing may be written; exact in every dtype


def all_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The cases of every op, op by op, on the CPU."""
    random = Random(dtype)
    for maker in (
        _rms_norm,
        _add_rms_norm,
        _embedding,
        products,
        _rope,
        _rope_and_write_kv,
        _silu_mul,
        _attention_varlen,
        _attention_prefill,
        _attention_decode,
        _sample,
        _merge_state,
        integers.quantize_rows,
        integers.matmul_w8a8,
        integers.rms_norm_int8,
        integers.add_rms_norm_int8,
        integers.silu_mul_int8,
    ):
        yield from maker(random)


def _rms_norm(random: Random) -> Iterator[Case]:
    for shape in ((1, 4096), (33, 256), (7, 100)):
        args = (random.normal(*shape), random.normal(shape[-1]), EPS)
        yield Case("rms_norm", f"x {list(shape)}", args, lambda x, w, eps: (oracle.rms_norm(x, w, eps),))


def _add_rms_norm(random: Random) -> Iterator[Case]:
    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Results:
        total = x + residual
        return oracle.rms_norm(total, weight, eps), total

    for shape in ((1, 4096), (33, 256), (7, 100)):
        args = (random.normal(*shape), random.normal(*shape), random.normal(shape[-1]), EPS)
        yield Case("add_rms_norm", f"x {list(shape)}", args, formula)


def _embedding(random: Random) -> Iterator[Case]:
    args = (random.order(300)[:41], random.normal(300, 64))
    yield Case("embedding", "weight [300, 64]", args, lambda ids, weight: (torch.stack([weight[i] for i in ids]),))


def _turns(positions: int, rotated: int) -> Tensor:
    """A cos/sin cache [positions, rotated] in fp32."""
    angles = torch.outer(torch.arange(positions).float(), 10000.0 ** -(torch.arange(0, rotated, 2) / rotated))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _rope(random: Random) -> Iterator[Case]:
    for rotated, interleaved in ((64, False), (64, True), (32, False)):

        def formula(q: Tensor, k: Tensor, turns: Tensor, at: Tensor, interleaved: bool = interleaved) -> Results:
            cos, sin = turns[at].tensor_split(2, dim=-1)
            return oracle.rotate(q, cos, sin, interleaved), oracle.rotate(k, cos, sin, interleaved)

        args = (random.normal(33, 8, 64), random.normal(33, 2, 64), _turns(200, rotated), random.order(200)[:33])
        label = f"q [33, 8, 64], {rotated} rotated{', interleaved' if interleaved else ''}"
        yield Case("rope", label, args, formula, {"interleaved": interleaved})


def _rope_and_write_kv(random: Random) -> Iterator[Case]:
    def formula(qkv: Tensor, turns: Tensor, at: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> Results:
        heads, page = qkv.unflatten(1, (-1, 64)), k_pages.shape[2]
        cos, sin = turns[at].tensor_split(2, dim=-1)
        q, k = (oracle.rotate(x, cos, sin) for x in (heads[:, :8], heads[:, 8:10]))
        k_pages, v_pages = k_pages.clone(), v_pages.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                k_pages[slot // page, :, slot % page] = k[token]
                v_pages[slot // page, :, slot % page] = heads[token, 10:]
        return q, k_pages, v_pages

    for tokens, page in ((1, 16), (21, 16), (100, 64)):
        slots = random.order(4 * page)[:tokens]
        slots[1::10] = -1  # padding
        pages = torch.full((4, 2, page, 64), HELD, dtype=random.dtype)
        args = (random.normal(tokens, 12 * 64), _turns(200, 64), random.order(200)[:tokens], slots, pages, pages)
        label = f"qkv [{tokens}, 768], page size {page}"
        yield Case("rope_and_write_kv", label, args, formula, written=(4, 5))


def _silu_mul(random: Random) -> Iterator[Case]:
    for shape in ((1, 22016), (33, 704), (7, 10)):
        args = (random.normal(*shape),)
        yield Case("silu_mul", f"gate_up {list(shape)}", args, lambda gate_up: (oracle.silu_mul(gate_up),))


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Results:
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(sums)


def _one_row(results: Results) -> Results:
    """The log-sum-exps as one row: a single one may be near 0, and its error is that of the scores it sums."""
    out, *sums = results
    return (out, *(lse.flatten() for lse in sums))


def _attention_varlen(random: Random) -> Iterator[Case]:
    for heads, kv_heads, dim, causal in ((8, 2, 64, True), (8, 8, 128, False)):

        def formula(
            q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, dim: int = dim, causal: bool = causal
        ) -> Results:
            ends = zip(*(starts[1:].tolist() for starts in (starts_q, starts_k)), strict=True)
            parts, first_q, first_k = [], 0, 0
            for end_q, end_k in ends:
                rows, keys = slice(first_q, end_q), slice(first_k, end_k)
                parts.append(oracle.attention(q[rows], k[keys], v[keys], 1 / math.sqrt(dim), causal))
                first_q, first_k = end_q, end_k
            return _joined(parts)

        lens_q, lens_k = (7, 1, 33), (7, 90, 70)
        k, v = (random.normal(sum(lens_k), kv_heads, dim) for _ in "kv")
        args = (random.normal(sum(lens_q), heads, dim), k, v, _bounds(lens_q), _bounds(lens_k))
        label = f"q [41, {heads}, {dim}], {kv_heads} KV heads{', causal' if causal else ''}"
        for return_lse in (False, True):
            yield Case(
                "attention_varlen", label, args, formula, {"causal": causal, "return_lse": return_lse}, view=_one_row
            )


def _paged(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, starts: Tensor) -> Results:
    """Attention of rows starts[b] to starts[b + 1] of q over the first lengths[b] tokens of sequence b."""
    page, parts = k_pages.shape[2], []
    for b, length in enumerate(lengths.tolist()):
        k, v = (
            torch.stack([pages[table[b, at // page], :, at % page] for at in range(length)])
            for pages in (k_pages, v_pages)
        )
        parts.append(oracle.attention(q[starts[b] : starts[b + 1]], k, v, 1 / math.sqrt(q.shape[-1])))
    return _joined(parts)


def _cache(random: Random, lengths: Sequence[int], heads: int, page: int, dim: int) -> tuple[Tensor, ...]:
    """k_pages, v_pages, page_table, seq_lens. Slots that belong to no token hold NaN, as uninitialised memory may."""
    counts = [-(-length // page) for length in lengths]
    ids = iter(random.order(sum(counts)).tolist())
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    pages = [torch.full((sum(counts), heads, page, dim), math.nan, dtype=random.dtype) for _ in "kv"]
    for b, length in enumerate(lengths):
        for i in range(counts[b]):
            table[b, i] = next(ids)
            held = min(page, length - i * page)
            for tensor in pages:
                tensor[table[b, i], :, :held] = random.normal(heads, held, dim)
    return (*pages, table, torch.tensor(lengths, dtype=torch.int32))


def _coded(cache: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """A cache of codes in place of values, and their scales (NaN beside codes of no token)."""
    pages = [(42 * held.double()).round().clamp(-127, 127).nan_to_num(99.0).to(torch.int8) for held in cache[:2]]
    scales = [(held[..., 0].abs().double() / 64 + 2**-8).float() for held in cache[:2]]
    return (*pages, *cache[2:]), {"k_scales": scales[0], "v_scales": scales[1]}


def _paged_codes(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Tensor, k_scales: Tensor, v_scales: Tensor
) -> Results:
    """`_paged` over codes and their scales."""
    held = ((k_pages, k_scales), (v_pages, v_scales))
    return _paged(q, *(codes.to(q.dtype) * scales.to(q)[..., None] for codes, scales in held), *rest)


def _attention_prefill(random: Random) -> Iterator[Case]:
    lengths, fresh = (40, 17, 130), (5, 17, 64)
    for heads, kv_heads, dim, page in ((8, 2, 64, 16), (4, 4, 128, 64)):
        q = random.normal(sum(fresh), heads, dim)
        args = (q, *_cache(random, lengths, kv_heads, page, dim), _bounds(fresh))
        label = f"q [86, {heads}, {dim}], {kv_heads} KV heads, page size {page}"
        for return_lse in (False, True):
            yield Case("attention_prefill", label, args, _paged, {"return_lse": return_lse}, view=_one_row)
    codes, scales = _coded(_cache(random, lengths, 2, 16, 64))
    args = (random.normal(sum(fresh), 8, 64), *codes, _bounds(fresh))
    label = "q [86, 8, 64], 2 KV heads, page size 16, int8"
    options = {"return_lse": True, **scales}
    yield Case("attention_prefill", label, args, _paged_codes, options, view=_one_row, known=scales)


def _attention_decode(random: Random) -> Iterator[Case]:
    lengths = (3, 16, 33, 200)
    for heads, kv_heads, dim, page, queries in ((8, 2, 64, 16, 1), (4, 4, 128, 64, 1), (8, 1, 64, 16, 3)):

        def formula(
            q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, queries: int = queries
        ) -> Results:
            return _paged(q, k_pages, v_pages, table, lengths, _bounds([queries] * lengths.shape[0]))

        rows = queries * len(lengths)
        args = (random.normal(rows, heads, dim), *_cache(random, lengths, kv_heads, page, dim))
        label = f"q [{rows}, {heads}, {dim}], {kv_heads} KV heads, page size {page}"
        for return_lse in (False, True):
            yield Case("attention_decode", label, args, formula, {"return_lse": return_lse}, view=_one_row)
    codes, scales = _coded(_cache(random, lengths, 2, 16, 64))

    def of_codes(q: Tensor, *rest: Tensor, **scales: Tensor) -> Results:
        return _paged_codes(q, *rest, _bounds([1] * 4), **scales)

    args = (random.normal(4, 8, 64), *codes)
    label = "q [4, 8, 64], 2 KV heads, page size 16, int8"
    options = {"return_lse": True, **scales}
    yield Case("attention_decode", label, args, of_codes, options, view=_one_row, known=scales)


def _sample(random: Random) -> Iterator[Case]:
    """Rows of every filter, alone and together, each with several random numbers; parameters exact in fp32."""
    kinds = [(0.0, 0, 1.0, 0.0), (0.75, 0, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.0, 0, 0.875, 0.0)]
    kinds += [(1.25, 0, 1.0, 0.0625), (1.5, 50, 0.75, 0.03125)]
    draws = [sampling.Draw(*kind, seed=12345 + i, offset=7 * i) for i, kind in enumerate(kinds * 6)]
    logits = random.normal(len(draws), 1000) * 2
    rows = logits.tolist()

    def formula(logits: Tensor, *_: Tensor) -> Results:
        values = oracle.wide(logits)
        tokens = torch.tensor([sampling.take(row, draw) for row, draw in zip(values, draws, strict=True)])
        tokens = tokens.to(logits.device)
        return tokens, values.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    def view(results: Results) -> Results:
        """How far each token missed, in place of the tokens."""
        tokens, logprobs = results
        drawn = zip(tokens.tolist(), torch.tensor(rows, dtype=torch.float64), draws, strict=True)
        return torch.tensor([sampling.miss(*row) for row in drawn]).float().to(logprobs.device), logprobs

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(draw, name) for draw in draws], dtype=dtype)

    floats = (column(name, torch.float32) for name in ("top_p", "min_p"))
    integers = (column(name, torch.int64) for name in ("seed", "offset"))
    args = (logits, column("temperature", torch.float32), column("top_k", torch.int64), *floats, *integers)
    yield Case("sample", f"logits {list(logits.shape)}", args, formula, view=view)


def _merge_state(random: Random) -> Iterator[Case]:
    """Queries that saw keys on both sides, on either, and on none."""

    def formula(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Results:
        sums = torch.stack((a_lse, b_lse))
        shares = sums.softmax(0).nan_to_num(0.0).to(a.dtype)[..., None]
        return shares[0] * a + shares[1] * b, sums.logsumexp(0)

    for shape in ((1, 32, 128), (33, 8, 64), (7, 3, 10)):
        sides = []
        for place in (0, 1):
            lse = random.normal(*shape[:2]).float() * 3
            lse[place::5] = lse[4::5] = -math.inf
            sides += [random.normal(*shape), lse]
        yield Case("merge_state", f"a {list(shape)}", tuple(sides), formula, view=_one_row)
