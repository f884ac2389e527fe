"""attention_varlen and attention_prefill in Triton: one kernel, for contiguous and for paged keys and values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import power_of_2
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.reference.attention import room, score_scale
from fastllama.kernels.triton.attention.flash import (
    LOG2_E,
    as_loadable,
    attend,
    lse_unit_from_base2,
    result_scale,
    strides,
)

LANES = tl.constexpr(128)  # bounds that a program reads at once


@triton.jit
def _first_block(begin, seq, BLOCK_M: tl.constexpr):
    """The first block of a sequence: each has at most one block more than its rows fill, so that none overlap."""
    return begin // BLOCK_M + seq


@triton.jit
def _load_bounds(bounds_ptr, seq, num_seqs, num_rows):
    """The bounds `seq` [LANES] of sequences, and which are illegal: legal ones ascend from 0 to at most num_rows."""
    exists = seq <= num_seqs
    bounds = tl.load(bounds_ptr + seq, mask=exists, other=num_rows)
    least = tl.load(bounds_ptr + seq - 1, mask=exists & (seq > 0), other=0)
    return bounds, (bounds < least) | (bounds > num_rows) | ((seq == 0) & (bounds != 0))


@triton.jit
def _owner(cu_seqlens_q_ptr, k_bounds_ptr, num_seqs, num_rows, longest, block, K_BOUNDS, BLOCK_M: tl.constexpr):
    """The sequence that owns a block, num_seqs past the last; and whether bounds are legal, those of keys if K_BOUNDS.

    Every program checks all bounds: 4 bytes a sequence from L2, beside kilobytes of keys.
    """
    # Scalars, reduced in each iteration: with vectors instead, Triton 3.7 loads masked tiles of keys synchronously.
    begun, wrong = 0, 0
    for start in range(0, num_seqs + 1, LANES):
        seq = start + tl.arange(0, LANES)
        bounds, is_wrong = _load_bounds(cu_seqlens_q_ptr, seq, num_seqs, num_rows)
        begun += tl.sum(((_first_block(bounds, seq, BLOCK_M) <= block) & (seq <= num_seqs)).to(tl.int32), 0)
        if K_BOUNDS:
            is_wrong |= _load_bounds(k_bounds_ptr, seq, num_seqs, longest)[1]
        wrong += tl.sum(is_wrong.to(tl.int32), 0)
    is_legal = wrong == 0
    return tl.where(is_legal, begun - 1, num_seqs), is_legal


# One program owns BLOCK_M queries of one head of one sequence. Rows past the last sequence are one more, without keys.
@triton.jit(
    do_not_specialize=[
        "cu_seqlens_q_ptr",
        "k_bounds_ptr",
        "page_table_ptr",
        "num_seqs",
        "num_rows",
        "num_pages",
        "longest",
        "lse_token_stride",
        "lse_head_stride",
        "page_table_stride",
    ]
)
def attention_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    k_bounds_ptr,
    page_table_ptr,
    num_seqs,
    num_rows,
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
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    K_SCALE_HEAD_STRIDE: tl.constexpr,
    V_SCALE_HEAD_STRIDE: tl.constexpr,
    OUT_HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # From the last block down: programs start in order, and a causal sequence's last rows see the most keys.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    seq, is_legal = _owner(cu_seqlens_q_ptr, k_bounds_ptr, num_seqs, num_rows, longest, block, PAGE_SIZE == 0, BLOCK_M)
    exists = seq < num_seqs
    begin = tl.where(is_legal, tl.load(cu_seqlens_q_ptr + seq), 0).to(tl.int32)
    end = tl.load(cu_seqlens_q_ptr + seq + 1, mask=exists, other=num_rows).to(tl.int32)
    first_row = begin + (block - _first_block(begin, seq, BLOCK_M)) * BLOCK_M
    first_row = tl.where(is_legal, first_row, block * BLOCK_M)  # else rows belong to no sequence, and get NaN
    if first_row < end:
        k_start = tl.full([], 0, tl.int32)
        k_len = tl.load(k_bounds_ptr + seq + (PAGE_SIZE == 0), mask=exists, other=0)
        is_legal &= (k_len >= 0) & (k_len <= longest)
        k_len = tl.where(is_legal, k_len, 0).to(tl.int32)
        if PAGE_SIZE == 0:
            k_start = tl.load(k_bounds_ptr + seq, mask=exists, other=0).to(tl.int32)
            k_len -= k_start
        row = first_row + tl.arange(0, BLOCK_M)  # [M]
        if CAUSAL:
            ahead = k_len - end + 1  # row r sees keys below r + ahead
            visible = tl.minimum(tl.maximum(row + ahead, 0), k_len)  # [M]
            whole = tl.minimum(tl.maximum(first_row + ahead, 0), k_len)
            last = tl.minimum(tl.maximum(tl.minimum(first_row + BLOCK_M, end) - 1 + ahead, 0), k_len)
        else:
            visible = tl.zeros([BLOCK_M], tl.int32) + k_len
            whole = k_len
            last = k_len
        dim = tl.arange(0, BLOCK_D)  # [D]
        mask = (row < end)[:, None] & (dim < HEAD_DIM)[None, :]  # [M, D]
        offsets = row.to(tl.int64)[:, None]
        q = tl.load(q_ptr + offsets * q_token_stride + head * Q_HEAD_STRIDE + dim[None, :], mask=mask, other=0.0)
        kv_head = head // GROUP
        acc, peak, total = attend(
            q,
            visible,
            whole,
            0,
            last,
            k_len,
            scale_log2,
            k_ptr + k_start.to(tl.int64) * k_token_stride + kv_head * K_HEAD_STRIDE,
            v_ptr + k_start.to(tl.int64) * v_token_stride + kv_head * V_HEAD_STRIDE,
            k_scales_ptr,
            v_scales_ptr,
            kv_head * K_SCALE_HEAD_STRIDE,
            kv_head * V_SCALE_HEAD_STRIDE,
            page_table_ptr + tl.cast(seq, tl.int64) * page_table_stride,
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
        result = acc / tl.where(total == 0, 1.0, total)[:, None]  # a row that sees no key gives 0
        if v_scale is not None:
            result *= v_scale
        out_ptrs = out_ptr + offsets * out_token_stride + head * OUT_HEAD_STRIDE + dim[None, :]
        tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            lse_ptrs = lse_ptr + row.to(tl.int64) * lse_token_stride + head * lse_head_stride
            tl.store(lse_ptrs, (peak + tl.log2(total)) * lse_unit, mask=row < end)


@launcher
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> list[KernelCall]:
    """See kernels.attention_varlen."""
    return _plan(q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, None, None, scale, causal, base2, out, lse_out)


@launcher
def attention_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    k_scale: float | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> list[KernelCall]:
    """See kernels.attention_prefill."""
    return _plan(
        q,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        cu_seqlens_q,
        seq_lens,
        page_table,
        v_scale,
        score_scale(scale, k_scale),
        causal,
        base2,
        out,
        lse_out,
    )


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    cu_seqlens_q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor | None,
    v_scale: float | None,
    scale: float,
    causal: bool,
    base2: bool,
    out: Tensor,
    lse_out: Tensor | None,
) -> list[KernelCall]:
    check_kernel_dtype("q", q)
    num_rows, num_heads, head_dim = q.shape
    if not num_rows:
        return []
    num_seqs = cu_seqlens_q.shape[0] - 1
    lse_strides = (0, 0) if lse_out is None else lse_out.stride()
    launch = tuning.prefill(q.device, head_dim=head_dim, itemsize=q.element_size(), key_itemsize=k.element_size())
    call = KernelCall(
        attention_prefill_kernel,
        (num_rows // launch.rows + num_seqs + 1, num_heads),
        q_ptr=q,
        k_ptr=as_loadable(k),
        v_ptr=as_loadable(v),
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        out_ptr=out,
        lse_ptr=lse_out,
        cu_seqlens_q_ptr=cu_seqlens_q,
        k_bounds_ptr=k_bounds,
        page_table_ptr=k_bounds if page_table is None else page_table,
        num_seqs=num_seqs,
        num_rows=num_rows,
        num_pages=0 if page_table is None else k.shape[0],
        longest=k.shape[0] if page_table is None else room(k, page_table),
        scale_log2=scale * LOG2_E,
        v_scale=result_scale(v_scale),
        lse_unit=lse_unit_from_base2(base2),
        q_token_stride=q.stride(0),
        out_token_stride=out.stride(0),
        lse_token_stride=lse_strides[0],
        lse_head_stride=lse_strides[1],
        page_table_stride=0 if page_table is None else page_table.stride(0),
        Q_HEAD_STRIDE=q.stride(1),
        OUT_HEAD_STRIDE=out.stride(1),
        GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim,
        PAGE_SIZE=0 if page_table is None else k.shape[2],
        CAUSAL=causal,
        BLOCK_M=launch.rows,
        BLOCK_N=launch.keys,
        BLOCK_D=max(power_of_2(head_dim), 16),
        STAGES=launch.stages,
        num_warps=launch.num_warps,
        **strides(k, v, k_scales, v_scales),
    )
    return [call]
