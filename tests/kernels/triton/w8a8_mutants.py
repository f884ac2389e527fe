"""Faults planted in int8 matmuls and the quantizing of rows; a part of the table in mutants.py."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

SHAPES = "ops/test_w8a8.py::test_matmul_w8a8"
NOISE = "ops/test_w8a8.py::test_nothing_past_the_end_is_read_or_written"
LONGEST = "ops/test_w8a8.py::test_the_longest_sums_are_exact"
ROUNDED = "ops/test_w8a8.py::test_no_code_is_nearer"
NORM = "ops/test_quantize_rows.py::test_rms_norm_int8"
GATES = "ops/test_quantize_rows.py::test_silu_mul_int8"
OWN = "triton/matmul/test_w8a8.py::test_"
SPLITS = f"{OWN}splits"
LAUNCHES = f"{OWN}launches_change_no_bit"
EVERY = f"{OWN}every_tile_has_a_program"
FAR = f"{OWN}rows_past_two_to_the_31_elements"
WORKSPACE = f"{OWN}a_workspace_holds_anything_before_and_is_all_that_is_used"


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in the matmul."""
    return mutant(name, "matmul/w8a8", old, new, *tests)


W8A8_MUTANTS = [
    fault("every quarter the first", "quarter * 2048 +", "quarter * 0 +", SHAPES),
    fault("quarters of another place", "start // 32 * 2048", "start // 64 * 2048", SHAPES),
    fault("registers in another order", "trans(0, 5, 1, 3, 4, 2, 6)", "trans(0, 5, 1, 4, 3, 2, 6)", SHAPES),
    fault("rows of a pair interleaved", "trans(0, 5, 1, 3, 4, 2, 6)", "trans(0, 1, 5, 3, 4, 2, 6)", SHAPES),
    fault("every tile the first", "row // 64 + lane // 128,", "row // 64 + lane // 256,", SHAPES),
    fault("tiles past the last", "lane // 128, (N - 1) // 64", "lane // 128, N", SHAPES),
    fault("sums in fp32", "y = sums.to(tl.float32) * x_scale", "y = sums.to(tl.float16) * x_scale", LONGEST),
    fault("scale of the row forgotten", "sums.to(tl.float32) * x_scale", "sums.to(tl.float32)", SHAPES),
    fault("bias before the scale", "tl.fma(y, scale, bias)", "(y + bias) * scale", SHAPES),
    fault("columns past K", "mask=k < K, other=0", "mask=k < K + 1, other=0", SHAPES),
    fault("rows past the last", "tl.minimum(row, num_rows - 1)", "tl.minimum(row, num_rows)", SHAPES),
    fault("rows past the last stored", "row < num_rows, col < N", "row < num_rows + 1, col < N", NOISE),
    fault("features past the last stored", "row < num_rows, col < N", "row < num_rows, col < N + 1", NOISE),
    fault("a split ends a tile early", "tl.minimum(begin + SPLIT, K)", "tl.minimum(begin + SPLIT - 128, K)", SPLITS),
    fault("every split is the first", "begin = split * SPLIT", "begin = split * 0", SPLITS),
    fault("splits in one place", "split.to(tl.int64) * num_rows + row", "split.to(tl.int64) * 0 + row", SPLITS),
    fault("one part too few", "tl.static_range(PARTS)", "tl.static_range(PARTS - 1)", SPLITS),
    fault("tiles of rows in one group", "first_tile = place // (TOGETHER * TILES) * TOGETHER", "first_tile = 0", EVERY),
    fault(
        "the last group as large as the others",
        "tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first_tile, TOGETHER)",
        "TOGETHER",
        EVERY,
    ),
    fault(
        "scales of the first features", "scales_ptr + col, mask=inside", "scales_ptr + col % 128, mask=inside", SHAPES
    ),
    fault(
        "sums' scales of the first features", "scales_ptr + col, mask=mask", "scales_ptr + col % 64, mask=mask", SPLITS
    ),
    fault("32-bit rows of x", "(first_tile + place % together).to(tl.int64)", "(first_tile + place % together)", FAR),
    fault("32-bit rows of tiles", "(place // together).to(tl.int64) * 128", "(place // together) * 128", FAR),
    fault("a short workspace is taken", "scratch(workspace, elements,", "scratch(workspace, elements - 1,", WORKSPACE),
    mutant(
        "rows: another row's scale",
        "rows/quantize_rows",
        "scales_out_ptr + row, x",
        "scales_out_ptr + row * 0, x",
        ROUNDED,
    ),
    mutant(
        "rows: quantized at x's stride",
        "rows/quantize_rows",
        "out_ptr + row * out_row_stride",
        "out_ptr + row * BLOCK",
        ROUNDED,
    ),
    mutant("rows: columns past the last", "rows/quantize_rows", "(col < SIZE)", "(col < BLOCK)", ROUNDED),
    mutant(
        "rows: 32 bits",
        "rows/quantize_rows",
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)",
        f"{OWN}rounded_rows_past_two_to_the_31_elements",
    ),
    mutant(
        "rows: truncated",
        "rows/quantize",
        "x * inverse, 0.0), tl.int8)",
        "x * inverse * 0.99, 0.0), tl.int8)",
        ROUNDED,
    ),
    mutant("norm: one scale", "rows/norm", "scales_out_ptr + row,", "scales_out_ptr + row * 0,", NORM),
    mutant(
        "norm: quantized before it is rounded",
        "rows/norm",
        "mask, result.to(tl.float32), 0.0)",
        "mask, normed * weight, 0.0)",
        NORM,
    ),
    mutant("gates: one scale", "rows/swiglu", "scales_out_ptr + row + one", "scales_out_ptr + one", GATES),
    mutant(
        "gates: not rounded first", "rows/swiglu", "product = product.to(gate_up", "rounded = product.to(gate_up", GATES
    ),
]
