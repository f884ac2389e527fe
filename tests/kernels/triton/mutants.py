"""Faults planted in the Triton kernels, each of which some test must find.

python -m fastllama.testing.mutants tests/kernels/triton/mutants.py
"""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.adjust_mutants import ADJUST_MUTANTS
from tests.kernels.triton.attention_mutants import ATTENTION_MUTANTS, FORM_MUTANTS, QUANTIZED_MUTANTS
from tests.kernels.triton.compiled_mutants import COMPILED_MUTANTS
from tests.kernels.triton.int4_mutants import INT4_MUTANTS
from tests.kernels.triton.int8_mutants import INT8_MUTANTS
from tests.kernels.triton.matmul_mutants import MATMUL_MUTANTS
from tests.kernels.triton.planted import TESTS, mutant
from tests.kernels.triton.sampling_mutants import FILTERS_MUTANTS, SAMPLING_MUTANTS, WEIGHTS_MUTANTS, WORKSPACE
from tests.kernels.triton.values_mutants import VALUES_MUTANTS
from tests.kernels.triton.w8a8_mutants import W8A8_MUTANTS

NORM = "triton/rows/test_norm.py::test_several_rows_of_one_program"
NORM_OPS = "ops/test_norm.py"
SILU = "ops/test_swiglu.py"
APART = f"{SILU}::test_gate_up_and_out_have_strides_of_their_own"
ROPE = "ops/test_rope.py::test_rope"
PASSED = "ops/test_rope.py::test_what_is_not_rotated_passes_through_whatever_it_is"
WRITE = "ops/test_rope.py::test_rope_and_write_kv"
ANGLES = "ops/test_rope.py::test_angles_in_16_bits_are_widened_as_they_are_read"
COPIED = "ops/test_write_kv.py::test_each_token_is_copied_to_its_slot_alone"
STRIDED = "ops/test_write_kv.py::test_strides_of_all_kinds_and_int32_slots"
GIVEN = "ops/test_write_kv.py::test_codes_under_given_scales_are_quotients_rounded_to_nearest"
BEYOND = "ops/test_write_kv.py::test_what_a_given_scale_does_not_reach"
CODES = "ops/test_quantized_pages.py::test_codes_are_the_nearest"
EVEN = "ops/test_quantized_pages.py::test_ties_go_to_the_even_code"
TINY = "ops/test_quantized_pages.py::test_a_head_of_zeros_or_of_tiny_values"
NOT_FINITE = "ops/test_quantized_pages.py::test_what_is_not_finite_reads_back_as_nan_in_its_head_alone"
FAR = "triton/test_launchers.py::test_rows_past_two_to_the_31_elements"
FAR_POOL = "triton/test_launchers.py::test_a_pool_past_two_to_the_31_elements"

