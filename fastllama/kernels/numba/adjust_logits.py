"""Logit biases and penalties in one pass over a row, then one over the few tokens that no table counts yet."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastllama.arithmetic import FP32_LARGEST, ceil_div
from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import LIKE, as_written, jit, load, load_integer, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch

TILE = 4096  # logits of an iteration: 64 KiB of all four tensors, so that a second pass finds them in cache
OPERATIONS = 3  # for a logit: one row of 32000 takes 9 us, too little for a helper
LIMIT = np.float32(FP32_LARGEST / 4)
INFINITY = np.float32(np.inf)


# A NaN penalty passes: Python's max keeps its first argument unless the second is larger. With comparisons in its place
# 16 rows of 32000 took one thread 207 us, not 145.
@as_written
def bounded(x):
    """x within LIMIT."""
    return min(max(x, -LIMIT), LIMIT)


# Not reassociated, so that a token has the same logit whether a table or `tokens` counts it. Infinities and NaN stay.
@as_written
def adjusted(x, bias, seen, generated, repetition, presence, frequency):
    biased = x + bias
    biased = bounded(biased) if abs(x) < INFINITY and abs(bias) < INFINITY else biased
    finite = abs(biased) < INFINITY
    repeated = bounded(biased / repetition if biased > np.float32(0) else biased * repetition)
    penalised = repeated if seen and finite else biased
    less = bounded(penalised - (presence + frequency * generated))
    return less if finite and generated > np.float32(0) else penalised


# Columns of one row. Starts count elements.
@jit
def adjust_tile(out_ptr, logits_ptr, bias_ptr, counts_ptr, start, logits_start, bias_start, counts_start, size, *how):
    repetition, presence, frequency, like = how
    fp32, int32 = np.float32(0), np.int32(0)
    for i in range(size):
        count = load_integer(counts_ptr, counts_start + i, int32)
        x, bias = load(logits_ptr, logits_start + i, like), load(bias_ptr, bias_start + i, fp32)
        generated = np.float32(np.int32(count >> 1))  # int32, of which every CPU converts vectors
        store(out_ptr, start + i, adjusted(x, bias, count != 0, generated, repetition, presence, frequency), fp32)


# One iteration owns TILE columns of a row.
@jit
def adjust_logits_kernel(region, *args):
    (
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
        out_ptr,
        logits_stride,
        bias_stride,
        counts_stride,
        out_stride,
        vocab,
        num_tokens,
        num_slots,
        like,
    ) = args
    fp32, int32, int64 = np.float32(0), np.int32(0), np.int64(0)
    tiles = (vocab + TILE - 1) // TILE
    piece, last = enter(region, args)
    while piece < last:
        for iteration in range(piece, last):
            row, first_id = iteration // tiles, iteration % tiles * TILE
            size = min(TILE, vocab - first_id)
            at, source = row * out_stride + first_id, row * logits_stride + first_id
            slot = load_integer(slots_ptr, row, int64)
            if slot < 0 or slot >= num_slots:
                for i in range(size):
                    store(out_ptr, at + i, load(logits_ptr, source + i, like) if slot < 0 else np.float32(np.nan), fp32)
                continue
            repetition = load(repetition_ptr, row, fp32)
            presence, frequency = load(presence_ptr, row, fp32), load(frequency_ptr, row, fp32)
            bias_at, counts_at = slot * bias_stride + first_id, slot * counts_stride + first_id
            adjust_tile(
                out_ptr,
                logits_ptr,
                bias_ptr,
                counts_ptr,
                at,
                source,
                bias_at,
                counts_at,
                size,
                repetition,
                presence,
                frequency,
                like,
            )
            start = max(load_integer(starts_ptr, row, int64), 0)
            end = min(load_integer(ends_ptr, row, int64), num_tokens)
            for place in range(start, end):
                token = load_integer(tokens_ptr, place, int64)
                i = token - first_id
                if i < 0 or i >= size:
                    continue
                generated = load_integer(counts_ptr, counts_at + i, int32) >> 1
                for other in range(start, end):
                    generated += load_integer(tokens_ptr, other, int64) == token
                x, bias = load(logits_ptr, source + i, like), load(bias_ptr, bias_at + i, fp32)
                store(
                    out_ptr,
                    at + i,
                    adjusted(x, bias, True, np.float32(generated), repetition, presence, frequency),
                    fp32,
                )
        piece, last = proceed(region)
    return leave(region)


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
) -> None:
    """See kernels.adjust_logits."""
    given = (logits, tokens, starts, ends, slots, bias, counts, repetition_penalty, presence_penalty, frequency_penalty)
    like, (rows, vocab) = LIKE.get(logits.dtype), logits.shape
    if like is None:
        out.copy_(reference.adjust_logits(*given))
        return
    launch(
        adjust_logits_kernel,
        rows * ceil_div(vocab, TILE),
        OPERATIONS * logits.numel(),
        *(each.data_ptr() for each in (*given, out)),
        *(each.stride(0) for each in (logits, bias, counts, out)),
        vocab,
        tokens.shape[0],
        bias.shape[0],
        like,
    )
