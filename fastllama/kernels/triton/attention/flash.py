"""The loop of every attention kernel: one tile of queries against tiles of keys, with an online softmax.

Scores are scaled by log2(e), so that a weight takes one exp2. Source: Dao, FlashAttention-2 (2023); Milakov and
Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.device import arch

LOG2_E = 1.4426950408889634


def lse_unit_from_base2(base2: bool) -> float:
    """The factor from the log-sum-exp to base 2, as kernels compute it, to the returned one."""
    return 1.0 if base2 else 1 / LOG2_E


def result_scale(v_scale: float | None) -> float | None:
    """The factor of results, as a float: for an integer, Triton would compile another kernel."""
    return None if v_scale is None else float(v_scale)


def as_loadable(pages: Tensor) -> Tensor:
    """Pages in a dtype that kernels load: float8_e4m3fn as its bits where a GPU has no instruction to convert it."""
    if pages.dtype != torch.float8_e4m3fn or _converts_e4m3(arch(pages.device)):
        return pages
    return pages.view(torch.uint8)


def _converts_e4m3(arch: str) -> bool:
    """Whether a GPU converts float8_e4m3fn: Ada and newer. Triton rejects the dtype elsewhere."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89


def strides(k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> dict[str, int]:
    """The stride arguments of keys and values [P, Hkv, page_size, D], or [T, Hkv, D] without pages, and of scales."""
    found: dict[str, int] = {}
    for name, values, scales in (("k", k, k_scales), ("v", v, v_scales)):
        token, page = (2, values.stride(0)) if values.dim() == 4 else (0, 0)
        found |= {f"{name}_page_stride": page, f"{name}_token_stride": values.stride(token)}
        found |= {f"{name.upper()}_HEAD_STRIDE": values.stride(1)}
        page, head = (0, 0) if scales is None else (scales.stride(0), scales.stride(1))
        found |= {f"{name}_scale_page_stride": page, f"{name.upper()}_SCALE_HEAD_STRIDE": head}
    return found


@triton.jit
def _softmax_step(scores, acc, peak, total, shrink):
    """Weights [M, N] of a tile of scores, and acc (times `shrink`), peak and total rescaled to the new peak."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))  # [M]
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    return weights, acc * (fade * shrink)[:, None], new_peak, total * fade + tl.sum(weights, 1)


@triton.jit
def load_length(ptr, longest):
    """The length of a sequence, 0 if it is illegal, and whether it is legal: checked in int64, then narrowed."""
    length = tl.load(ptr)
    is_legal = (length >= 0) & (length <= longest)
    return tl.where(is_legal, length, 0).to(tl.int32), is_legal


@triton.jit
def _pages(page_table_ptr, start, k_len, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page ids of a tile: one if no tile crosses pages, else one for each token [N]; 0 past the end."""
    if PAGE_SIZE == 0:
        pages = tl.full([], 0, tl.int64)
    elif PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(page_table_ptr + start // PAGE_SIZE, mask=start < k_len, other=0).to(tl.int64)
    else:
        tokens = start + tl.arange(0, BLOCK_N)  # [N]
        pages = tl.load(page_table_ptr + tokens // PAGE_SIZE, mask=tokens < k_len, other=0).to(tl.int64)
    return pages


@triton.jit
def _offsets(tokens, pages, page_stride, token_stride, PAGE_SIZE: tl.constexpr):
    """Offsets of tokens [N]: from the start of the pool, or without pages from the sequence's first key."""
    if PAGE_SIZE == 0:
        return tokens.to(tl.int64) * token_stride
    return pages * page_stride + (tokens % PAGE_SIZE).to(tl.int64) * token_stride


@triton.jit
def _checked(pages, num_pages, scale_log2, PAGE_SIZE: tl.constexpr):
    """Page ids, 0 in place of those outside the pool; whether each is in the pool; and the factor of scores.

    The factor is NaN for a page outside the pool. The check takes four instructions for each tile of keys and values,
    of 16 KiB and more.
    """
    exists = pages == 0 if PAGE_SIZE == 0 else (pages >= 0) & (pages < num_pages)
    return tl.where(exists, pages, 0), exists, tl.where(exists, scale_log2, float("nan"))


@triton.jit
def _decoded(codes, dtype: tl.constexpr):
    """Keys or values converted exactly to a dtype of 16 or more bits; from such a dtype, int8, e4m3 or e4m3's bits."""
    if codes.dtype == tl.uint8:  # fp16 has these bits seven places further left; its exponents are 8 larger
        bits = (codes & 0x80).to(tl.uint16) << 8 | (codes & 0x7F).to(tl.uint16) << 7
        values = (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    elif codes.dtype == tl.float8e4nv:  # through fp32: Hopper converts fp16 to bf16 at an eighth of the rate
        values = codes.to(tl.float16).to(tl.float32).to(dtype)
    else:
        values = codes.to(dtype)
    return values


@triton.jit
def _scales(ptrs, exists, MASKED: tl.constexpr):
    """Scales [N] of tokens; if MASKED, 0 for those that do not exist."""
    return tl.load(ptrs, mask=exists, other=0.0) if MASKED else tl.load(ptrs)


@triton.jit
def attend(
    q,
    visible,
    whole,
    first,
    last,
    k_len,
    scale_log2,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    k_scales_start,
    v_scales_start,
    page_table_ptr,
    num_pages,
    k_page_stride,
    v_page_stride,
    k_scale_page_stride,
    v_scale_page_stride,
    k_token_stride,
    v_token_stride,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of queries [M, D] over tokens `first` (a multiple of BLOCK_N) to `last`; row m sees those < visible[m].

    Keys and values begin at k_ptr and v_ptr, their scales, if any, at elements k_scales_start and v_scales_start. Every
    row sees all tokens below `whole`: tiles up to there are not masked, later ones are. PAGE_SIZE 0: keys are
    contiguous. Scales of quantized keys and values multiply scores and weights, which are fewer than the elements of
    keys and values. A page outside the pool of num_pages gives NaN to the rows that see it. Returns the weighted sum of
    values [M, D], the largest score [M] and the sum of weights [M].
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The unit of acc: the largest scale of values so far, because weights times small scales underflow in 16 bits.
    unit = tl.full([], 2.0**-100, tl.float32)
    dim = tl.arange(0, BLOCK_D)  # [D]
    edge = first + tl.maximum(whole - first, 0) // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        begin = edge if masked else first
        pages = _pages(page_table_ptr, begin, k_len, PAGE_SIZE, BLOCK_N)
        for start in tl.range(begin, last if masked else edge, BLOCK_N, num_stages=STAGES):
            tokens = start + tl.arange(0, BLOCK_N)  # [N]
            pages, exists, factor = _checked(pages, num_pages, scale_log2, PAGE_SIZE)
            k_ptrs = k_ptr + _offsets(tokens, pages, k_page_stride, k_token_stride, PAGE_SIZE)[:, None] + dim[None, :]
            v_ptrs = v_ptr + _offsets(tokens, pages, v_page_stride, v_token_stride, PAGE_SIZE)[:, None] + dim[None, :]
            if k_scales_ptr is not None:
                k_slots = k_scales_start + _offsets(tokens, pages, k_scale_page_stride, 1, PAGE_SIZE)
                v_slots = v_scales_start + _offsets(tokens, pages, v_scale_page_stride, 1, PAGE_SIZE)
                k_scales = _scales(k_scales_ptr + k_slots, (tokens < k_len) & exists, masked == 1)
                v_scales = _scales(v_scales_ptr + v_slots, (tokens < k_len) & exists, masked == 1)
            # Loaded one tile ahead: right before the loads of keys, it would take pipeline stages from them.
            pages = _pages(page_table_ptr, start + BLOCK_N, k_len, PAGE_SIZE, BLOCK_N)
            if masked:
                inside = ((tokens < k_len) & exists)[:, None] & (dim < HEAD_DIM)[None, :]  # [N, D]
                k = tl.load(k_ptrs, mask=inside, other=0.0)
                v = tl.load(v_ptrs, mask=inside, other=0.0)
            elif BLOCK_D != HEAD_DIM:
                k = tl.load(k_ptrs, mask=(dim < HEAD_DIM)[None, :], other=0.0)
                v = tl.load(v_ptrs, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            else:
                k = tl.load(k_ptrs)
                v = tl.load(v_ptrs)
            scores = tl.dot(q, tl.trans(_decoded(k, q.dtype)), input_precision="ieee") * factor  # [M, N]
            if k_scales_ptr is not None:
                scores *= k_scales[None, :]
            if masked:
                scores = tl.where(tokens[None, :] < visible[:, None], scores, float("-inf"))
            if k_scales_ptr is not None:
                before, unit = unit, tl.maximum(unit, tl.max(v_scales, 0))
                weights, acc, peak, total = _softmax_step(scores, acc, peak, total, before / unit)
                weights *= (v_scales / unit)[None, :]
            else:
                weights, acc, peak, total = _softmax_step(scores, acc, peak, total, 1.0)
            acc = tl.dot(weights.to(q.dtype), _decoded(v, q.dtype), acc, input_precision="ieee")  # [M, D]
    if k_scales_ptr is not None:
        acc *= unit
    return acc, peak, total