NORM_MUTANTS = [
    mutant(
        "rows past the end", "rows/norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows + 9) & (col < SIZE)", NORM
    ),
    mutant(
        "columns past the end", "rows/norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows) & (col < BLOCK)", NORM
    ),
    mutant("mean over the padded row", "rows/norm", "/ SIZE + eps", "/ BLOCK + eps", NORM),
    mutant("eps forgotten", "rows/norm", "/ SIZE + eps", "/ SIZE", NORM_OPS),
    mutant(
        "weight meets an unrounded value", "rows/norm", "(x * scale).to(dtype).to(tl.float32)", "x * scale", NORM_OPS
    ),
    mutant("sum normalised before it is rounded", "rows/norm", "x = total.to(tl.float32)", "x += 0.0", NORM),
    mutant("residual left out", "rows/norm", "        x += tl.load(residual_ptr", "        tl.load(residual_ptr", NORM),
    mutant("32-bit rows", "rows/norm", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", FAR),
]
SWIGLU_MUTANTS = [
    mutant("sigmoid of -gate", "rows/swiglu", "tl.exp(-gate)", "tl.exp(gate)", SILU),
    mutant("up at the block's end", "rows/swiglu", "gate_ptrs + SIZE", "gate_ptrs + BLOCK", SILU),
    mutant("up's rows where the gate's are", "rows/swiglu", "row * up_row_stride", "row * gate_up_row_stride", APART),
    mutant("columns past the end", "rows/swiglu", "col < SIZE", "col < BLOCKS * BLOCK", SILU),
    mutant(
        "silu rounded too",
        "rows/swiglu",
        "gate / (1.0 + tl.exp(-gate)) * up",
        "(gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32) * up",
        SILU,
    ),
    mutant(
        "32-bit rows", "rows/swiglu", "(tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS", FAR
    ),
]
ROPE_MUTANTS = [
    mutant("turned the other way", "rows/heads", "first * cos - second * sin", "first * cos + second * sin", ROPE),
    mutant("neighbours swapped", "rows/heads", "tl.join(first, second)", "tl.join(second, first)", ROPE),
    mutant("sines are cosines", "rows/heads", "angles_ptr + ROTARY // 2 + pair", "angles_ptr + pair", ROPE),
    mutant("0 * inf in what passes", "rows/heads", "    if ROTARY < HEAD_DIM:  # sin", "    if False:  # sin", PASSED),
    mutant(
        "odd heads cut",
        "rows/heads",
        "mask & (other_dim < HEAD_DIM), other=0.0)",
        "mask & (pair < 2), other=0.0)",
        ROPE,
    ),
    mutant(
        "heads past the end",
        "rows/rope",
        "mask = head < NUM_HEADS  # [HEADS, 1]\n    first, second = load_pairs(x_ptr, head * X",
        "mask = head < NUM_HEADS + 1\n    first, second = load_pairs(x_ptr, head * X",
        ROPE,
    ),
    mutant(
        "32-bit tokens",
        "rows/rope",
        "+ 2 * KV_BLOCKS\n    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64)",
        "+ 2 * KV_BLOCKS\n    token, block = tl.program_id(0) // BLOCKS",
        FAR,
    ),
    mutant(
        "32-bit slots",
        "rows/rope",
        "slot = tl.load(slots_ptr + token).to(tl.int64)",
        "slot = tl.load(slots_ptr + token).to(tl.int32)",
        FAR_POOL,
    ),
    mutant("padding written", "rows/rope", "    elif (slot >= 0) & (slot < num_slots):", "    else:", WRITE),
    mutant("values turned", "rows/rope", "                False,\n", "                True,\n", WRITE),
    mutant(
        "pages taken for contiguous",
        "rows/write_kv",
        "page * STRIDES[0] + head * STRIDES[1] + place * STRIDES[2]",
        "((page * NUM_HEADS + head) * PAGE_SIZE + place) * HEAD_DIM",
        WRITE,
    ),
    mutant(
        "keys in the pages of values",
        "rows/rope",
        "                v_pages_ptr,",
        "                k_pages_ptr,",
        WRITE,
    ),
]
WRITE_KV_MUTANTS = [
    mutant("padding written", "rows/write_kv", "(slot >= 0) & (slot < num_slots)", "slot < num_slots", COPIED),
    mutant("a slot past the pages", "rows/write_kv", "(slot >= 0) & (slot < num_slots)", "slot >= 0", COPIED),
    mutant(
        "values in the pages of keys",
        "rows/write_kv",
        "                v_pages_ptr,\n",
        "                k_pages_ptr,\n",
        COPIED,
    ),
    mutant(
        "values' scale is the keys'", "rows/write_kv", "                v_scale,\n", "                k_scale,\n", GIVEN
    ),
    mutant("heads in a row", "rows/write_kv", "head * K_HEAD_STRIDE", "head * HEAD_DIM", STRIDED),
    mutant("the keys' strides for values", "rows/write_kv", "head * V_HEAD_STRIDE", "head * K_HEAD_STRIDE", STRIDED),
    mutant("some programs missing", "rows/write_kv", "(2 * tokens * ceil_div", "(tokens * ceil_div", COPIED),
    mutant(
        "32-bit tokens",
        "rows/write_kv",
        "(tl.program_id(0) // (2 * BLOCKS)).to(tl.int64)",
        "tl.program_id(0) // (2 * BLOCKS)",
        FAR,
    ),
    mutant(
        "multiplied by the reciprocal",
        "rows/quantize",
        "tl.div_rn(x, tl.full(x.shape, scale, tl.float32))",
        "x * (1.0 / scale)",
        GIVEN,
    ),
    mutant(
        "larger quotients wrap",
        "rows/quantize",
        "tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST)",
        "quotient",
        BEYOND,
    ),
    mutant("NaN is the largest", "rows/quantize", "tl.where(quotient == quotient, within, NAN_AS)", "within", BEYOND),
    mutant("NaN is 0 in fp8 too", "rows/quantize", "0.0 if dtype == tl.int8 else 480.0", "0.0", BEYOND),
    mutant(
        "angles are rounded",
        "rows/heads",
        "    cos, sin = cos.to(tl.float32), sin.to(tl.float32)\n",
        "    first, second = first.to(cos.dtype), second.to(cos.dtype)\n",
        ANGLES,
    ),
]
QUANTIZE_MUTANTS = [
    mutant("truncated", "rows/quantize", "(x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)", "x.to(tl.int8)", CODES),
    mutant("ties upwards", "rows/quantize", "((magnitude >> 20) & 1)", "1", EVEN),
    mutant("no small values", "rows/quantize", "tl.where(magnitude < (121 << 23), small, normal)", "normal", EVEN),
    mutant("sign lost", "rows/quantize", " | ((bits >> 24) & 0x80)", "", EVEN),
    mutant(
        "half a head's maximum",
        "rows/quantize",
        "tl.maximum(magnitude_bits(first), magnitude_bits(second))",
        "magnitude_bits(first)",
        CODES,
    ),
    mutant("infinity scaled", "rows/quantize", 'finite = absmax < float("inf")', "finite = absmax > 0.0", NOT_FINITE),
    mutant("zeros without a scale", "rows/quantize", "(127 - 100) << 23", "0", TINY),
]
MERGE = "ops/test_merge.py::test_merge_state"
EXTREMES = "ops/test_merge.py::test_far_apart_far_from_zero_and_without_keys"
NO_KEYS = "ops/test_merge.py::test_a_side_without_keys_leaves_the_other_bit_for_bit"
ANY_STRIDES = "ops/test_merge.py::test_any_strides"
BASE2 = "ops/test_merge.py::test_log_sum_exps_to_base_2_are_the_same_in_another_unit"
TURNED = "ops/test_merge.py::test_log_sum_exps_of_heads_by_tokens"
ONCE = "ops/test_merge.py::test_the_sum_is_rounded_once"
MERGE_MUTANTS = [
    mutant("shares swapped", "attention/merge", "a * tl.div_rn(a_weight", "a * tl.div_rn(b_weight", MERGE),
    mutant("weights for shares", "attention/merge", "tl.div_rn(b_weight, total)", "b_weight", MERGE),
    mutant("the first side's peak", "attention/merge", "tl.maximum(a_lse, b_lse)", "a_lse", EXTREMES),
    mutant(
        "peak forgotten",
        "attention/merge",
        "tl.exp(a_lse - base), tl.exp(b_lse - base)",
        "tl.exp(a_lse), tl.exp(b_lse)",
        MERGE,
    ),
    mutant("-inf less -inf", "attention/merge", 'tl.where(peak == float("-inf"), 0.0, peak)', "peak", EXTREMES),
    mutant("noise where nothing was seen", "attention/merge", "tl.where(no_b, 0.0, b)", "b", EXTREMES),
    mutant("a side without keys times 0", "attention/merge", "tl.where(no_b, a, merged)", "merged", EXTREMES),
    mutant("-0 lost", "attention/merge", "tl.where(no_b, a, merged)", "tl.where(no_b, a + 0.0, merged)", NO_KEYS),
    mutant(
        "shares rounded too",
        "attention/merge",
        "a * tl.div_rn(a_weight, total)",
        "a * tl.div_rn(a_weight, total).to(out_ptr.dtype.element_ty).to(tl.float32)",
        ONCE,
    ),
    mutant("log-sum-exp in base 2", "attention/merge", "else tl.log(total)", "else tl.log2(total)", MERGE),
    mutant("natural log-sum-exp", "attention/merge", "tl.log2(total) if", "tl.log(total) if", BASE2),
    mutant("natural exponential", "attention/merge", "tl.exp2(b_lse - base)", "tl.exp(b_lse - base)", BASE2),
    mutant(
        "+inf for a key",
        "attention/merge",
        'tl.where(a_lse == float("inf"), float("-inf"), a_lse)',
        "a_lse",
        NO_KEYS,
    ),
    mutant("log-sum-exps of heads in a row", "attention/merge", "head * b_lse_head_stride", "head", TURNED),
    mutant("log-sum-exps written in a row", "attention/merge", "head * lse_out_head_stride", "head", TURNED),
    mutant("heads past the end", "attention/merge", "used = head < NUM_HEADS", "used = head < NUM_HEADS + 1", MERGE),
    mutant("heads left out", "attention/merge", "ceil_div(num_heads, heads)", "max(num_heads // heads, 1)", MERGE),
    mutant("dimensions past the end", "attention/merge", "(dim < HEAD_DIM)", "(dim < BLOCK_D)", MERGE),
    mutant(
        "one side's strides for both", "attention/merge", "head * B_HEAD_STRIDE", "head * A_HEAD_STRIDE", ANY_STRIDES
    ),
    mutant("log-sum-exps in a row", "attention/merge", "token * a_lse_token_stride", "token * NUM_HEADS", ANY_STRIDES),
    mutant(
        "32-bit tokens",
        "attention/merge",
        "(tl.program_id(0) // BLOCKS).to(tl.int64)",
        "tl.program_id(0) // BLOCKS",
        FAR,
    ),
]
KERNEL_CALL = "fastllama/kernels/launch/kernel_call.py"
REPEATED = ("tests/kernels/launch/test_kernel_call.py",)  # of the compile tier
LAUNCHING_MUTANTS = [
    *(
        Mutant(name, KERNEL_CALL, old, new, REPEATED, interpreter=False)
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
    ),
    Mutant(
        "a short workspace is taken",
        KERNEL_CALL,
        "workspace.numel() < size",
        "workspace.numel() < size - 1",
        ("-m", "interpreter", f"{TESTS}/{WORKSPACE}"),
    ),
]
MUTANTS = [
    *NORM_MUTANTS,
    *SWIGLU_MUTANTS,
    *ROPE_MUTANTS,
    *WRITE_KV_MUTANTS,
    *QUANTIZE_MUTANTS,
    *WEIGHTS_MUTANTS,
    *FILTERS_MUTANTS,
    *SAMPLING_MUTANTS,
    *ADJUST_MUTANTS,
    *ATTENTION_MUTANTS,
    *FORM_MUTANTS,
    *QUANTIZED_MUTANTS,
    *VALUES_MUTANTS,
    *MATMUL_MUTANTS,
    *MERGE_MUTANTS,
    *INT4_MUTANTS,
    *INT8_MUTANTS,
    *W8A8_MUTANTS,
    *LAUNCHING_MUTANTS,
    *COMPILED_MUTANTS,
]
