"""Faults planted in matmul_int4; a part of the table in mutants.py."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

EXACT = "test_int4.py::test_every_code_is_exact"
SHAPES = "test_int4.py::test_matmul_int4"
NOISE = "test_int4.py::test_nothing_past_the_end_is_read_or_written"
BETWEEN = "test_int4.py::test_zeros_between_codes"
OWN = "triton/test_matmul_int4.py::test_"
SPLITS = f"{OWN}splits"
FAR = f"{OWN}rows_past_two_to_the_31_elements"
FAR_ROWS = "triton/test_launchers.py::test_rows_past_two_to_the_31_elements"
SHORT = f"{OWN}a_workspace_that_is_too_small_is_refused_before_anything_is_written"


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    """In the kernels of matmul_int4."""
    return mutant(name, "matmul_int4", old, new, *tests)


INT4_MUTANTS = [
    fault("rows of a pair swapped", "numbers(words >> 4, dtype)", "numbers(words >> 8, dtype)", EXACT),
    fault("neighbours swapped", "tl.join(low, high)", "tl.join(high, low)", EXACT),
    fault("the upper half is the lower", "(words >> 16).to(tl.uint16)", "(words & 0xFFFF).to(tl.uint16)", EXACT),
    fault("five bits", "words & 0x000F000F", "words & 0x001F000F", EXACT),
    fault("words of another half", "start // 64 * 512", "start // 128 * 512", EXACT),
    fault("the first words of a half", "packed_ptr += start % 64 // 16", "packed_ptr += 0", EXACT),
    fault("rows of tiles interleaved", "trans(0, 6, 1, 3, 5, 2, 4)", "trans(6, 0, 1, 3, 5, 2, 4)", EXACT),
    fault("codes off by one", "136.0 if", "135.0 if", EXACT),
    fault("tiles past the last", "lane // 128, (N - 1) // 64", "lane // 128, N", SHAPES),
    fault("every tile the first", "row // 64 + lane // 128,", "row // 64 + lane // 256,", SHAPES),
    fault("columns past K", "some if K % 128 == 0 else some & (k < K)", "some", NOISE),
    fault("rows of x past the end", "(row < num_rows)[None, :]", "(row < BLOCK_M)[None, :]", NOISE),
    fault("padding stored", "(row < num_rows)[None, :], col < N", "(row < num_rows)[None, :], col < N + 64", NOISE),
    fault(
        "scale of the next group",
        "tile_start // GROUP + part, GROUPS",
        "tile_start // GROUP + part + 1, GROUPS",
        SHAPES,
    ),
    fault(
        "scale of the tile's first group", "tile_start // GROUP + part, GROUPS", "tile_start // GROUP, GROUPS", SHAPES
    ),
    fault(
        "a scale past the last",
        "tl.minimum(tile_start // GROUP + part, GROUPS - 1)",
        "tile_start // GROUP + part",
        NOISE,
    ),
    fault("zero forgotten", "group, inside) - 8.0) * sums", "group, inside) - 8.0) * 0.0", SHAPES),
    fault("zero of 8 twice", "group, inside) - 8.0) * sums", "group, inside)) * sums", SHAPES),
    fault("sums of one block", "tl.dot(ones, x, sums,", "tl.dot(ones, x, sums * 0.0,", SHAPES),
    fault(
        "zeros cut to codes",
        "(zeros_ptr, col, zeros_row_stride, group, inside)",
        "(zeros_ptr, col, zeros_row_stride, group, inside).to(tl.int32)",
        BETWEEN,
    ),
    fault("a split overlaps the next", "tl.minimum(begin + SPLIT, K)", "tl.minimum(begin + SPLIT + 1, K)", SPLITS),
    fault("a split ends a tile early", "tl.minimum(begin + SPLIT, K)", "tl.minimum(begin + SPLIT - 128, K)", SPLITS),
    fault("every split is the first", "begin = tl.program_id(1) * SPLIT", "begin = tl.program_id(1) * 0", SPLITS),
    fault("splits in one place", "split * out_split_stride", "split * 0", SPLITS),
    fault("bias in every split", "bias if splits == 1 else None", "bias", SPLITS),
    fault(
        "32-bit rows of tiles", "first, split = tl.program_id(0).to(tl.int64)", "first, split = tl.program_id(0)", FAR
    ),
    fault("32-bit rows of x", "tl.arange(0, BLOCK_M).to(tl.int64)", "tl.arange(0, BLOCK_M)", FAR_ROWS),
    fault(
        "32-bit rows of the weight",
        "first, start = tl.program_id(0).to(tl.int64)",
        "first, start = tl.program_id(0)",
        FAR,
    ),
    fault("weight without zeros", "inside) - 8.0\n", "inside) * 0.0\n", SHAPES),
    fault(
        "weight past K",
        "mask=inside[:, None] & (col < K)",
        "mask=inside[:, None]",
        f"{OWN}the_weight_of_many_rows_is_written_once",
        SHAPES,
    ),
    fault("the scale that the weight's first group has", "tl.minimum(start // GROUP,", "tl.minimum(0,", SHAPES),
    fault("a short workspace is taken", "scratch(workspace, elements,", "scratch(workspace, elements - 1,", SHORT),
]
