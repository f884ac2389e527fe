"""Faults planted in the sampling kernels."""

from __future__ import annotations

from tests.kernels.triton.planted import mutant

GREEDY = "ops/test_sampling.py::test_greedy_takes_the_first_largest"
LOGPROBS = "ops/test_sampling.py::test_logprobs_are_those_of_the_logits_as_given"
LARGE = "ops/test_sampling.py::test_every_filter_on_a_large_vocabulary[3-torch.float32-triton]"
NUMBERS = "ops/test_sampling.py::test_a_number_is_that_of_the_rows_seed_and_offset"
TIES = "ops/test_sampling.py::test_ties_of_the_largest_are_kept_together"
INVALID = "ops/test_sampling.py::test_a_row_that_is_no_distribution_gives_token_0_and_nan"
EXTREME = "ops/test_sampling.py::test_extreme_logits"
MASKED = "ops/test_sampling.py::test_a_large_vocabulary_of_which_most_is_masked"
STRIDED = "ops/test_sampling.py::test_strided_logits_and_given_outputs"
WORKSPACE = "triton/sampling/test_draw.py::test_a_workspace_holds_anything_before"
LEAST = "triton/sampling/test_draw.py::test_the_least_likely_token_that_is_kept"
NEIGHBOURS, FEW, MANY = (f"{LEAST}[{name}]" for name in ("neighbours in fp32", "few octaves", "many octaves"))
MOST_BELOW = f"{LEAST}[most below the octaves]"
EDGES = "triton/sampling/test_draw.py::test_a_number_at_the_edge_of_a_token_is_the_next_ones"
PASSES = "triton/sampling/test_draw.py::test_a_row_pays_for_what_it_asks"
FAR_ROWS = "triton/sampling/test_draw.py::test_rows_past_two_to_the_31_elements"
WEIGHTS_MUTANTS = [
    mutant("logits past the vocabulary", "sampling/masses", "mask=cols < VOCAB", "mask=cols <= VOCAB", STRIDED),
    mutant("zeros past the vocabulary", "sampling/masses", 'other=float("-inf")).to', "other=0.0).to", GREEDY),
    mutant("peak among sums", "sampling/masses", "chunk < CHUNKS, other=float", "chunk <= CHUNKS, other=float", FEW),
    mutant("sums at their chunks' peaks", "sampling/masses", "sums * tl.exp(peaks - peak)", "sums", MASKED),
    mutant("powers of 2 for those of e", "sampling/masses", "1.4426950408889634", "1.0", LARGE),
    mutant(
        "heat without limits",
        "sampling/masses",
        "tl.minimum(tl.maximum(temperature, 7.5e-37), 1.2e38)\n    return tl.minimum(tl.exp2((x - peak) * scale), 1.0)",
        "temperature\n    return tl.exp2((x - peak) * scale)",
        EXTREME,
    ),
    mutant("no leading bit", "sampling/masses", " | 0x800000", "", LARGE),
    mutant("bits below 2^-44", "sampling/masses", "tl.maximum(-shift, 0)", "0", MOST_BELOW),
    mutant(
        "32-bit masses",
        "sampling/masses",
        "bits.to(tl.int64) << shift.to(tl.int64)",
        "(bits << shift).to(tl.int64)",
        LARGE,
    ),
    mutant("32-bit rows", "sampling/masses", "row * row_stride", "row.to(tl.int32) * row_stride", FAR_ROWS),
]
FILTERS_MUTANTS = [
    mutant("top-k of 0 is one", "sampling/filters", "(top_k > 0)", "(top_k >= 0)", PASSES),
    mutant(
        "counts above an octave",
        "sampling/filters",
        "tl.cumsum(counts, 0) + counts",
        "tl.cumsum(counts, 0)",
        NEIGHBOURS,
    ),
    mutant(
        "masses above an octave",
        "sampling/filters",
        "tl.cumsum(masses, 0) + masses",
        "tl.cumsum(masses, 0)",
        NEIGHBOURS,
    ),
    mutant(
        "top-p's octave without top-k",
        "sampling/filters",
        "by_count & (octave <= first), 0, masses",
        "False, 0, masses",
        MANY,
    ),
    mutant(
        "highest octave left out",
        "sampling/filters",
        "tl.max(tl.max(octave, 0), 0) + 1",
        "tl.max(tl.max(octave, 0), 0)",
        MANY,
    ),
    mutant("a lane's masses overflow", "sampling/filters", "LANE = 8", "LANE = 16", FEW),
    mutant("a chunk's masses cut", "sampling/filters", "0xFFFFFFFFFF)", "0xFFFFFFFF)", FEW),
    mutant(
        "counts not added", "sampling/filters", "atomic_add(row_octaves_ptr, sums", "store(row_octaves_ptr, sums", FEW
    ),
    mutant("last octave not collected", "sampling/filters", "(octave <= last)", "(octave < last)", NEIGHBOURS),
    mutant("padding collected", "sampling/filters", "chosen = inside & (octave", "chosen = (octave", MOST_BELOW),
    mutant("candidates overlap", "sampling/filters", "start = tl.atomic_add(", "start = 0 * tl.atomic_add(", FEW),
    mutant("candidates one place late", "sampling/filters", "start + place - 1", "start + place", NEIGHBOURS),
    mutant(
        "more candidates than there are",
        "sampling/filters",
        "tl.where(place < count, tl.load(candidates_ptr + place), -1)",
        "tl.load(candidates_ptr + place)",
        NEIGHBOURS,
    ),
    mutant("a threshold's own key left out", "sampling/filters", ">= thresholds[", "> thresholds[", NEIGHBOURS),
    mutant("search ends early", "sampling/filters", "while high - low > 1", "while high - low > 2", NEIGHBOURS),
    mutant(
        "first octave cut",
        "sampling/filters",
        "tl.where(first > 0, (first + _LEAST) << 23, 0)",
        "_LEAST << 23",
        MOST_BELOW,
    ),
    mutant(
        "top-k from the octave on",
        "sampling/filters",
        "top_k - tl.sum(tl.where(above, counts, 0), 0)",
        "top_k",
        NEIGHBOURS,
    ),
    mutant(
        "top-p from the octave on",
        "sampling/filters",
        "(top_p, kept) - tl.sum(tl.where(above, masses, 0), 0)",
        "(top_p, kept)",
        MANY,
    ),
    mutant("top-p of all", "sampling/filters", "kept = tl.sum(tl.where(above", "_ = tl.sum(tl.where(above", NEIGHBOURS),
    mutant("min-p forgotten", "sampling/filters", "tl.maximum(least, low)", "low", MANY),
    mutant(
        "32-bit rows appended",
        "sampling/filters",
        "row * CAPACITY + start",
        "row.to(tl.int32) * CAPACITY + start",
        FAR_ROWS,
    ),
    mutant("32-bit rows read", "sampling/filters", "row * CAPACITY\n", "row.to(tl.int32) * CAPACITY\n", FAR_ROWS),
]
SAMPLING_MUTANTS = [
    mutant("a chunk of -inf", "sampling/draw", 'tl.where(peak == float("-inf"), 0.0, peak)', "peak", MASKED),
    mutant("octaves not cleared", "sampling/draw", "tl.store(octaves_ptr", "pass  # ", WORKSPACE),
    mutant("state not cleared", "sampling/draw", "tl.store(state_ptr", "pass  # ", WORKSPACE),
    mutant("the least key left out", "sampling/draw", "(keys >= tl.load", "(keys > tl.load", TIES),
    mutant(
        "greedy rows weighed",
        "sampling/draw",
        "if temperature > 0:\n        peak",
        "if temperature >= 0:\n        peak",
        PASSES,
    ),
    mutant(
        "64-bit counter",
        "sampling/draw",
        "tl.load(offset_ptr + row).to(tl.int32)",
        "tl.load(offset_ptr + row)",
        NUMBERS,
    ),
    mutant("32-bit seed", "sampling/draw", "tl.load(seed_ptr + row)", "tl.load(seed_ptr + row).to(tl.int32)", NUMBERS),
    mutant("first row's seed", "sampling/draw", "tl.load(seed_ptr + row)", "tl.load(seed_ptr)", NUMBERS),
    mutant(
        "32-bit share",
        "sampling/draw",
        "* tl.sum(masses, 0).to(tl.float64)).to",
        "* tl.sum(masses, 0)).to(tl.float32).to",
        EDGES,
    ),
    mutant("number at a chunk's end", "sampling/draw", "cumsum(masses, 0) <= bar", "cumsum(masses, 0) < bar", EDGES),
    mutant("number at a token's end", "sampling/draw", "VOCAB), 0) <= bar", "VOCAB), 0) < bar", EDGES),
    mutant("number not within the chunk", "sampling/draw", "bar -= tl.sum(", "tl.sum(", EDGES),
    mutant(
        "last of the largest chunks",
        "sampling/draw",
        "chunk = tl.min(tl.where(exists & (peaks == peak), chunks, CHUNKS - 1)",
        "chunk = tl.max(tl.where(exists & (peaks == peak), chunks, 0)",
        MASKED,
    ),
    mutant("past the largest", "sampling/draw", "passed = x < peak", "passed = x <= peak", GREEDY),
    mutant(
        "NaN sampled from",
        "sampling/draw",
        "tl.where(total == total, tl.minimum(token, VOCAB - 1), 0)",
        "tl.minimum(token, VOCAB - 1)",
        INVALID,
    ),
    mutant("logprob below the peak", "sampling/draw", "chosen - peak - tl.log(total)", "chosen - peak", LOGPROBS),
    mutant(
        "logprob of the logit", "sampling/draw", "chosen - peak - tl.log(total)", "chosen - tl.log(total)", LOGPROBS
    ),
    mutant(
        "32-bit row of the token",
        "sampling/draw",
        "row * row_stride + token",
        "row.to(tl.int32) * row_stride + token",
        FAR_ROWS,
    ),
    mutant("parts of the workspace overlap", "sampling/draw", "        start = end\n", "", MANY),
]
