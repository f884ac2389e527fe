"""Sampling without sorting: each row's thresholds from histograms of its weights' bits, ten bits at a time.

A weight is exp((x - max) / temperature), in (0, 1]; its bits, read as an integer, are its key and order tokens as
probabilities do. Masses are weights in units of 2^-44, which int64 sums exactly, in any order.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.numba.numerics import INTEGER_LIKE, LIKE, array, exp, jit, load, load_integer
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch

LARGEST_VOCAB = (1 << 19) - 1  # weights of 2^44 that fit in int64
_UNITS = 2.0**44
_DIGITS = 1024
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@jit
def uniform(seed, offset):
    """See reference.sampling.philox."""
    k0, k1 = np.uint64(seed) & _WORD, np.uint64(seed) >> _HALF
    c0, c1, c2, c3 = np.uint64(offset) & _WORD, np.uint64(0), np.uint64(0), np.uint64(0)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ k0, b & _WORD, (a >> _HALF) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _WORD, (k1 + np.uint64(0xBB67AE85)) & _WORD
    return np.float32(min(c0, _WORD - c0)) * np.float32(4.6566127342e-10)


@jit
def mass(weight):
    return np.int64(np.float64(weight) * _UNITS)


@jit
def least_key(weights, floor, need, by_mass, near):
    """The largest key >= floor from which on the number, or the mass, of the tokens reaches `need`.

    near: scratch for as many weights. All tokens from `floor` on must reach `need`.
    """
    keys, near_keys = weights.view(np.int32), near.view(np.int32)
    size = 0
    for i in range(len(keys)):
        near[size] = weights[i]
        size += keys[i] >= floor
    sums = np.empty(_DIGITS, np.int64)
    key, reached = 0, 0
    for shift in (20, 10, 0):
        sums[:] = 0
        for i in range(size):
            sums[(near_keys[i] >> shift) & (_DIGITS - 1)] += mass(near[i]) if by_mass else 1
        digit = _DIGITS - 1
        while digit > 0 and reached + sums[digit] < need:
            reached += sums[digit]
            digit -= 1
        key = key * _DIGITS + digit
        left = 0
        for i in range(size):
            near[left] = near[i]
            left += (near_keys[i] >> shift) & (_DIGITS - 1) == digit
        size = left
    return key


@jit
def choose(weights, top_k, top_p, min_p, number):
    """The first token, in vocabulary order, at which the sum of the kept masses passes `number` times their total."""
    keys = weights.view(np.int32)
    near = np.empty(len(weights), np.float32)
    floor = np.int64(0)
    for by_mass in (False, True):  # top-k, then top-p of what it keeps: one loop, whose body is most of the code
        if by_mass:
            total = 0
            for i in range(len(weights)):
                total += mass(weights[i]) if keys[i] >= floor else 0
            share = np.float64(top_p) if 0 < top_p < 1 else 0.0  # an infinity or NaN is no integer
            need = max(np.int64(np.ceil(share * np.float64(total))), 1)
        else:
            need = top_k
        if (top_p < 1) if by_mass else (0 < top_k < len(weights)):
            floor = least_key(weights, floor, need, by_mass, near)
    least = np.float32(1) if min_p > 1 else min_p if min_p > 0 else np.float32(0)  # NaN is off
    total = 0
    for i in range(len(weights)):
        near[i] = weights[i] if keys[i] >= floor and weights[i] >= least else 0
        total += mass(near[i])
    bar = np.int64(np.float64(number) * np.float64(total))
    token, last = 0, len(weights) - 1
    bar -= mass(near[0])
    while bar >= 0 and token < last:
        token += 1
        bar -= mass(near[token])
    return token


# One row: its token and log-probability. Starts count elements.
@jit
def sample_row(logits_ptr, start, vocab, temperature, top_k, top_p, min_p, seed, offset, like):
    largest = load(logits_ptr, start, like)
    for i in range(vocab):
        value = load(logits_ptr, start + i, like)
        largest = value if value > largest else largest
    weights = np.empty(vocab, np.float32)
    total = 0.0
    for i in range(vocab):
        weights[i] = exp(load(logits_ptr, start + i, like) - largest)
        total += np.float64(weights[i])
    if not (np.isfinite(total) and np.isfinite(largest)):
        return 0, np.float32(np.nan)
    token = 0
    if temperature > 0:
        if temperature != 1:
            # Not 0 at an infinite temperature: a logit of -inf must stay that.
            scale = max(np.float32(1) / max(temperature, np.float32(1e-37)), np.float32(1e-45))
            for i in range(vocab):
                weights[i] = exp((load(logits_ptr, start + i, like) - largest) * scale)
        token = choose(weights, top_k, top_p, min_p, uniform(seed, offset))
    else:
        while load(logits_ptr, start + token, like) != largest:
            token += 1
    return token, np.float32(load(logits_ptr, start + token, like) - largest - np.log(total))


# One iteration owns one row.
@jit
def sample_rows_kernel(region, *args):
    (
        logits_ptr,
        temperature_ptr,
        top_k_ptr,
        top_p_ptr,
        min_p_ptr,
        seed_ptr,
        offset_ptr,
        tokens_ptr,
        logprobs_ptr,
        row_stride,
        rows,
        vocab,
        like,
        top_k_like,
    ) = args
    fp32, int64 = np.float32(0), np.int64(0)
    tokens, logprobs = array(tokens_ptr, (rows,), int64), array(logprobs_ptr, (rows,), fp32)
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            tokens[row], logprobs[row] = sample_row(
                logits_ptr,
                row * row_stride,
                vocab,
                load(temperature_ptr, row, fp32),
                load_integer(top_k_ptr, row, top_k_like),
                load(top_p_ptr, row, fp32),
                load(min_p_ptr, row, fp32),
                load_integer(seed_ptr, row, int64),
                load_integer(offset_ptr, row, int64),
                like,
            )
        first, last = proceed(region)
    return leave(region)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.sample. NumPy allocates scratch memory."""
    like, (rows, vocab) = LIKE.get(logits.dtype), logits.shape
    parameters = (temperature, top_k, top_p, min_p, seed, offset)
    if like is None or vocab > LARGEST_VOCAB:
        for target, result in zip((tokens, logprobs), reference.sample(logits, *parameters), strict=True):
            target.copy_(result)
        return
    launch(
        sample_rows_kernel,
        rows,
        16 * logits.numel(),
        logits.data_ptr(),
        *(parameter.data_ptr() for parameter in parameters),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        logits.stride(0),
        rows,
        vocab,
        like,
        INTEGER_LIKE[top_k.dtype],
    )
