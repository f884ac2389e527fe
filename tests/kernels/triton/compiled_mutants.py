"""Faults that only compiled kernels show: launches that do not wait, fences, kernels compiled for one batch."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import KERNELS, TESTS

OVERLAP = f"{TESTS}/triton/test_overlap.py"
WAITS = f"{OVERLAP}::test_a_launch_waits_for_the_one_before_ahead_of_every_access"
EACH = f"{OVERLAP}::test_each_kernel_of_a_step_overlaps_where_it_can"
KEYS = f"{TESTS}/triton/test_specialisation.py"
ROWS, WIDTHS = f"{KEYS}::test_rows_decide_nothing_within_a_bucket", f"{KEYS}::test_neither_does_the_width_of_a_table"
PLACES = f"{KEYS}::test_where_a_batchs_whole_numbers_lie_decides_nothing"


def fault(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    """A fault that a test of the compile tier finds."""
    return Mutant(name, f"{KERNELS}/{file}.py", old, new, (test,), interpreter=False)


SEQUENCE = "    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)\n"
LENGTH = "    k_len, is_legal = load_length(seq_lens_ptr + seq, longest)\n"
CHUNK = "    row = tl.program_id(0).to(tl.int64)\n    chunk = tl.program_id(1)\n    temperature"
SCALES = "    prefetch(scales_ptr + feature * scales_row_stride + tl.minimum(begin // GROUP, GROUPS - 1), PDL)\n"
OFFSETS = f"{TESTS}/triton/test_offsets.py"
COMPILED_MUTANTS = [
    fault("nothing waits", "overlap", "        gdc_wait()", "        pass", f"{WAITS}[norm-sm_90]"),
    fault("no launch is let go", "overlap", "        gdc_launch_dependents()", "        pass", f"{WAITS}[norm-sm_90]"),
    fault("a wait forgotten", "rows/norm", "    follow(PDL)\n", "", f"{WAITS}[norm-sm_90]"),
    fault(
        "a wait on one path alone",
        "sampling/draw",
        f"    follow(PDL)\n{CHUNK}",
        f"    if tl.program_id(0) > 0:\n        follow(PDL)\n{CHUNK}",
        f"{WAITS}[sampling-sm_90]",
    ),
    fault(
        "a wait after the length",
        "attention/decode",
        f"    follow(PDL)\n{SEQUENCE}{LENGTH}",
        f"{SEQUENCE}{LENGTH}    follow(PDL)\n",
        f"{WAITS}[attention-sm_90]",
    ),
    fault(
        "a launch in its turn",
        "rows/swiglu",
        "BLOCK=launch.block,\n        **overlapping(out.device),",
        "BLOCK=launch.block,\n        PDL=False,",
        f"{EACH}[sm_90]",
    ),
    fault("overlap on any GPU", "overlap", ">= 90", ">= 80", f"{EACH}[sm_80]"),
    fault(
        "no switch",
        "overlap",
        ' and env.PDL.read() == "1"',
        "",
        f"{OVERLAP}::test_a_variable_switches_it_off",
    ),
    fault(
        "scales not asked for",
        "matmul/quantized",
        SCALES,
        "",
        f"{OVERLAP}::test_weights_are_asked_for_before_the_wait[int4-sm_90]",
    ),
    fault(
        "a count reset with a fence",
        "matmul/epilogue",
        'counters_ptr + tile, 0, sem="relaxed"',
        "counters_ptr + tile, 0",
        f"{OVERLAP}::test_a_sum_over_splits_takes_one_fence",
    ),
    fault(
        "a fence for each chunk's keys",
        "sampling/filters",
        'count, sem="relaxed"',
        "count",
        f"{OVERLAP}::test_the_sums_of_a_draw_take_no_fence",
    ),
    fault("a kernel for one row", "rows/norm", '(do_not_specialize=["num_rows"])', "", ROWS),
    fault("a kernel for one sequence", "attention/prefill", '        "num_seqs",\n', "", ROWS),
    fault("a kernel for the width of a table", "attention/decode", '        "page_table_stride",\n', "", WIDTHS),
    fault(
        "a kernel for a number of splits",
        "attention/decode",
        '"lse_head_stride", "splits"]',
        '"lse_head_stride"]',
        WIDTHS,
    ),
    fault(
        "a kernel for where a part begins", "rows/rope", '["positions_ptr", "slots_ptr", ', '["positions_ptr", ', PLACES
    ),
    fault("a kernel for a longest length", "attention/decode", '        "longest",\n', "", WIDTHS),
    *(
        fault(
            f"32-bit heads in {file}",
            f"attention/{file}",
            old,
            old.replace(".to(tl.int64)", ""),
            f"{OFFSETS}",
        )
        for file, old in (
            ("decode", "tl.program_id(1).to(tl.int64), tl"),
            ("prefill", "head = tl.program_id(1).to(tl.int64)"),
        )
    ),
    fault(
        "32-bit rows of a weight",
        "matmul/quantized",
        "weight_ptr + row[:, None] * K",
        "weight_ptr + row.to(tl.int32)[:, None] * K",
        f"{OFFSETS}::test_no_product_with_a_weight_of_two_to_the_34_elements",
    ),
    fault(
        "32-bit strides of heads",
        "attention/merge",
        "tl.arange(0, HEADS))[:, None].to(tl.int64)",
        "tl.arange(0, HEADS))[:, None]",
        f"{OFFSETS}::test_no_small_call[merge_state]",
    ),
    fault(
        "32-bit rows of quantized values",
        "rows/quantize_rows",
        "tl.program_id(0).to(tl.int64) * ROWS",
        "tl.program_id(0) * ROWS",
        f"{OFFSETS}::test_no_small_call[quantize_rows]",
    ),
]
