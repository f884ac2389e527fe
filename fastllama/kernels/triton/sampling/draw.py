"""sample in Triton: greedy and filtered sampling, each row split over programs, nothing sorted.

Six launches: `peak` (the largest logits), three in filters.py (the least key to keep), `mass` (the kept mass of each
chunk) and `draw` (the token). Greedy rows use only the first and the last.
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
from fastllama.kernels.triton.overlap import follow, overlapping
from fastllama.kernels.triton.sampling import filters
from fastllama.kernels.triton.sampling.masses import LARGEST_VOCAB, keys_of, load_logits, masses_of, row_peak


# One program owns one chunk of one row: its largest logit, its sum of exp. The first also clears the row's sums.
@triton.jit
def sample_peak_kernel(
    logits_ptr,
    peaks_ptr,
    octaves_ptr,
    state_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    OCTAVES: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    x = load_logits(logits_ptr, row, row_stride, cols, VOCAB)
    peak = tl.max(x, 0)
    total = tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)), 0)
    tl.store(peaks_ptr + row * 2 * CHUNKS + chunk, peak)
    tl.store(peaks_ptr + (row * 2 + 1) * CHUNKS + chunk, total)
    if chunk == 0:
        tl.store(octaves_ptr + row * 2 * OCTAVES + tl.arange(0, 2 * OCTAVES), tl.zeros([2 * OCTAVES], tl.int64))
        tl.store(state_ptr + row * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit
def _kept_masses(x, cols, peak, temperature, state_ptr, row, VOCAB: tl.constexpr):
    """Mass of each token that the filters keep, else 0: one formula, lest a chunk's sum and its token disagree."""
    keys = keys_of(x, peak, temperature)
    kept = (keys >= tl.load(state_ptr + row * 2 + 1)) & (cols < VOCAB)
    return tl.where(kept, masses_of(keys), 0)


# One program owns one chunk of one row: the mass of its tokens that the filters keep.
@triton.jit(do_not_specialize=["temperature_ptr"])
def sample_mass_kernel(
    logits_ptr,
    temperature_ptr,
    peaks_ptr,
    state_ptr,
    masses_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        peak, _ = row_peak(peaks_ptr, row, CHUNKS, CHUNKS_BLOCK)
        cols = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
        x = load_logits(logits_ptr, row, row_stride, cols, VOCAB)
        masses = _kept_masses(x, cols, peak, temperature, state_ptr, row, VOCAB)
        tl.store(masses_ptr + row * CHUNKS + chunk, tl.sum(masses, 0))


# One program owns one row: finds the chunk of its token, then the token.
@triton.jit(do_not_specialize=["temperature_ptr", "seed_ptr", "offset_ptr", "tokens_ptr", "logprobs_ptr"])
def sample_draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    offset_ptr,
    tokens_ptr,
    logprobs_ptr,
    peaks_ptr,
    state_ptr,
    masses_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    peak, total = row_peak(peaks_ptr, row, CHUNKS, CHUNKS_BLOCK)
    chunks = tl.arange(0, CHUNKS_BLOCK)  # [CHUNKS_BLOCK]
    exists = chunks < CHUNKS
    bar = tl.full([], 0, tl.int64)
    if temperature > 0:
        masses = tl.load(masses_ptr + row * CHUNKS + chunks, mask=exists, other=0)
        number = tl.rand(tl.load(seed_ptr + row), tl.load(offset_ptr + row).to(tl.int32))
        bar = (number.to(tl.float64) * tl.sum(masses, 0).to(tl.float64)).to(tl.int64)
        passed = exists & (tl.cumsum(masses, 0) <= bar)
        bar -= tl.sum(tl.where(passed, masses, 0), 0)
        chunk = tl.minimum(tl.sum(passed.to(tl.int32), 0), CHUNKS - 1)
    else:
        peaks = tl.load(peaks_ptr + row * 2 * CHUNKS + chunks, mask=exists, other=float("-inf"))
        chunk = tl.min(tl.where(exists & (peaks == peak), chunks, CHUNKS - 1), 0)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    x = load_logits(logits_ptr, row, row_stride, cols, VOCAB)
    if temperature > 0:
        passed = tl.cumsum(_kept_masses(x, cols, peak, temperature, state_ptr, row, VOCAB), 0) <= bar
    else:
        passed = x < peak
    token = tl.min(tl.where(passed, VOCAB - 1, cols), 0)
    token = tl.where(total == total, tl.minimum(token, VOCAB - 1), 0)  # a row with NaN or no finite peak: token 0
    chosen = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(total == total, chosen - peak - tl.log(total), float("nan")))


def _capacity(vocab_size: int) -> int:
    """Room for the keys near a row's thresholds: up to one for each token, in whole tiles."""
    return ceil_div(vocab_size, filters.TILE) * filters.TILE


