"""Faults planted in attention."""

from __future__ import annotations

from tests.kernels.triton.planted import mutant

VARLEN = "ops/test_attention.py::test_varlen[triton-torch.float32-MHA-True]"
PREFILL = "ops/test_attention.py::test_prefill[triton-torch.float32-MHA-5-HND]"
DECODE = "ops/test_attention.py::test_decode[triton-torch.bfloat16-GQA 8-64-HND]"
DRAFTS = "ops/test_attention.py::test_decode_of_several_queries[triton-torch.float32]"
SPLITS = "triton/attention/test_attention.py::test_splits_around_their_edges"
FAR_KEYS = "triton/test_launchers.py::test_rows_past_two_to_the_31_elements"
ATTENTION_MUTANTS = [
    mutant("mask dropped", "attention/flash", "tokens[None, :] < visible[:, None]", "tokens[None, :] < k_len", VARLEN),
    mutant(
        "one token ahead",
        "attention/flash",
        "tokens[None, :] < visible[:, None]",
        "tokens[None, :] <= visible[:, None]",
        VARLEN,
    ),
    mutant(
        "a key past the end",
        "attention/flash",
        "((tokens < k_len) & exists)[:, None]",
        "((tokens <= k_len) & exists)[:, None]",
        DECODE,
    ),
    mutant(
        "the page of the tile before",
        "attention/flash",
        "start + BLOCK_N, k_len, PAGE_SIZE",
        "start, k_len, PAGE_SIZE",
        DECODE,
    ),
    mutant("scale forgotten", "attention/flash", 'precision="ieee") * factor', 'precision="ieee")', VARLEN),
    mutant(
        "stale peak",
        "attention/flash",
        "(fade * shrink)[:, None], new_peak,",
        "(fade * shrink)[:, None], peak,",
        VARLEN,
    ),
    mutant("sum not faded", "attention/flash", "total * fade + tl.sum", "total + tl.sum", VARLEN),
    mutant("values not faded", "attention/flash", "weights, acc * (fade * shrink)[:, None]", "weights, acc", VARLEN),
    mutant(
        "a tile too many without a mask",
        "attention/flash",
        "// BLOCK_N * BLOCK_N\n",
        "// BLOCK_N * BLOCK_N + BLOCK_N\n",
        VARLEN,
    ),
    mutant("32-bit keys", "attention/flash", "tokens.to(tl.int64) * token_stride", "tokens * token_stride", FAR_KEYS),
    mutant("queries aligned at the top", "attention/prefill", "ahead = k_len - end + 1", "ahead = 1 - begin", PREFILL),
    mutant(
        "rows of no sequence left",
        "attention/prefill",
        "seq + 1, mask=exists, other=num_rows",
        "seq + 1, mask=exists, other=0",
        PREFILL,
    ),
    mutant(
        "key head of another group",
        "attention/prefill",
        "kv_head = head // GROUP",
        "kv_head = head % tl.maximum(tl.num_programs(1) // GROUP, 1)",
        "ops/test_attention.py::test_prefill[triton-torch.float16-GQA 4-16-NHD]",
    ),
    mutant(
        "log-sum-exp in base 2",
        "attention/prefill",
        "(peak + tl.log2(total)) * lse_unit",
        "peak + tl.log2(total)",
        VARLEN,
    ),
    mutant(
        "32-bit queries", "attention/prefill", "offsets = row.to(tl.int64)[:, None]", "offsets = row[:, None]", FAR_KEYS
    ),
    mutant(
        "a split overlaps the next",
        "attention/decode",
        "tl.minimum(first + SPLIT, k_len)",
        "tl.minimum(first + SPLIT + 1, k_len)",
        SPLITS,
    ),
    mutant("padding left", "attention/decode", "(first < k_len) | (split == 0)", "first < k_len", DECODE),
    mutant(
        "the last draft for all",
        "attention/decode",
        "visible = k_len - QUERIES + 1 + query",
        "visible = k_len + 0 * query",
        DRAFTS,
    ),
    mutant(
        "drafts not masked before the last tile",
        "attention/decode",
        "whole = tl.minimum(last, k_len - QUERIES + 1)",
        "whole = last",
        SPLITS,
    ),
    mutant("a split that is not there", "attention/decode", "inside = split < used", "inside = split <= used", SPLITS),
    mutant(
        "splits weighed by themselves",
        "attention/decode",
        "weights = tl.exp2(lse - base)",
        "weights = tl.exp2(lse)",
        SPLITS,
    ),
    mutant(
        "32-bit sequences",
        "attention/decode",
        "seq, kv_head, split = tl.program_id(0).to(tl.int64),",
        "seq, kv_head, split = tl.program_id(0),",
        FAR_KEYS,
    ),
]
FORMS = "ops/test_attention_forms.py"
OPS = ("decode", "prefill", "varlen")
ALL_TOKENS = f"{FORMS}::test_without_a_mask_every_query_sees_all_tokens"
UNMASKED = {op: f"{ALL_TOKENS}[attention_{op}-triton-torch.float32-MHA-5-HND-16]" for op in OPS}
ONE_SCALE = f"{FORMS}::test_one_scale_of_all_pages"
SCALED = {op: f"{ONE_SCALE}[attention_{op}-triton-torch.float32-True]" for op in OPS}
SPLITS_SCALED = "triton/attention/test_attention.py::test_splits_of_scaled_pages_and_log_sum_exps_in_any_strides"
VIEW = f"{FORMS}::test_log_sum_exps_into_a_transposed_view"
TRANSPOSED = {op: f"{VIEW}[attention_{op}-triton-False]" for op in OPS}
LOW_HALF = f"{FORMS}::test_a_number_past_32_bits_is_not_its_low_half"
LONG_NUMBERS = {op: f"{LOW_HALF}[attention_{op}-triton-4294967296-16]" for op in OPS}
LARGE_PAGES = f"{LOW_HALF}[attention_decode-triton-4294967296-64]"

