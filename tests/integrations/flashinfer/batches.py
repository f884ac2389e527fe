"""Random sequences with keys and values in pages, FlashInfer's arguments for them, and explicit attention in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.integrations.flashinfer.calls import half_unit

CPU = torch.device("cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence in fp64: q [Tq, Hq, D] over k, v [Tk, Hkv, D] -> [Tq, Hq, D], log2 of the sums [Tq, Hq]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->qhk", q, k) * scale
    if causal:
        hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("qhk,khd->qhd", weights, v), scores.logsumexp(-1) / math.log(2)


@dataclass
class Batch:
    """Sequences of given lengths, with tokens in pages of a larger pool; the rest of it holds 100."""

    lengths: Sequence[int]
    page_size: int = 4
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU
    layout: str = "NHD"
    fused: bool = False
    index_dtype: torch.dtype = torch.int32
    random: Random = field(default_factory=lambda: Random(0))
    spare: int = 2

    def __post_init__(self) -> None:
        pages = [-(-length // self.page_size) for length in self.lengths]
        starts = [0, *accumulate(pages)]
        pool = starts[-1] + self.spare
        ids = self.random.sample(range(pool), starts[-1])
        last = [(length - 1) % self.page_size + 1 if length else self.random.choice([0, 1]) for length in self.lengths]
        self.indptr, self.indices, self.last_page_len = (
            torch.tensor(x, dtype=self.index_dtype, device="cpu") for x in (starts, ids, last)
        )
        shape = (self.kv_heads, self.head_dim)
        self.k, self.v = ([self.normal(length, *shape) for length in self.lengths] for _ in range(2))
        pools = []
        for tokens in (self.k, self.v):
            held = torch.full((pool * self.page_size, *shape), 100.0, dtype=torch.float32, device=self.device)
            held = held.to(self.dtype)
            for b, x in enumerate(tokens):
                held[self.slots(b)] = x
            pools.append(self.laid_out(held.view(pool, self.page_size, *shape)))
        self.cache: Any = torch.stack(pools, 1) if self.fused else tuple(pools)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes of heads, of a head, and of a page, in the order of every plan."""
        return self.q_heads, self.kv_heads, self.head_dim, self.page_size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=self.device).to(self.dtype)

    def laid_out(self, pages: Tensor) -> Tensor:
        return pages if self.layout == "NHD" else pages.transpose(1, 2).contiguous()

    def pages(self, b: int) -> list[int]:
        bounds = self.indptr.tolist()
        return self.indices.tolist()[bounds[b] : bounds[b + 1]]

    def slots(self, b: int) -> Tensor:
        """The slot in the pool of each token of a sequence."""
        found = [page * self.page_size + i for page in self.pages(b) for i in range(self.page_size)]
        return torch.tensor(found[: self.lengths[b]], dtype=torch.int64, device=self.device)

    def queries(self, counts: Sequence[int]) -> Tensor:
        return self.normal(sum(counts), self.q_heads, self.head_dim)

    def expected(
        self, q: Tensor, counts: Sequence[int], scale: float | None = None, causal: bool = True, v_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Attention of these queries, and its log-sum-exps to base 2."""
        scale = self.head_dim**-0.5 if scale is None else scale
        found = [attend(*each, scale, causal) for each in zip(q.split(list(counts)), self.k, self.v, strict=True)]
        if not found:
            return q.double(), q.double()[..., 0]
        return torch.cat([out for out, _ in found]) * v_scale, torch.cat([lse for _, lse in found])


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], largest: float = 100.0) -> None:
    """Assert that results are as exact as their dtype: weights, values and the result are rounded once each.

    largest: of the values. Log-sum-exps are of scores in fp32, or in fp64.
    """
    unit = half_unit(found[0].dtype)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=4 * unit * largest)
    unit = half_unit(found[1].dtype)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=64 * unit, atol=64 * unit * largest)


def bounds(counts: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=dtype, device="cpu")


def workspace(device: torch.device = CPU, size: int = 1024) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
