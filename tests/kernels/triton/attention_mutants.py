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
        "kv_head = head % tl.maximum(num_heads // GROUP, 1)",
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
        "            k_len - QUERIES + 1 + query,",
        "            k_len + 0 * query,",
        DRAFTS,
    ),
    mutant(
        "drafts not masked before the last tile",
        "attention/decode",
        "tl.minimum(last, k_len - QUERIES + 1),",
        "last,",
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
    mutant("codes without a sign", "attention/flash", "(codes & 0x80).to(tl.uint16) << 8 | ", "", EVERY_CODE),
    mutant("codes without their bias", "attention/flash", "bitcast=True) * 256.0", "bitcast=True) * 128.0", EVERY_CODE),
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
