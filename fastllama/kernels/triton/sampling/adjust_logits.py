"""Logit biases and penalties in Triton, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastllama.arithmetic import FP32_LARGEST, ceil_div
from fastllama.kernels.dispatch.checks import check_kernel_dtype
from fastllama.kernels.launch import tuning
from fastllama.kernels.launch.kernel_call import KernelCall, launcher
from fastllama.kernels.triton.overlap import follow, overlapping

LIMIT = tl.constexpr(FP32_LARGEST / 4)


@triton.jit
def _bounded(x, changed):
    """`changed` within LIMIT where x is finite; x itself where it is not."""
    changed = tl.where(changed > LIMIT, LIMIT, tl.where(changed < -LIMIT, -LIMIT, changed))  # NaN of a penalty passes
    return tl.where(tl.abs(x) < float("inf"), changed, x)


# One program owns BLOCK logits of one row; programs of one row are adjacent, as its memory is.
@triton.jit(
    do_not_specialize=[
        "tokens_ptr",
        "starts_ptr",
        "ends_ptr",
        "slots_ptr",
        "repetition_ptr",
        "presence_ptr",
        "frequency_ptr",
        "num_tokens",
        "num_slots",
    ]
)
def adjust_logits_kernel(
    out_ptr,
    logits_ptr,
    tokens_ptr,
    starts_ptr,
    ends_ptr,
    slots_ptr,
    bias_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    out_row_stride,
    logits_row_stride,
    bias_row_stride,
    counts_row_stride,
    num_tokens,
    num_slots,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    BLOCKS: tl.constexpr = tl.cdiv(VOCAB, BLOCK)
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = col < VOCAB
    slot = tl.load(slots_ptr + row)
    x = tl.load(logits_ptr + row * logits_row_stride + col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if slot >= num_slots:
        x = tl.full([BLOCK], float("nan"), tl.float32)
    elif slot >= 0:
        bias = tl.load(bias_ptr + slot * bias_row_stride + col, mask=mask, other=0.0)  # [BLOCK]
        counted = tl.load(counts_ptr + slot * counts_row_stride + col, mask=mask, other=0)  # [BLOCK]
        generated = counted >> 1  # the loop carries the layout of the loads, as zeros would not
        start, end = tl.maximum(tl.load(starts_ptr + row), 0), tl.minimum(tl.load(ends_ptr + row), num_tokens)
        for place in range(start, end):
            token = tl.load(tokens_ptr + place)
            token = tl.where((token >= 0) & (token < VOCAB), token, -1).to(tl.int32)  # comparisons in 32 bits
            generated += (col == token).to(tl.int32)
        repetition = tl.full([BLOCK], tl.load(repetition_ptr + row), tl.float32)
        biased = tl.where(tl.abs(bias) < float("inf"), _bounded(x, x + bias), x + bias)
        # Rounded as IEEE 754 specifies, so that a penalty of 1 changes no bit.
        repeated = tl.where(biased > 0, tl.div_rn(biased, repetition), biased * repetition)
        x = tl.where((counted != 0) | (generated > 0), _bounded(biased, repeated), biased)
        less = tl.load(presence_ptr + row) + tl.load(frequency_ptr + row) * generated.to(tl.float32)
        x = tl.where(generated > 0, _bounded(x, x - less), x)
    tl.store(out_ptr + row * out_row_stride + col, x, mask=mask)


@launcher
def adjust_logits(
    logits: Tensor,
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
    slots: Tensor,
    bias: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    out: Tensor,
) -> list[KernelCall]:
    """See kernels.adjust_logits."""
    check_kernel_dtype("logits", logits)
    rows, vocab = logits.shape
    if not rows:
        return []
    launch = tuning.adjust(logits.device, vocab_size=vocab, itemsize=logits.element_size())
    call = KernelCall(
        adjust_logits_kernel,
        (rows * ceil_div(vocab, launch.block),),
        out_ptr=out,
        logits_ptr=logits,
        tokens_ptr=tokens,
        starts_ptr=starts,
        ends_ptr=ends,
        slots_ptr=slots,
        bias_ptr=bias,
        counts_ptr=counts,
        repetition_ptr=repetition_penalty,
        presence_ptr=presence_penalty,
        frequency_ptr=frequency_penalty,
        out_row_stride=out.stride(0),
        logits_row_stride=logits.stride(0),
        bias_row_stride=bias.stride(0),
        counts_row_stride=counts.stride(0),
        num_tokens=tokens.shape[0],
        num_slots=bias.shape[0],
        VOCAB=vocab,
        BLOCK=launch.block,
        **overlapping(logits.device),
        num_warps=launch.num_warps,
    )
    return [call]