FORM_MUTANTS = [
    mutant("every draft masked", "attention/decode", "if CAUSAL:", "if QUERIES > 1:", UNMASKED["decode"]),
    mutant("every prompt masked", "attention/prefill", "if CAUSAL:", "if PAGE_SIZE > 0:", UNMASKED["prefill"]),
    mutant("drafts never masked", "attention/decode", "CAUSAL=causal and queries > 1,", "CAUSAL=False,", DRAFTS),
    *(
        mutant(
            f"the scale of all keys forgotten in {op}",
            f"attention/{op}",
            "score_scale(scale, k_scale)",
            "score_scale(scale, None)",
            SCALED[op],
        )
        for op in ("decode", "prefill")
    ),
    mutant(
        "the scale of all values forgotten in prefill",
        "attention/prefill",
        "result *= v_scale",
        "pass",
        SCALED["prefill"],
    ),
    mutant(
        "the scale of all values forgotten in decode",
        "attention/decode",
        "v_scale=result_scale(v_scale) if splits == 1 else None",
        "v_scale=None",
        SCALED["decode"],
    ),
    mutant(
        "the scale of all values taken by splits, too",
        "attention/decode",
        "v_scale=result_scale(v_scale) if splits == 1 else None",
        "v_scale=result_scale(v_scale)",
        SPLITS_SCALED,
    ),
    mutant(
        "the scale of all values forgotten in the sum of splits",
        "attention/decode",
        "        v_scale=result_scale(v_scale),\n",
        "        v_scale=None,\n",
        SPLITS_SCALED,
    ),
    *(
        mutant(
            f"log-sum-exps of {op} contiguous",
            f"attention/{op}",
            "lse_strides = (0, 0) if lse_out is None else lse_out.stride()",
            "lse_strides = (q.shape[1], 1)",
            TRANSPOSED[op],
        )
        for op in ("decode", "prefill")
    ),
    mutant(
        "the sum's log-sum-exps contiguous",
        "attention/decode",
        "lse_ptr + row * lse_token_stride + head * lse_head_stride, (peak",
        "lse_ptr + at, (peak",
        SPLITS_SCALED,
    ),
    *(
        mutant(f"{what} of 64 bits wrapped in {op}", f"attention/{file}", old, new, LONG_NUMBERS[op])
        for what, op, file, old, new in (
            ("lengths", "decode", "flash", "length = tl.load(ptr)", "length = tl.load(ptr).to(tl.int32)"),
            (
                "lengths",
                "prefill",
                "prefill",
                "k_bounds_ptr + seq + (PAGE_SIZE == 0), mask=exists, other=0)",
                "k_bounds_ptr + seq + (PAGE_SIZE == 0), mask=exists, other=0).to(tl.int32)",
            ),
            (
                "bounds",
                "varlen",
                "prefill",
                "tl.load(bounds_ptr + seq, mask=exists, other=num_rows)",
                "tl.load(bounds_ptr + seq, mask=exists, other=num_rows).to(tl.int32)",
            ),
        )
    ),
    *(
        mutant(
            f"{pages} of 64 bits wrapped",
            "attention/flash",
            f"mask={mask}, other=0).to(tl.int64)",
            f"mask={mask}, other=0).to(tl.int32).to(tl.int64)",
            test,
        )
        for pages, mask, test in (
            ("small pages", "tokens < k_len", LONG_NUMBERS["prefill"]),
            ("large pages", "start < k_len", LARGE_PAGES),
        )
    ),
]
QUANTIZED = "ops/test_attention_quantized.py"
VALUES = f"{QUANTIZED}::test_of_the_values_that_codes_stand_for"
EXACT = {
    "decode": f"{VALUES}[attention_decode-triton-torch.int8-torch.float16-5-HND-GQA 4]",
    "prefill": f"{VALUES}[attention_prefill-triton-torch.int8-torch.float32-5-HND-GQA 4]",
}
EVERY_CODE = f"{QUANTIZED}::test_every_code_is_its_value"
ANY_SCALE = f"{QUANTIZED}::test_scales_of_any_size"
BASE_2 = "ops/test_attention.py::test_the_log_sum_exp_to_base_2"
PARTS = "triton/attention/test_attention.py::test_a_workspace_holds_anything_before"
SHORT = "triton/attention/test_attention.py::test_a_workspace_that_is_too_small_is_refused_before_anything_is_written"
QUANTIZED_MUTANTS = [
    mutant(
        "scales of keys forgotten", "attention/flash", "scores *= k_scales[None, :]", "scores *= 1.0", EXACT["decode"]
    ),
    mutant(
        "scales of values forgotten",
        "attention/flash",
        "weights *= (v_scales / unit)[None, :]",
        "pass",
        EXACT["decode"],
    ),
    mutant("the sum keeps its unit", "attention/flash", "before / unit", "1.0", ANY_SCALE),
    mutant("the sum stays in units", "attention/flash", "    acc *= unit", "    acc *= 1.0", EXACT["decode"]),
    mutant("one unit for all", "attention/flash", "tl.maximum(unit, tl.max(v_scales, 0))", "unit + 0", ANY_SCALE),
    mutant(
        "scales of one token",
        "attention/flash",
        "k_scale_page_stride, 1, PAGE_SIZE)",
        "k_scale_page_stride, 0, PAGE_SIZE)",
        EXACT["decode"],
    ),
    mutant(
        "scales past the end",
        "attention/flash",
        "tl.load(ptrs, mask=exists, other=0.0) if MASKED else tl.load(ptrs)",
        "tl.load(ptrs)",
        f"{VALUES}[attention_decode-triton-torch.int8-torch.bfloat16-64-NHD-MHA]",
    ),
    mutant("fp8 without a sign", "attention/flash", "(codes & 0x80).to(tl.uint16) << 8 | ", "", EVERY_CODE),
    mutant("fp8 without its bias", "attention/flash", "bitcast=True) * 256.0", "bitcast=True) * 128.0", EVERY_CODE),
    *(
        mutant(f"scales of {side}' first head in {op}", f"attention/{op}", place, f"0 * {place}", EXACT[op])
        for side in ("keys", "values")
        for op in ("decode", "prefill")
        for place in (f"kv_head * {side[0].upper()}_SCALE_HEAD_STRIDE,",)
    ),
    mutant("parts in another base", "attention/decode", "unit if splits == 1 else 1.0", "unit", BASE_2),
    mutant(
        "the sum in another base",
        "attention/decode",
        "(peak + tl.log2(total)) * lse_unit)",
        "peak + tl.log2(total))",
        BASE_2,
    ),
    mutant("parts overlap", "attention/decode", "workspace[results:size]", "workspace[: size - results]", PARTS),
    mutant(
        "a short workspace is taken",
        "attention/decode",
        "scratch(workspace, size,",
        "scratch(workspace, size - 1,",
        SHORT,
    ),
]
