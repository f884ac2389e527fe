"""The least key that top-k, top-p and min-p keep of each row, found without sorting, in three launches.

`octave` counts a row's tokens and sums their masses by power of two of the weight. That leaves few octaves that can
hold a threshold: `collect` copies their keys, and `threshold` searches those, a few thresholds in each pass. Rows with
neither top-k nor top-p skip all of this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllama.kernels.triton.overlap import follow
from fastllama.kernels.triton.sampling.masses import ONE, WHOLE, keys_of, load_logits, mantissas_of, masses_of, row_peak

OCTAVES = 32  # powers of two that are distinguished; weights below 2^-30 share the first
LANE = 8  # neighbours that `sample_octave_kernel` sums in 32 bits: 8 masses of 24 bits and their number
GROUP = 4  # octaves that it sums at a time: more do not stay in registers
PIVOTS = 8  # thresholds tried in a pass over the candidates
TILE = 1024  # candidates read at a time

_QUAD = tl.constexpr(4)  # candidates that a thread reads at once: 128 bits
_LEAST = tl.constexpr(96)  # biased exponent of the first octave's weights, from 2^-31 on


@triton.jit
def _limits_count(top_k, VOCAB: tl.constexpr):
    return (top_k > 0) & (top_k < VOCAB)


@triton.jit
def _share(top_p, mass):
    """The least integer that is at least top_p * mass, and at least 1."""
    exact = top_p.to(tl.float64) * mass.to(tl.float64)
    whole = exact.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < exact).to(tl.int64), 1)


@triton.jit
def _octave_bounds(counts, masses, top_k, top_p, VOCAB: tl.constexpr, OCTAVES: tl.constexpr):
    """The first and the last octave [OCTAVES] in which a token can be the last that top-k or top-p keeps."""
    octave = tl.arange(0, OCTAVES)
    counts_from = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # from an octave upwards
    masses_from = tl.sum(masses, 0) - tl.cumsum(masses, 0) + masses
    by_count = _limits_count(top_k, VOCAB)
    first = tl.max(tl.where(counts_from >= top_k, octave, 0), 0)
    # Top-k keeps at least all tokens above its octave, whose mass bounds the octave in which top-p can end:
    least = tl.sum(tl.where(by_count & (octave <= first), 0, masses), 0)
    last = tl.max(tl.where(masses_from >= _share(top_p, least), octave, 0), 0)
    last = tl.where(top_p < 1, last, first)
    return tl.where(by_count, first, last), last


# One program owns one chunk of one row: adds its tokens and masses by octave to the row's.
@triton.jit(do_not_specialize=["temperature_ptr", "top_k_ptr", "top_p_ptr"])
def sample_octave_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    peaks_ptr,
    octaves_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    OCTAVES: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if (temperature > 0) & (_limits_count(top_k, VOCAB) | (tl.load(top_p_ptr + row) < 1)):
        peak, _ = row_peak(peaks_ptr, row, CHUNKS, CHUNKS_BLOCK)
        # Lanes come first: a tile's last dimension is spread over threads, and a lane is one thread's.
        cols = tl.arange(0, LANE)[:, None] + tl.arange(0, CHUNK // LANE)[None, :] * LANE
        cols += tl.program_id(1) * CHUNK  # [LANE, CHUNK / LANE]
        inside = cols < VOCAB
        x = load_logits(logits_ptr, row, row_stride, cols, VOCAB)
        keys = keys_of(x, peak, temperature)
        octave = tl.where(inside, tl.maximum((keys >> 23) - _LEAST, 0), -1)
        octaves = tl.max(tl.max(octave, 0), 0) + 1  # that occur in this chunk
        # Mass and number of a lane's tokens in 27 and 4 bits, of a chunk's in 40 and 16. Within an octave all masses
        # need one shift (none in those below 2^-21), which can wait until they are added.
        bits, _ = mantissas_of(keys)
        units = (bits + (1 << 27))[:, None, :]
        for first in range(0, octaves, GROUP):
            each = first + tl.arange(0, GROUP)  # [GROUP]
            lanes = tl.sum(tl.where(octave[:, None, :] == each[None, :, None], units, 0), 0)  # [GROUP, CHUNK / LANE]
            sums = tl.sum((lanes & 0x7FFFFFF).to(tl.int64) + ((lanes >> 27).to(tl.int64) << 40), 1)  # [GROUP]
            masses = (sums & 0xFFFFFFFFFF) << tl.maximum(each + (_LEAST - WHOLE), 0).to(tl.int64)
            row_octaves_ptr = octaves_ptr + row * 2 * OCTAVES + each
            tl.atomic_add(row_octaves_ptr, sums >> 40, mask=sums > 0, sem="relaxed")  # read by later launches alone
            tl.atomic_add(row_octaves_ptr + OCTAVES, masses, mask=masses > 0, sem="relaxed")


# One program owns one chunk of one row: appends its keys in the octaves of the thresholds to the row's candidates.
@triton.jit(do_not_specialize=["temperature_ptr", "top_k_ptr", "top_p_ptr"])
def sample_collect_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    peaks_ptr,
    octaves_ptr,
    state_ptr,
    candidates_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    OCTAVES: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if (temperature > 0) & (_limits_count(top_k, VOCAB) | (top_p < 1)):
        peak, _ = row_peak(peaks_ptr, row, CHUNKS, CHUNKS_BLOCK)
        each = octaves_ptr + row * 2 * OCTAVES + tl.arange(0, OCTAVES)
        first, last = _octave_bounds(tl.load(each), tl.load(each + OCTAVES), top_k, top_p, VOCAB, OCTAVES)
        cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
        inside = cols < VOCAB
        x = load_logits(logits_ptr, row, row_stride, cols, VOCAB)
        keys = keys_of(x, peak, temperature)
        octave = tl.maximum((keys >> 23) - _LEAST, 0)
        chosen = inside & (octave >= first) & (octave <= last)
        place = tl.cumsum(chosen.to(tl.int32), 0)  # [CHUNK], from 1
        count = tl.sum(chosen.to(tl.int32), 0)
        if count > 0:
            start = tl.atomic_add(state_ptr + row * 2, count, sem="relaxed")
            tl.store(candidates_ptr + row * CAPACITY + start + place - 1, keys, mask=chosen)


@triton.jit
def _sum_from(candidates_ptr, count, thresholds, BY_MASS: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr):
    """Number, or mass, of the candidates at or above each threshold [PIVOTS]."""
    # Each thread sums on its own until the end; counts in 32 bits, because 8 more registers would spill.
    quads = tl.arange(0, _QUAD)[:, None] + tl.arange(0, TILE // _QUAD)[None, :] * _QUAD  # [QUAD, TILE / QUAD]
    sums = tl.zeros([PIVOTS, TILE // _QUAD], tl.int64 if BY_MASS else tl.int32)
    for start in range(0, count, TILE):
        place = start + quads
        keys = tl.where(place < count, tl.load(candidates_ptr + place), -1)  # whole tiles need no mask
        chosen = keys[:, None, :] >= thresholds[None, :, None]  # [QUAD, PIVOTS, TILE / QUAD]
        if BY_MASS:
            sums += tl.sum(tl.where(chosen, masses_of(keys)[:, None, :], 0), 0)
        else:
            sums += tl.sum(chosen.to(tl.int32), 0)
    return tl.sum(sums, 1)


@triton.jit
def _largest_enough(
    candidates_ptr,
    count,
    low,
    high,
    need,
    BY_MASS: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest threshold in [low, high) at which the candidates reach `need`; at `low` they do."""
    pivot = tl.arange(0, PIVOTS)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        thresholds = low + (pivot + 1) * step  # [PIVOTS]
        sums = _sum_from(candidates_ptr, count, thresholds, BY_MASS, PIVOTS, TILE)
        passed = tl.sum(((sums >= need) & (thresholds < high)).to(tl.int32), 0)
        high = tl.minimum(high, low + (passed + 1) * step)
        low = low + passed * step
    return low


