"""The steps of an engine written for flash-attn: nano-vllm's calls, on pages of 256 tokens."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from tests.integrations.flash_attn.explicit import assert_near, attention
from tests.integrations.flash_attn.libraries import Library

PAGE, HEADS, KV_HEADS, DIM = 256, 4, 2, 16
SCALE = DIM**-0.5


class Engine:
    """One attention layer of an engine: it writes keys and values into slots, and attends to the pages they are in."""

    def __init__(self, library: Library, num_pages: int) -> None:
        self.library = library
        self.k_cache, self.v_cache = (library.randn(num_pages, PAGE, KV_HEADS, DIM) for _ in range(2))

    def store(self, k: Tensor, v: Tensor, slots: list[int]) -> None:
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            cache.view(-1, KV_HEADS, DIM)[torch.tensor(slots, device=self.library.device)] = new

    def prefill(self, tokens: list[tuple[Tensor, ...]], pages: list[list[int]], cached: list[int]) -> list[Tensor]:
        """Sequences of which `cached` tokens are in their pages; q, k and v of the others, new ones, are given."""
        q, k, v = (torch.cat([each[i] for each in tokens]) for i in range(3))
        new = [len(each[0]) for each in tokens]
        lengths = [a + b for a, b in zip(new, cached, strict=True)]
        self.store(k, v, [s for row, n, c in zip(pages, lengths, cached, strict=True) for s in slots(row, c, n)])
        bounds_q, bounds_k = (self.library.ints(0, *accumulate(each)) for each in (new, lengths))
        longest = {"max_seqlen_q": max(new), "max_seqlen_k": max(lengths)}
        table = None
        if any(cached):
            table = self.table(pages)
            k, v = self.k_cache, self.v_cache
        out = self.library.functions.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=bounds_q,
            cu_seqlens_k=bounds_k,
            **longest,
            softmax_scale=SCALE,
            causal=True,
            block_table=table,
        )
        return list(out.split(new))

    def decode(self, tokens: list[tuple[Tensor, ...]], pages: list[list[int]], lengths: list[int]) -> list[Tensor]:
        """One new token of each sequence, which is its last."""
        q, k, v = (torch.cat([each[i] for each in tokens]) for i in range(3))
        self.store(k, v, [slots(row, n - 1, n)[0] for row, n in zip(pages, lengths, strict=True)])
        out = self.library.functions.flash_attn_with_kvcache(
            q[:, None],
            self.k_cache,
            self.v_cache,
            cache_seqlens=self.library.ints(*lengths),
            block_table=self.table(pages),
            softmax_scale=SCALE,
            causal=True,
        )
        return list(out)

    def table(self, pages: list[list[int]]) -> Tensor:
        """Rows of one length, padded by -1 as the engine pads them."""
        width = max(map(len, pages))
        return self.library.ints(*(row + [-1] * (width - len(row)) for row in pages))


def slots(pages: list[int], first: int, end: int) -> list[int]:
    return [pages[i // PAGE] * PAGE + i % PAGE for i in range(first, end)]


def test_prefill_a_cached_prefix_and_decoding_are_full_attention(library: Library) -> None:
    def tokens(count: int) -> tuple[Tensor, ...]:
        return tuple(library.randn(count, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def expected(history: list[tuple[Tensor, ...]]) -> Tensor:
        q, k, v = (torch.cat([each[i] for each in history]) for i in range(3))
        return attention(q, k, v, causal=True, scale=SCALE)[0]

    engine = Engine(library, 8)
    first, second = [tokens(300)], [tokens(5)]
    outs = engine.prefill([first[0], second[0]], [[6, 2], [3]], [0, 0])
    # A third sequence begins with the first one's first page; the second goes on by a chunk.
    third = [tuple(x[:PAGE] for x in first[0]), tokens(40)]
    second.append(tokens(3))
    outs += engine.prefill([third[1], second[1]], [[6, 5], [3]], [PAGE, 5])
    for step in range(3):
        running = [first, second, third]
        for each in running:
            each.append(tokens(1))
        lengths = [301 + step, 9 + step, 297 + step]
        outs += engine.decode([each[-1] for each in running], [[6, 2], [3], [6, 5]], lengths)
    whole = [expected(each) for each in (first, second, third)]
    parts = [(0, 0), (1, 0), (2, PAGE), (1, 5)]
    parts += [(each, n + step) for step in range(3) for each, n in enumerate((300, 8, 296))]
    assert len(parts) == len(outs)
    for (each, start), out in zip(parts, outs, strict=True):
        assert_near(out, whole[each][start : start + len(out)], library.dtype, 4.0)
