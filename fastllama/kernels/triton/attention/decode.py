"""attention_decode in Triton: split-KV decoding with splits of a fixed length, then a reduction of the splits.

A split's length depends on neither the batch nor the sequence, so results are batch-invariant. Source: Dao et al.,
Flash-Decoding (2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher, scratch
from fastllama.kernels.reference.attention import room, score_scale
from fastllama.kernels.triton.attention.flash import (
    LOG2_E,
    as_loadable,
    attend,
    load_length,
    lse_unit_from_base2,
    result_scale,
    strides,
)
from fastllama.kernels.triton.overlap import follow, overlapping


# One program owns one split of one KV head of one sequence, with all queries of the head's group.
@triton.jit(
    do_not_specialize=[
        "page_table_ptr",
        "seq_lens_ptr",
        "num_pages",
        "longest",
        "page_table_stride",
        "lse_token_stride",
        "lse_head_stride",
        "splits",
    ]
)
def attention_decode_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    page_table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    num_pages,
    longest,
    scale_log2,
    v_scale,
    lse_unit,
    q_token_stride,
    k_page_stride,
    v_page_stride,
    k_scale_page_stride,
    v_scale_page_stride,
    k_token_stride,
    v_token_stride,
    out_token_stride,
    lse_token_stride,
    lse_head_stride,
    page_table_stride,
    splits,
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    K_SCALE_HEAD_STRIDE: tl.constexpr,
    V_SCALE_HEAD_STRIDE: tl.constexpr,
    OUT_HEAD_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    k_len, is_legal = load_length(seq_lens_ptr + seq, longest)
    first = split * SPLIT
    # The first split also runs for a sequence of length 0, padding of the batch, and writes zeros.
    if (first < k_len) | (split == 0):
        last = tl.minimum(first + SPLIT, k_len)
        packed = tl.arange(0, BLOCK_M)  # [M], all queries of a head, then those of the next
        query, head = packed % QUERIES, kv_head * GROUP + packed // QUERIES
        row = seq * QUERIES + query
        used = packed < QUERIES * GROUP
        dim = tl.arange(0, BLOCK_D)  # [D]
        mask = used[:, None] & (dim < HEAD_DIM)[None, :]  # [M, D]
        q_offsets = row[:, None] * q_token_stride + head[:, None] * Q_HEAD_STRIDE + dim[None, :]
        if CAUSAL:
            visible = k_len - QUERIES + 1 + query  # [M]
            whole = tl.minimum(last, k_len - QUERIES + 1)
        else:
            visible = tl.zeros([BLOCK_M], tl.int32) + k_len
            whole = last
        acc, peak, total = attend(
            tl.load(q_ptr + q_offsets, mask=mask, other=0.0),
            visible,
            whole,
            first,
            last,
            k_len,
            scale_log2,
            k_pages_ptr + kv_head * K_HEAD_STRIDE,
            v_pages_ptr + kv_head * V_HEAD_STRIDE,
            k_scales_ptr,
            v_scales_ptr,
            kv_head * K_SCALE_HEAD_STRIDE,
            kv_head * V_SCALE_HEAD_STRIDE,
            page_table_ptr + seq * page_table_stride,
            num_pages,
            k_page_stride,
            v_page_stride,
            k_scale_page_stride,
            v_scale_page_stride,
            k_token_stride,
            v_token_stride,
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            STAGES,
        )
        total = tl.where(is_legal, total, float("nan"))
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        if v_scale is not None:
            result *= v_scale
        place = row * out_token_stride + head * OUT_HEAD_STRIDE  # [M]; the splits of a head are contiguous
        to = (place * splits + split * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(out_ptr + to, result.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            lse = (peak + tl.log2(total)) * lse_unit
            tl.store(lse_ptr + row * lse_token_stride + head * lse_head_stride + split, lse, mask=used)


# Reduces the splits: one program owns one query of one head.
@triton.jit(do_not_specialize=["seq_lens_ptr", "longest", "lse_token_stride", "lse_head_stride", "splits"])
def attention_combine_kernel(
    parts_ptr,
    part_lses_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    longest,
    v_scale,
    lse_unit,
    out_token_stride,
    lse_token_stride,
    lse_head_stride,
    splits,
    OUT_HEAD_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(1) + head
    k_len, _ = load_length(seq_lens_ptr + row // QUERIES, longest)
    used = tl.maximum(tl.cdiv(k_len, SPLIT), 1)
    peaks = tl.full([64], float("-inf"), tl.float32)
    for start in range(0, used, 64):
        split = start + tl.arange(0, 64)
        lse = tl.load(part_lses_ptr + at * splits + split, mask=split < used, other=float("-inf"))
        peaks = tl.maximum(peaks, lse)
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.full([], 0.0, tl.float32)
    dim = tl.arange(0, BLOCK_D)  # [D]
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used, 8):
        split = start + tl.arange(0, 8)
        inside = split < used
        lse = tl.load(part_lses_ptr + at * splits + split, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(parts_ptr + (at * splits + split)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        weights = tl.exp2(lse - base)  # [8]
        total += tl.sum(weights, 0)
        acc += tl.sum(parts * weights[:, None], 0)
    result = acc / tl.where(total == 0, 1.0, total)
    if v_scale is not None:
        result *= v_scale
    out_ptrs = out_ptr + row * out_token_stride + head * OUT_HEAD_STRIDE + dim
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + row * lse_token_stride + head * lse_head_stride, (peak + tl.log2(total)) * lse_unit)


def _plan(q: Tensor, k_pages: Tensor, page_table: Tensor) -> tuple[heuristics.DecodeLaunch, int, int]:
    """The launch, the splits of a sequence, and the elements of the workspace."""
    rows, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    num_seqs, max_pages = page_table.shape
    queries = rows // max(num_seqs, 1) * (num_heads // num_kv_heads)
    launch = tuning.decode(q.device, queries=queries, head_dim=head_dim, itemsize=k_pages.element_size())
    splits = max(ceil_div(max_pages * page_size, launch.split), 1)
    return launch, splits, rows * num_heads * splits * (head_dim + 1) if splits > 1 else 0


def workspace_size(q: Tensor, k_pages: Tensor, page_table: Tensor) -> int:
    """Elements of fp32 that `attention_decode` needs for the splits: results, and log-sum-exps to base 2."""
    return _plan(q, k_pages, page_table)[2]


@launcher
def attention_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
    workspace: Tensor | None,
) -> list[KernelCall]:
    """See kernels.attention_decode."""
    check_kernel_dtype("q", q)
    rows, num_heads, head_dim = q.shape
    launch, splits, size = _plan(q, k_pages, page_table)
    workspace = scratch(workspace, size, torch.float32, q.device)
    if not rows:
        return []
    num_seqs = page_table.shape[0]
    _, num_kv_heads, page_size, _ = k_pages.shape
    queries, group = rows // num_seqs, num_heads // num_kv_heads
    block_d = max(power_of_2(head_dim), 16)
    parts, part_lses, token_stride, head_stride = out, lse_out, out.stride(0), out.stride(1)
    lse_strides = (0, 0) if lse_out is None else lse_out.stride()
    part_lse_strides = lse_strides
    if splits > 1:
        results = rows * num_heads * splits * head_dim
        parts, part_lses = workspace[:results], workspace[results:size]  # [rows, heads, splits, D] and without D
        token_stride, head_stride = num_heads * head_dim, head_dim
        part_lse_strides = (num_heads * splits, splits)
    longest, unit = room(k_pages, page_table), lse_unit_from_base2(base2)
    call = KernelCall(
        attention_decode_kernel,
        (num_seqs, num_kv_heads, splits),
        q_ptr=q,
        k_pages_ptr=as_loadable(k_pages),
        v_pages_ptr=as_loadable(v_pages),
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        page_table_ptr=page_table,
        seq_lens_ptr=seq_lens,
        out_ptr=parts,
        lse_ptr=part_lses,
        num_pages=k_pages.shape[0],
        longest=longest,
        scale_log2=score_scale(scale, k_scale) * LOG2_E,
        v_scale=result_scale(v_scale) if splits == 1 else None,
        lse_unit=unit if splits == 1 else 1.0,
        q_token_stride=q.stride(0),
        out_token_stride=token_stride,
        lse_token_stride=part_lse_strides[0],
        lse_head_stride=part_lse_strides[1],
        page_table_stride=page_table.stride(0),
        splits=splits,
        Q_HEAD_STRIDE=q.stride(1),
        **strides(k_pages, v_pages, k_scales, v_scales),
        OUT_HEAD_STRIDE=head_stride,
        QUERIES=queries,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        CAUSAL=causal and queries > 1,  # one query sees all keys either way: one kernel for both
        SPLIT=launch.split,
        BLOCK_M=max(power_of_2(queries * group), 16),
        BLOCK_N=launch.keys,
        BLOCK_D=block_d,
        STAGES=launch.stages,
        num_warps=launch.num_warps,
        **overlapping(q.device),
    )
    if splits == 1:
        return [call]
    combine = KernelCall(
        attention_combine_kernel,
        (rows, num_heads),
        parts_ptr=parts,
        part_lses_ptr=part_lses,
        seq_lens_ptr=seq_lens,
        out_ptr=out,
        lse_ptr=lse_out,
        longest=longest,
        v_scale=result_scale(v_scale),
        lse_unit=unit,
        out_token_stride=out.stride(0),
        lse_token_stride=lse_strides[0],
        lse_head_stride=lse_strides[1],
        splits=splits,
        OUT_HEAD_STRIDE=out.stride(1),
        QUERIES=queries,
        HEAD_DIM=head_dim,
        SPLIT=launch.split,
        BLOCK_D=block_d,
        num_warps=4,
        **overlapping(q.device),
    )
    return [call, combine]