# One program owns one row: the least key that every filter keeps.
@triton.jit(do_not_specialize=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"])
def sample_threshold_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    octaves_ptr,
    state_ptr,
    candidates_ptr,
    VOCAB: tl.constexpr,
    OCTAVES: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    by_count = _limits_count(top_k, VOCAB)
    if tl.load(temperature_ptr + row) > 0:
        # The largest weight is 1, so min_p is itself the least weight; its bits order as integers.
        least = tl.minimum(tl.maximum(tl.load(min_p_ptr + row), 0.0), 1.0).to(tl.int32, bitcast=True)
        if by_count | (top_p < 1):
            octave = tl.arange(0, OCTAVES)
            counts = tl.load(octaves_ptr + row * 2 * OCTAVES + octave)
            masses = tl.load(octaves_ptr + row * 2 * OCTAVES + OCTAVES + octave)
            first, last = _octave_bounds(counts, masses, top_k, top_p, VOCAB, OCTAVES)
            low = tl.where(first > 0, (first + _LEAST) << 23, 0)
            high = tl.minimum((last + _LEAST + 1) << 23, ONE + 1)
            above = octave > last
            row_candidates_ptr = candidates_ptr + row * CAPACITY
            count = tl.load(state_ptr + row * 2)
            kept = tl.sum(masses, 0)
            if by_count:
                need = top_k - tl.sum(tl.where(above, counts, 0), 0)
                low = _largest_enough(row_candidates_ptr, count, low, high, need, False, PIVOTS, TILE)
                from_low = _sum_from(row_candidates_ptr, count, low + tl.zeros([1], tl.int32), True, 1, TILE)
                kept = tl.sum(tl.where(above, masses, 0), 0) + tl.sum(from_low, 0)
            if top_p < 1:
                need = _share(top_p, kept) - tl.sum(tl.where(above, masses, 0), 0)
                low = _largest_enough(row_candidates_ptr, count, low, high, need, True, PIVOTS, TILE)
            least = tl.maximum(least, low)
        tl.store(state_ptr + row * 2 + 1, least)
