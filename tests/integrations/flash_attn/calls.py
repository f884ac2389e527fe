"""Random legal calls of flash-attn's functions, small, with what each must return and leave in its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.integrations.flash_attn.explicit import attention, rotated

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
HINTS = {"num_splits": 3, "pack_gqa": True, "sm_margin": 1}


@dataclass
class Call:
    """arguments: by name, in the order of the signature. lse: the argument that requests it, if any.

    out, expected_lse: expected, fp64; +inf marks rows without keys, and rows whose `out` is NaN are not compared.
    cache: k_cache and v_cache as they must be afterwards.
    """

    arguments: dict[str, Any]
    lse: str | None
    out: Tensor
    expected_lse: Tensor
    cache: tuple[Tensor, Tensor] | None = None


class Maker:
    """Generates the random numbers and tensors of one call."""

    def __init__(self, seed: int, lse: tuple[str, ...]) -> None:
        self.random = Random(seed)
        torch.manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.kv_heads, self.head_dim = self.random.randint(1, 3), self.random.choice((4, 8, 16, 24))
        self.heads = self.kv_heads * self.random.randint(1, 3)
        self.causal = self.random.random() < 0.5
        self.scale = self.random.choice((None, None, 0.3))
        self.lse = self.random.choice((None, None, *lse))

    def chance(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def layout(self) -> str:
        return self.random.choice(("contiguous", "contiguous", "by head", "sliced"))

    def tensor(self, *shape: int, layout: str | None = None) -> Tensor:
        """[..., S, H, D] in one of the layouts that stacks have: contiguous, by head, or a slice of something wider."""
        layout = layout or self.layout()
        if layout == "by head":
            return torch.randn((*shape[:-3], shape[-2], shape[-3], shape[-1])).to(self.dtype).transpose(-3, -2)
        if layout == "sliced":
            return torch.randn((*shape[:-2], shape[-2] + 2, shape[-1])).to(self.dtype)[..., 1:-1, :]
        return torch.randn(shape).to(self.dtype)

    def ints(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=self.random.choice((torch.int32, torch.int64)))

    def lengths(self, num_seqs: int, most: int) -> list[int]:
        return [self.random.randint(0, most) for _ in range(num_seqs)]

    def common(self, q: Tensor) -> dict[str, Any]:
        """Arguments of all functions."""
        given: dict[str, Any] = {"softmax_scale": self.scale, "causal": self.causal}
        given |= {name: value for name, value in HINTS.items() if self.chance(0.2)}
        given |= {"window_size": self.random.choice(((-1, -1), [-1, -1], (None, None)))} if self.chance() else {}
        given |= {"out": torch.full(q.shape, 3.0, dtype=self.dtype)} if self.chance(0.3) else {}
        given |= {self.lse: True} if self.lse else {}
        return given

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, self.causal, self.scale)


def dense_call(seed: int) -> Call:
    """A random call of flash_attn_func."""
    make = Maker(seed, ("return_attn_probs", "return_lse", "return_softmax_lse"))
    num_seqs, len_q, len_k = make.random.randint(0, 3), make.random.randint(0, 6), make.random.randint(0, 8)
    q = make.tensor(num_seqs, len_q, make.heads, make.head_dim)
    k, v = (make.tensor(num_seqs, len_k, make.kv_heads, make.head_dim) for _ in range(2))
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.zeros(num_seqs, make.heads, len_q, dtype=torch.float64)
    for b in range(num_seqs):
        out[b], lse[b] = make.attention(q[b], k[b], v[b])
    return Call({"q": q, "k": k, "v": v, **make.common(q)}, make.lse, out, lse)


def varlen_call(seed: int) -> Call:
    """A random call of flash_attn_varlen_func: packed or paged keys, some of them unused."""
    make = Maker(seed, ("return_attn_probs", "return_lse", "return_softmax_lse"))
    num_seqs = make.random.randint(1, 4)
    lens_q, lens_k = make.lengths(num_seqs, 5), make.lengths(num_seqs, 9)
    bounds_q, bounds_k = ([0, *accumulate(lens)] for lens in (lens_q, lens_k))
    q = make.tensor(bounds_q[-1] + make.random.choice((0, 0, 2)), make.heads, make.head_dim)
    given: dict[str, Any] = {"q": q, "cu_seqlens_q": make.ints(bounds_q), "max_seqlen_q": max(lens_q)}
    used_q = [make.random.randint(0, length) for length in lens_q] if make.chance(0.3) else lens_q
    used_k = lens_k
    if paged := make.chance():
        page_size, most = make.random.randint(1, 5), make.random.randint(10, 12)
        width = -(-most // page_size)
        pages = torch.randperm(num_seqs * width + 2)[: num_seqs * width].view(num_seqs, width)
        k, v = (make.tensor(num_seqs * width + 2, page_size, make.kv_heads, make.head_dim) for _ in range(2))
        keys = [[x[pages[b]].flatten(0, 1)[: lens_k[b]] for x in (k, v)] for b in range(num_seqs)]
        given[make.random.choice(("block_table", "page_table"))] = make.ints(pages.tolist())
    else:
        total = bounds_k[-1] + make.random.choice((0, 1))
        k, v = (make.tensor(total, make.kv_heads, make.head_dim) for _ in range(2))
        used_k = [make.random.randint(0, length) for length in lens_k] if make.chance(0.3) else lens_k
        keys = [[x[bounds_k[b] : bounds_k[b] + used_k[b]] for x in (k, v)] for b in range(num_seqs)]
    if paged and make.chance():
        given["seqused_k"] = make.ints(lens_k)
    else:
        given |= {"cu_seqlens_k": make.ints(bounds_k), "max_seqlen_k": max(lens_k)}
    if used_k is not lens_k:
        given["seqused_k"] = make.ints(used_k)
    if used_q is not lens_q:
        given["seqused_q"] = make.ints(used_q)
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full((make.heads, q.shape[0]), float("inf"), dtype=torch.float64)
    for b in range(num_seqs):
        rows = slice(bounds_q[b], bounds_q[b] + used_q[b])
        out[rows], lse[:, rows] = make.attention(q[rows], *keys[b])
    return Call({**given, "k": k, "v": v, **make.common(q)}, make.lse, out, lse)


def kvcache_call(seed: int) -> Call:
    """A random call of flash_attn_with_kvcache: rows or pages, new tokens, rotation and packed queries at random."""
    make = Maker(seed, ("return_softmax_lse", "return_lse"))
    num_seqs, room = make.random.randint(1, 3), make.random.randint(6, 14)
    page_size = make.random.randint(1, 5) if make.chance() else room
    width = -(-room // page_size)
    room = width * page_size
    place = torch.randperm(num_seqs * width + 1)[: num_seqs * width].view(num_seqs, width)  # pages, of a row one
    shape, layout = (num_seqs * width + 1, page_size, make.kv_heads, make.head_dim), make.layout()
    k_cache, v_cache = make.tensor(*shape, layout=layout), make.tensor(*shape, layout=layout)
    given: dict[str, Any] = {"k_cache": k_cache, "v_cache": v_cache}
    if width > 1:
        given[make.random.choice(("block_table", "page_table"))] = make.ints(place.tolist())
    elif make.chance():
        given["cache_batch_idx"] = make.ints(place[:, 0].tolist())
    else:
        place = torch.arange(num_seqs)[:, None]
    after = k_cache.clone(), v_cache.clone()

    packed = make.chance(0.3)
    lens_q = make.lengths(num_seqs, 4) if packed else [make.random.randint(0, 4)] * num_seqs
    bounds_q = [0, *accumulate(lens_q)]
    lens = make.lengths(num_seqs, room - 5)
    if make.chance(0.15):
        lens = [lens[0]] * num_seqs
        given["cache_seqlens"] = lens[0]
    else:
        given["cache_seqlens"] = make.ints(lens)
    queries = make.tensor(bounds_q[-1], make.heads, make.head_dim)
    given["q"] = queries if packed else queries.unflatten(0, (num_seqs, lens_q[0]))
    if packed:
        given["cu_seqlens_q"] = make.ints(bounds_q)
    turned = [queries[bounds_q[b] : bounds_q[b + 1]] for b in range(num_seqs)]
    lens_new = [0] * num_seqs
    if make.chance(0.7):
        lens_new, turned = _append(make, given, lens, turned, after, place)
    hidden = [0] * num_seqs
    if make.chance(0.3):
        hidden = make.lengths(num_seqs, room)
        given["cache_leftpad"] = make.ints(hidden)
    out = torch.zeros(queries.shape, dtype=torch.float64)
    lse = torch.zeros(make.heads, bounds_q[-1], dtype=torch.float64)
    for b in range(num_seqs):
        rows, end = slice(bounds_q[b], bounds_q[b + 1]), lens[b] + lens_new[b]
        seen = [x[place[b]].flatten(0, 1)[hidden[b] : end] for x in after]
        out[rows], lse[:, rows] = make.attention(turned[b], *seen)
    if not packed:
        out, lse = out.view(given["q"].shape), lse.unflatten(1, (num_seqs, lens_q[0])).transpose(0, 1)
    return Call({**given, **make.common(given["q"])}, make.lse, out, lse, after)


def _append(
    make: Maker,
    given: dict[str, Any],
    lens: list[int],
    queries: list[Tensor],
    after: tuple[Tensor, Tensor],
    place: Tensor,
) -> tuple[list[int], list[Tensor]]:
    """New tokens for `given` and `after`; how many of each sequence, and its queries, rotated where they are."""
    num_seqs = len(lens)
    packed = make.chance(0.3)
    lens_new = make.lengths(num_seqs, 4) if packed else [make.random.randint(0, 4)] * num_seqs
    bounds = [0, *accumulate(lens_new)]
    k, v = (make.tensor(bounds[-1], make.kv_heads, make.head_dim) for _ in range(2))
    given |= (
        {"k": k, "v": v} if packed else {n: x.unflatten(0, (num_seqs, lens_new[0])) for n, x in (("k", k), ("v", v))}
    )
    if packed:
        given["cu_seqlens_k_new"] = make.ints(bounds)
    turn: Callable[[Tensor, Tensor], Tensor] = lambda x, at: x  # noqa: E731
    start = lens
    if make.chance():
        dtype = make.random.choice((torch.float32, make.dtype))
        cos, sin = torch.rand(2, 40, make.random.randint(1, make.head_dim // 2)).to(dtype)
        interleaved = make.chance()
        given |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        if make.chance(0.2):
            start = make.lengths(num_seqs, 20)
            given["rotary_seqlens"] = make.ints(start)

        def turn(x: Tensor, at: Tensor) -> Tensor:
            return rotated(x, cos, sin, at, interleaved)

    turned, page_size = [], after[0].shape[1]
    for b in range(num_seqs):
        new = slice(bounds[b], bounds[b + 1])
        at = torch.arange(lens_new[b]) + lens[b]
        page = place[b, at // page_size]
        after[0][page, at % page_size] = turn(k[new], at - lens[b] + start[b])
        after[1][page, at % page_size] = v[new]
        steps = torch.arange(len(queries[b])) if make.causal else torch.zeros(len(queries[b]), dtype=torch.int64)
        turned.append(turn(queries[b], steps + start[b]))
    return lens_new, turned
