"""Faults planted in the Triton kernels, each of which some test must find.

python -m fastllama.testing.mutants tests/kernels/triton/mutants.py
"""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.attention_mutants import ATTENTION_MUTANTS, QUANTIZED_MUTANTS
from tests.kernels.triton.compiled_mutants import COMPILED_MUTANTS
from tests.kernels.triton.int4_mutants import INT4_MUTANTS
from tests.kernels.triton.int8_mutants import INT8_MUTANTS
from tests.kernels.triton.matmul_mutants import MATMUL_MUTANTS
from tests.kernels.triton.planted import KERNELS, mutant
from tests.kernels.triton.w8a8_mutants import W8A8_MUTANTS

NORM = "triton/test_norm.py::test_several_rows_of_one_program"
NORM_OPS = "test_norm.py"
SILU = "test_swiglu.py"
ROPE = "test_rope.py::test_rope"
PASSED = "test_rope.py::test_what_is_not_rotated_passes_through_whatever_it_is"
WRITE = "test_rope.py::test_rope_and_write_kv"
CODES = "test_quantized_pages.py::test_codes_are_the_nearest"
EVEN = "test_quantized_pages.py::test_ties_go_to_the_even_code"
TINY = "test_quantized_pages.py::test_a_head_of_zeros_or_of_tiny_values"
NOT_FINITE = "test_quantized_pages.py::test_what_is_not_finite_reads_back_as_nan_in_its_head_alone"
FAR = "triton/test_launchers.py::test_rows_past_two_to_the_31_elements"
FAR_POOL = "triton/test_launchers.py::test_a_pool_past_two_to_the_31_elements"
GREEDY = "test_sampling.py::test_greedy_takes_the_first_largest"
LOGPROBS = "test_sampling.py::test_logprobs_are_those_of_the_logits_as_given"
LARGE = "test_sampling.py::test_every_filter_on_a_large_vocabulary[3-torch.float32-triton]"
NUMBERS = "test_sampling.py::test_a_number_is_that_of_the_rows_seed_and_offset"
TIES = "test_sampling.py::test_ties_of_the_largest_are_kept_together"
INVALID = "test_sampling.py::test_a_row_that_is_no_distribution_gives_token_0_and_nan"
EXTREME = "test_sampling.py::test_extreme_logits"
MASKED = "test_sampling.py::test_a_large_vocabulary_of_which_most_is_masked"
STRIDED = "test_sampling.py::test_strided_logits_and_given_outputs"
LEAST = "triton/test_sampling.py::test_the_least_likely_token_that_is_kept"
NEIGHBOURS, FEW, MANY = (f"{LEAST}[{name}]" for name in ("neighbours in fp32", "few octaves", "many octaves"))
MOST_BELOW = f"{LEAST}[most below the octaves]"
EDGES = "triton/test_sampling.py::test_a_number_at_the_edge_of_a_token_is_the_next_ones"
WORKSPACE = "triton/test_sampling.py::test_a_workspace_holds_anything_before"
PASSES = "triton/test_sampling.py::test_a_row_pays_for_what_it_asks"
FAR_ROWS = "triton/test_sampling.py::test_rows_past_two_to_the_31_elements"

