"""Legal calls of attention and of the rotary embedding, made of extreme values and odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from fastllama.kernels import cos_sin_cache
from tests.kernels.fuzz.calls import Arguments, CallMaker

SCALES = (None, None, None, 1e-30, 1.0, 0.0, -1.0, 1e30, math.inf, math.nan)
WHOLE_SCALES = (0.37, 1, 2.0**-20, 100.0, None)  # of all keys or values: None not for quantized pages
POSITIONS = 64


def rope(m: CallMaker) -> Arguments:
    rows, heads, kv_heads, size = m.rows(), m.one_of(0, 1, 3), m.one_of(0, 1, 2), m.one_of(2, 4, 7, 8, 16, 30)
    q, k = (m.floats(name, rows, count, size, lead=1) for name, count in (("q", heads), ("k", kv_heads)))
    call = {"q": q, "k": k} | _turns(m, rows, size, m.one_of(0, size // 2, size))
    outs = [each if m.chance(0.3) else m.fresh("out", *each.shape, lead=1) for each in (q, k)]
    return call | {"interleaved": m.chance(0.5), "q_out": outs[0], "k_out": outs[1]}


def _turns(m: CallMaker, rows: int, size: int, rotated: int) -> Arguments:
    rotated -= rotated % 2
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / max(rotated, 1))
    positions = torch.tensor([m.one_of(0, 1, 5, POSITIONS - 1) for _ in range(rows)], dtype=m.integer())
    cache = m.place("cos_sin", cos_sin_cache(frequencies, POSITIONS).to(m.wide_or_own()))
    return {"cos_sin": cache, "positions": m.place("positions", positions)}


def rope_and_write_kv(m: CallMaker) -> Arguments:
    rows, heads, kv_heads, size = m.rows(), m.one_of(1, 3), m.one_of(1, 2), m.one_of(2, 8, 16, 30)
    qkv = m.place("qkv", m.values.tensor(m.dtype, rows, (heads + 2 * kv_heads) * size))
    over = qkv[:, : heads * size].unflatten(1, (heads, size)) if rows and m.chance(0.3) else None
    return {
        "qkv": qkv,
        **_turns(m, rows, size, m.one_of(size // 2, size)),
        **_places(m, rows, kv_heads, size, m.one_of(None, None, torch.int8, torch.float8_e4m3fn)),
        "interleaved": m.chance(0.5),
        "q_out": m.fresh("q_out", rows, heads, size, lead=1) if over is None else over,
    }


def write_kv(m: CallMaker) -> Arguments:
    """A given scale is a power of two: quotients in fp32 are those in fp64."""
    rows, kv_heads, size = m.rows(), m.one_of(1, 2, 3), m.one_of(1, 2, 7, 16, 30)
    k, v = (m.floats(name, rows, kv_heads, size, lead=1) for name in "kv")
    codes = m.one_of(None, None, torch.int8, torch.float8_e4m3fn)
    call = {"k": k, "v": v, **_places(m, rows, kv_heads, size, codes), "k_scale": None, "v_scale": None}
    if codes is None or m.chance(0.5):
        return call
    return call | {"k_scales": None, "v_scales": None, "k_scale": m.one_of(2.0**-20, 0.5, 1.0), "v_scale": 2.0**9}


def _places(m: CallMaker, rows: int, kv_heads: int, size: int, codes: torch.dtype | None) -> Arguments:
    page = m.one_of(1, 2, 7)
    pages = -(-rows // page) + m.one_of(0, 1) or 1
    order = list(range(pages * page))
    m.rng.shuffle(order)
    slots = [m.one_of(-1, -7) if m.chance(0.1) else order[i] for i in range(rows)]
    call: Arguments = {"slots": m.place("slots", torch.tensor(slots, dtype=m.integer()))}
    for side in "kv":
        held = torch.full((pages, kv_heads, page, size), 7.0).to(codes or m.dtype)
        call[f"{side}_pages"] = m.place(f"{side}_pages", held, 3)
        scales = torch.full((pages, kv_heads, page), 3.0)
        call[f"{side}_scales"] = None if codes is None else m.memory.place(f"{side}_scales", scales, 3)
    return call


def _heads(m: CallMaker) -> tuple[int, int, int]:
    kv_heads = m.one_of(1, 2)
    size = m.one_of(1, 2, 7, 8, 16, 17, 64) if not m.small else m.one_of(8, 16)
    return kv_heads * m.one_of(0, 1, 3, 5), kv_heads, size


def _finite(m: CallMaker, name: str, *shape: int) -> Tensor:
    """Finite values: 0 times an infinity is NaN, which reaches queries that it is masked from."""
    return m.place(name, m.values.tensor(m.dtype, *shape, not_finite=False), 1)


def _bounds(m: CallMaker, name: str, counts: list[int]) -> Tensor:
    return m.place(name, torch.tensor([0, *accumulate(counts)], dtype=m.integer()))


def _results(m: CallMaker, q: Tensor) -> Arguments:
    scale, (rows, heads, size) = m.one_of(*SCALES), q.shape
    shape = (heads, rows) if (transposed := m.chance(0.4)) else (rows, heads)
    lse_out = m.fresh("lse_out", *shape, dtype=torch.float32, lead=1) if m.chance(0.5) else None
    return {
        "scale": 1 / math.sqrt(size) if scale is None else scale,
        "causal": m.chance(0.6),
        "base2": m.chance(0.4),
        "out": q if m.chance(0.2) else m.fresh("out", *q.shape, lead=1),
        "lse_out": lse_out.t() if transposed and lse_out is not None else lse_out,
    }


def attention_varlen(m: CallMaker) -> Arguments:
    heads, kv_heads, size = _heads(m)
    count = m.one_of(0, 1, 2, 3)
    queries = [m.one_of(0, 1, 2, 5, 17) for _ in range(count)]
    keys = [m.one_of(0, 1, 2, 9, 17, 33) for _ in range(count)]
    q = m.floats("q", sum(queries) + m.one_of(0, 0, 2), heads, size, lead=1)
    k = m.floats("k", sum(keys) + m.one_of(0, 0, 1), kv_heads, size, lead=1)
    v = _finite(m, "v", *k.shape)
    bounds = {
        "cu_seqlens_q": _bounds(m, "cu_seqlens_q", queries),
        "cu_seqlens_k": _bounds(m, "cu_seqlens_k", keys),
    }
    return {"q": q, "k": k, "v": v, **bounds, **_results(m, q)}


def _paged(m: CallMaker, lengths: list[int], kv_heads: int, size: int) -> Arguments:
    page = m.one_of(1, 2, 7, 16) if not m.small else m.one_of(7, 16)
    codes = m.one_of(None, None, torch.int8, torch.float8_e4m3fn)
    whole = m.chance(0.3)  # one scale for all pages
    counts = [-(-length // page) for length in lengths]
    pages, width = sum(counts) + m.one_of(0, 1), max(counts, default=0) + m.one_of(0, 2)
    order = list(range(pages))
    m.rng.shuffle(order)
    table = torch.full((len(lengths), width), m.one_of(0, -1, 2**31 - 1), dtype=m.integer())
    shape, used = (pages, kv_heads, page, size), 0
    kept = torch.zeros(pages, 1, page, dtype=torch.bool)
    for sequence, length in enumerate(lengths):
        own = order[used : used + counts[sequence]]
        used += counts[sequence]
        table[sequence, : len(own)] = torch.tensor(own, dtype=table.dtype)
        for place in range(length):
            kept[own[place // page], 0, place % page] = True
    call: Arguments = {
        "page_table": m.place("page_table", table),
        "seq_lens": m.place("seq_lens", torch.tensor(lengths, dtype=m.integer())),
    }
    for side in "kv":
        scales = None
        if codes is None:  # unused slots hold NaN
            held = m.values.tensor(m.dtype, *shape, not_finite=side == "k").masked_fill(~kept[..., None], math.nan)
        else:
            held = (40 * m.values.normal(*shape)).round().clamp(-127, 127).to(codes)
            scales = m.values.tensor(torch.float32, *shape[:3], 1, not_finite=side == "k")[..., 0].abs()
            scales /= 512  # times 127 no overflow
            scales = None if whole else m.memory.place(f"{side}_scales", scales.masked_fill(~kept, math.nan), 3)
        call[f"{side}_pages"], call[f"{side}_scales"] = m.place(f"{side}_pages", held, 3), scales
        call[f"{side}_scale"] = m.one_of(*WHOLE_SCALES[: None if codes is None else -1]) if whole else None
    return call


def attention_prefill(m: CallMaker) -> Arguments:
    heads, kv_heads, size = _heads(m)
    lengths = [m.one_of(0, 1, 2, 9, 17, 33) for _ in range(m.one_of(0, 1, 2, 3))]
    queries = [m.one_of(0, 1, length, min(length, 5), length + 2) for length in lengths]
    q = m.floats("q", sum(queries) + m.one_of(0, 0, 2), heads, size, lead=1)
    bounds = _bounds(m, "cu_seqlens_q", queries)
    return {"q": q, **_paged(m, lengths, kv_heads, size), "cu_seqlens_q": bounds, **_results(m, q)}


def attention_decode(m: CallMaker) -> Arguments:
    heads, kv_heads, size = _heads(m)
    lengths = [m.one_of(0, 1, 2, 9, 17, 33) for _ in range(m.one_of(0, 1, 2, 3))]
    q = m.floats("q", m.one_of(0, 1, 1, 3) * len(lengths), heads, size, lead=1)
    return {"q": q, **_paged(m, lengths, kv_heads, size), **_results(m, q)}


ATTENTION_CALLS: dict[str, Callable[[CallMaker], Arguments]] = {
    each.__name__: each
    for each in (rope, rope_and_write_kv, write_kv, attention_varlen, attention_prefill, attention_decode)
}