def _parts(num_rows: int, vocab_size: int, chunks: int) -> list[tuple[torch.dtype, int]]:
    """The tensors in a workspace: keys near the thresholds, sums by octave, masses and peaks of chunks, rows' state."""
    return [
        (torch.int32, num_rows * _capacity(vocab_size)),
        (torch.int64, num_rows * 2 * filters.OCTAVES),
        (torch.int64, num_rows * chunks),
        (torch.float32, num_rows * 2 * chunks),
        (torch.int32, num_rows * 2),
    ]


def _aligned(dtype: torch.dtype, count: int) -> int:
    """Elements of int64 that hold `count` of dtype and end at a multiple of 16 bytes."""
    return ceil_div(count * dtype.itemsize, 16) * 2


def _plan(logits: Tensor) -> tuple[heuristics.SampleLaunch, int, list[tuple[torch.dtype, int]], int]:
    """The launch, chunks of a row, parts of the workspace, and its elements of int64."""
    num_rows, vocab_size = logits.shape
    launch = tuning.sample(logits.device, vocab_size=vocab_size, itemsize=logits.element_size())
    chunks = ceil_div(vocab_size, launch.block)
    parts = _parts(num_rows, vocab_size, chunks)
    return launch, chunks, parts, sum(_aligned(*part) for part in parts)


def workspace_size(logits: Tensor) -> int:
    """Elements of int64 that `sample` needs for logits [B, V]: about V / 2 for each row."""
    return _plan(logits)[3]


@launcher
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
) -> list[KernelCall]:
    """See kernels.sample."""
    check_kernel_dtype("logits", logits)
    num_rows, vocab_size = logits.shape
    if vocab_size > LARGEST_VOCAB:
        raise ValueError(f"logits has V={vocab_size}; legal for the Triton kernel: up to {LARGEST_VOCAB}")
    launch, chunks, parts, size = _plan(logits)
    workspace = scratch(workspace, size, torch.int64, logits.device, "logits")
    if not num_rows:
        return []
    views, start = [], 0
    for dtype, count in parts:
        end = start + _aligned(dtype, count)
        views.append(workspace[start:end].view(dtype))
        start = end
    candidates, octaves, masses, peaks, state = views
    capacity = _capacity(vocab_size)
    grid = (num_rows, chunks)
    row_stride = logits.stride(0)
    options = {"num_warps": launch.num_warps, **overlapping(logits.device)}
    numbers = {"VOCAB": vocab_size, "CHUNK": launch.block, "CHUNKS": chunks, **options}
    blocks = numbers | {"CHUNKS_BLOCK": power_of_2(chunks)}
    return [
        KernelCall(
            sample_peak_kernel,
            grid,
            logits_ptr=logits,
            peaks_ptr=peaks,
            octaves_ptr=octaves,
            state_ptr=state,
            row_stride=row_stride,
            OCTAVES=filters.OCTAVES,
            **numbers,
        ),
        KernelCall(
            filters.sample_octave_kernel,
            grid,
            logits_ptr=logits,
            temperature_ptr=temperature,
            top_k_ptr=top_k,
            top_p_ptr=top_p,
            peaks_ptr=peaks,
            octaves_ptr=octaves,
            row_stride=row_stride,
            LANE=filters.LANE,
            OCTAVES=filters.OCTAVES,
            GROUP=filters.GROUP,
            **blocks,
        ),
        KernelCall(
            filters.sample_collect_kernel,
            grid,
            logits_ptr=logits,
            temperature_ptr=temperature,
            top_k_ptr=top_k,
            top_p_ptr=top_p,
            peaks_ptr=peaks,
            octaves_ptr=octaves,
            state_ptr=state,
            candidates_ptr=candidates,
            row_stride=row_stride,
            OCTAVES=filters.OCTAVES,
            CAPACITY=capacity,
            **blocks,
        ),
        KernelCall(
            filters.sample_threshold_kernel,
            (num_rows,),
            temperature_ptr=temperature,
            top_k_ptr=top_k,
            top_p_ptr=top_p,
            min_p_ptr=min_p,
            octaves_ptr=octaves,
            state_ptr=state,
            candidates_ptr=candidates,
            VOCAB=vocab_size,
            OCTAVES=filters.OCTAVES,
            PIVOTS=filters.PIVOTS,
            TILE=filters.TILE,
            CAPACITY=capacity,
            **options,
        ),
        KernelCall(
            sample_mass_kernel,
            grid,
            logits_ptr=logits,
            temperature_ptr=temperature,
            peaks_ptr=peaks,
            state_ptr=state,
            masses_ptr=masses,
            row_stride=row_stride,
            **blocks,
        ),
        KernelCall(
            sample_draw_kernel,
            (num_rows,),
            logits_ptr=logits,
            temperature_ptr=temperature,
            seed_ptr=seed,
            offset_ptr=offset,
            tokens_ptr=tokens,
            logprobs_ptr=logprobs,
            peaks_ptr=peaks,
            state_ptr=state,
            masses_ptr=masses,
            row_stride=row_stride,
            **blocks,
        ),
    ]