NORM_MUTANTS = [
    mutant("rows past the end", "norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows + 9) & (col < SIZE)", NORM),
    mutant("columns past the end", "norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows) & (col < BLOCK)", NORM),
    mutant("mean over the padded row", "norm", "/ SIZE + eps", "/ BLOCK + eps", NORM),
    mutant("eps forgotten", "norm", "/ SIZE + eps", "/ SIZE", NORM_OPS),
    mutant("weight meets an unrounded value", "norm", "(x * scale).to(dtype).to(tl.float32)", "x * scale", NORM_OPS),
    mutant("sum normalised before it is rounded", "norm", "x = total.to(tl.float32)", "x += 0.0", NORM),
    mutant("residual left out", "norm", "        x += tl.load(residual_ptr", "        tl.load(residual_ptr", NORM),
    mutant("32-bit rows", "norm", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", FAR),
]
SWIGLU_MUTANTS = [
    mutant("sigmoid of -gate", "swiglu", "tl.exp(-gate)", "tl.exp(gate)", SILU),
    mutant("up at the block's end", "swiglu", "gate_ptrs + SIZE", "gate_ptrs + BLOCK", SILU),
    mutant("columns past the end", "swiglu", "col < SIZE", "col < BLOCKS * BLOCK", SILU),
    mutant(
        "silu rounded too",
        "swiglu",
        "gate / (1.0 + tl.exp(-gate)) * up",
        "(gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32) * up",
        SILU,
    ),
    mutant("32-bit rows", "swiglu", "(tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS", FAR),
]
ROPE_MUTANTS = [
    mutant("turned the other way", "heads", "first * cos - second * sin", "first * cos + second * sin", ROPE),
    mutant("neighbours swapped", "heads", "tl.join(first, second)", "tl.join(second, first)", ROPE),
    mutant("sines are cosines", "heads", "angles_ptr + ROTARY // 2 + pair", "angles_ptr + pair", ROPE),
    mutant("0 * inf in what passes", "heads", "    if ROTARY < HEAD_DIM:  # sin", "    if False:  # sin", PASSED),
    mutant(
        "odd heads cut", "heads", "mask & (other_dim < HEAD_DIM), other=0.0)", "mask & (pair < 2), other=0.0)", ROPE
    ),
    mutant(
        "heads past the end",
        "rope",
        "mask = head < NUM_HEADS  # [HEADS, 1]\n    first, second = load_pairs(x_ptr, head * X",
        "mask = head < NUM_HEADS + 1\n    first, second = load_pairs(x_ptr, head * X",
        ROPE,
    ),
    mutant(
        "32-bit tokens",
        "rope",
        "+ 2 * KV_BLOCKS\n    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64)",
        "+ 2 * KV_BLOCKS\n    token, block = tl.program_id(0) // BLOCKS",
        FAR,
    ),
    mutant(
        "32-bit slots",
        "rope",
        "slot = tl.load(slots_ptr + token).to(tl.int64)",
        "slot = tl.load(slots_ptr + token).to(tl.int32)",
        FAR_POOL,
    ),
    mutant("padding written", "rope", "    elif slot >= 0:", "    else:", WRITE),
    mutant("values turned", "rope", "                False,\n", "                True,\n", WRITE),
    mutant(
        "pages taken for contiguous",
        "rope",
        "page * STRIDES[0] + head * STRIDES[1] + place * STRIDES[2]",
        "((page * NUM_HEADS + head) * PAGE_SIZE + place) * HEAD_DIM",
        WRITE,
    ),
    mutant(
        "keys in the pages of values", "rope", "                v_pages_ptr,", "                k_pages_ptr,", WRITE
    ),
]
QUANTIZE_MUTANTS = [
    mutant("codes truncated", "quantize", "(x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)", "x.to(tl.int8)", CODES),
    mutant("ties upwards", "quantize", "((magnitude >> 20) & 1)", "1", EVEN),
    mutant("no small codes", "quantize", "tl.where(magnitude < (121 << 23), small, normal)", "normal", EVEN),
    mutant("sign lost", "quantize", " | ((bits >> 24) & 0x80)", "", EVEN),
    mutant(
        "half a head's maximum",
        "quantize",
        "tl.maximum(magnitude_bits(first), magnitude_bits(second))",
        "magnitude_bits(first)",
        CODES,
    ),
    mutant("infinity scaled", "quantize", 'finite = absmax < float("inf")', "finite = absmax > 0.0", NOT_FINITE),
    mutant("zeros without a scale", "quantize", "(127 - 100) << 23", "0", TINY),
]
WEIGHTS_MUTANTS = [
    mutant("logits past the vocabulary", "weights", "mask=cols < VOCAB", "mask=cols <= VOCAB", STRIDED),
    mutant("zeros past the vocabulary", "weights", 'other=float("-inf")).to', "other=0.0).to", GREEDY),
    mutant("peak among sums", "weights", "chunk < CHUNKS, other=float", "chunk <= CHUNKS, other=float", FEW),
    mutant("sums at their chunks' peaks", "weights", "sums * tl.exp(peaks - peak)", "sums", MASKED),
    mutant("powers of 2 for those of e", "weights", "1.4426950408889634", "1.0", LARGE),
    mutant(
        "heat without limits",
        "weights",
        "tl.maximum(temperature, 7.5e-37)\n    return tl.minimum(tl.exp2((x - peak) * scale), 1.0)",
        "temperature\n    return tl.exp2((x - peak) * scale)",
        EXTREME,
    ),
    mutant("no leading bit", "weights", " | 0x800000", "", LARGE),
    mutant("bits below 2^-44", "weights", "tl.maximum(-shift, 0)", "0", MOST_BELOW),
    mutant(
        "32-bit masses", "weights", "bits.to(tl.int64) << shift.to(tl.int64)", "(bits << shift).to(tl.int64)", LARGE
    ),
    mutant("32-bit rows", "weights", "row * row_stride", "row.to(tl.int32) * row_stride", FAR_ROWS),
]
FILTERS_MUTANTS = [
    mutant("top-k of 0 is one", "filters", "(top_k > 0)", "(top_k >= 0)", PASSES),
    mutant("counts above an octave", "filters", "tl.cumsum(counts, 0) + counts", "tl.cumsum(counts, 0)", NEIGHBOURS),
    mutant("masses above an octave", "filters", "tl.cumsum(masses, 0) + masses", "tl.cumsum(masses, 0)", NEIGHBOURS),
    mutant(
        "top-p's octave without top-k", "filters", "by_count & (octave <= first), 0, masses", "False, 0, masses", MANY
    ),
    mutant(
        "highest octave left out", "filters", "tl.max(tl.max(octave, 0), 0) + 1", "tl.max(tl.max(octave, 0), 0)", MANY
    ),
    mutant("a lane's masses overflow", "filters", "LANE = 8", "LANE = 16", FEW),
    mutant("a chunk's masses cut", "filters", "0xFFFFFFFFFF)", "0xFFFFFFFF)", FEW),
    mutant("counts not added", "filters", "atomic_add(row_octaves_ptr, sums", "store(row_octaves_ptr, sums", FEW),
    mutant("last octave not collected", "filters", "(octave <= last)", "(octave < last)", NEIGHBOURS),
    mutant("padding collected", "filters", "chosen = inside & (octave", "chosen = (octave", MOST_BELOW),
    mutant("candidates overlap", "filters", "start = tl.atomic_add(", "start = 0 * tl.atomic_add(", FEW),
    mutant("candidates one place late", "filters", "start + place - 1", "start + place", NEIGHBOURS),
    mutant(
        "more candidates than there are",
        "filters",
        "tl.where(place < count, tl.load(candidates_ptr + place), -1)",
        "tl.load(candidates_ptr + place)",
        NEIGHBOURS,
    ),
    mutant("a threshold's own key left out", "filters", ">= thresholds[", "> thresholds[", NEIGHBOURS),
    mutant("search ends early", "filters", "while high - low > 1", "while high - low > 2", NEIGHBOURS),
    mutant("first octave cut", "filters", "tl.where(first > 0, (first + _LEAST) << 23, 0)", "_LEAST << 23", MOST_BELOW),
    mutant("top-k from the octave on", "filters", "top_k - tl.sum(tl.where(above, counts, 0), 0)", "top_k", NEIGHBOURS),
    mutant(
        "top-p from the octave on",
        "filters",
        "(top_p, kept) - tl.sum(tl.where(above, masses, 0), 0)",
        "(top_p, kept)",
        MANY,
    ),
    mutant("top-p of all", "filters", "kept = tl.sum(tl.where(above", "_ = tl.sum(tl.where(above", NEIGHBOURS),
    mutant("min-p forgotten", "filters", "tl.maximum(least, low)", "low", MANY),
    mutant(
        "32-bit rows appended", "filters", "row * CAPACITY + start", "row.to(tl.int32) * CAPACITY + start", FAR_ROWS
    ),
    mutant("32-bit rows read", "filters", "row * CAPACITY\n", "row.to(tl.int32) * CAPACITY\n", FAR_ROWS),
]
SAMPLING_MUTANTS = [
    mutant("a chunk of -inf", "sampling", 'tl.where(peak == float("-inf"), 0.0, peak)', "peak", MASKED),
    mutant("octaves not cleared", "sampling", "tl.store(octaves_ptr", "pass  # ", WORKSPACE),
    mutant("state not cleared", "sampling", "tl.store(state_ptr", "pass  # ", WORKSPACE),
    mutant("the least key left out", "sampling", "(keys >= tl.load", "(keys > tl.load", TIES),
    mutant(
        "greedy rows weighed",
        "sampling",
        "if temperature > 0:\n        peak",
        "if temperature >= 0:\n        peak",
        PASSES,
    ),
    mutant(
        "64-bit counter", "sampling", "tl.load(offset_ptr + row).to(tl.int32)", "tl.load(offset_ptr + row)", NUMBERS
    ),
    mutant("32-bit seed", "sampling", "tl.load(seed_ptr + row)", "tl.load(seed_ptr + row).to(tl.int32)", NUMBERS),
    mutant("first row's seed", "sampling", "tl.load(seed_ptr + row)", "tl.load(seed_ptr)", NUMBERS),
    mutant(
        "32-bit share",
        "sampling",
        "* tl.sum(masses, 0).to(tl.float64)).to",
        "* tl.sum(masses, 0)).to(tl.float32).to",
        EDGES,
    ),
    mutant("number at a chunk's end", "sampling", "cumsum(masses, 0) <= bar", "cumsum(masses, 0) < bar", EDGES),
    mutant("number at a token's end", "sampling", "VOCAB), 0) <= bar", "VOCAB), 0) < bar", EDGES),
    mutant("number not within the chunk", "sampling", "bar -= tl.sum(", "tl.sum(", EDGES),
    mutant(
        "last of the largest chunks",
        "sampling",
        "chunk = tl.min(tl.where(exists & (peaks == peak), chunks, CHUNKS - 1)",
        "chunk = tl.max(tl.where(exists & (peaks == peak), chunks, 0)",
        MASKED,
    ),
    mutant("past the largest", "sampling", "passed = x < peak", "passed = x <= peak", GREEDY),
    mutant(
        "NaN drawn from",
        "sampling",
        "tl.where(total == total, tl.minimum(token, VOCAB - 1), 0)",
        "tl.minimum(token, VOCAB - 1)",
        INVALID,
    ),
    mutant("logprob below the peak", "sampling", "chosen - peak - tl.log(total)", "chosen - peak", LOGPROBS),
    mutant("logprob of the logit", "sampling", "chosen - peak - tl.log(total)", "chosen - tl.log(total)", LOGPROBS),
    mutant(
        "32-bit row of the token",
        "sampling",
        "row * row_stride + token",
        "row.to(tl.int32) * row_stride + token",
        FAR_ROWS,
    ),
    mutant("parts of the workspace overlap", "sampling", "        start = end\n", "", MANY),
    mutant(
        "a short workspace is taken", "launching", "workspace.numel() < size", "workspace.numel() < size - 1", WORKSPACE
    ),
]
MERGE = "test_merge.py::test_merge_state"
EXTREMES = "test_merge.py::test_far_apart_far_from_zero_and_without_keys"
NO_KEYS = "test_merge.py::test_a_side_without_keys_leaves_the_other_bit_for_bit"
ANY_STRIDES = "test_merge.py::test_any_strides"
ONCE = "test_merge.py::test_the_sum_is_rounded_once"
MERGE_MUTANTS = [
    mutant("shares swapped", "merge", "a * tl.div_rn(a_weight", "a * tl.div_rn(b_weight", MERGE),
    mutant("weights for shares", "merge", "tl.div_rn(b_weight, total)", "b_weight", MERGE),
    mutant("the first side's peak", "merge", "tl.maximum(a_lse, b_lse)", "a_lse", EXTREMES),
    mutant(
        "peak forgotten", "merge", "tl.exp(a_lse - base), tl.exp(b_lse - base)", "tl.exp(a_lse), tl.exp(b_lse)", MERGE
    ),
    mutant("-inf less -inf", "merge", 'tl.where(peak == float("-inf"), 0.0, peak)', "peak", EXTREMES),
    mutant("noise where nothing was seen", "merge", "tl.where(no_b, 0.0, b)", "b", EXTREMES),
    mutant("a side without keys times 0", "merge", "tl.where(no_b, a, merged)", "merged", EXTREMES),
    mutant("-0 lost", "merge", "tl.where(no_b, a, merged)", "tl.where(no_b, a + 0.0, merged)", NO_KEYS),
    mutant(
        "shares rounded too",
        "merge",
        "a * tl.div_rn(a_weight, total)",
        "a * tl.div_rn(a_weight, total).to(out_ptr.dtype.element_ty).to(tl.float32)",
        ONCE,
    ),
    mutant("log-sum-exp in base 2", "merge", "peak + tl.log(total)", "peak + tl.log2(total)", MERGE),
    mutant("heads past the end", "merge", "used = head < NUM_HEADS", "used = head < NUM_HEADS + 1", MERGE),
    mutant("heads left out", "merge", "ceil_div(num_heads, heads)", "max(num_heads // heads, 1)", MERGE),
    mutant("dimensions past the end", "merge", "(dim < HEAD_DIM)", "(dim < BLOCK_D)", MERGE),
    mutant("one side's strides for both", "merge", "head * B_HEAD_STRIDE", "head * A_HEAD_STRIDE", ANY_STRIDES),
    mutant("log-sum-exps in a row", "merge", "token * a_lse_token_stride", "token * NUM_HEADS", ANY_STRIDES),
    mutant("32-bit tokens", "merge", "(tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS", FAR),
]
REPEATED = ("tests/kernels/triton/test_launching.py",)  # of the compile tier
LAUNCHING_MUTANTS = [
    Mutant(name, f"{KERNELS}/launching.py", old, new, REPEATED, interpreter=False)
    for name, old, new in (
        ("a part of the workspace at its start", "addresses[source] + byte", "addresses[source]"),
        ("any address", "if address % ALIGNMENT:", "if False:"),
        ("a first address that is not aligned", "value.data_ptr() % ALIGNMENT or source[1]", "source[1]"),
        ("an address of what is not specialised on", "addresses[: len(aligned)]", "addresses"),
        ("a part aligned by chance", " or source[1] % ALIGNMENT", ""),
        (
            "memory of others",
            "0 <= (distance := address - arg.data_ptr())",
            "-(1 << 60) < (distance := address - arg.data_ptr())",
        ),
        ("memory past the workspace", "< max(arg.nbytes, 1)", "< 1 << 60"),
    )
]
MUTANTS = [
    *NORM_MUTANTS,
    *SWIGLU_MUTANTS,
    *ROPE_MUTANTS,
    *QUANTIZE_MUTANTS,
    *WEIGHTS_MUTANTS,
    *FILTERS_MUTANTS,
    *SAMPLING_MUTANTS,
    *ATTENTION_MUTANTS,
    *QUANTIZED_MUTANTS,
    *MATMUL_MUTANTS,
    *MERGE_MUTANTS,
    *INT4_MUTANTS,
    *INT8_MUTANTS,
    *W8A8_MUTANTS,
    *LAUNCHING_MUTANTS,
    *COMPILED_MUTANTS,
]
