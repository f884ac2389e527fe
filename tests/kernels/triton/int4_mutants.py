"""Faults planted in matmul_int4; a part of the table in mutants.py."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

EXACT = "ops/test_int4.py::test_every_code_is_exact"
SHAPES = "ops/test_int4.py::test_matmul_int4"
NOISE = "ops/test_int4.py::test_nothing_past_the_end_is_read_or_written"
BETWEEN = "ops/test_int4.py::test_zeros_between_codes"
OWN = "triton/matmul/test_int4.py::test_"
SPLITS = f"{OWN}splits"
END = "tl.minimum(begin + SPLIT, SIZE)"
FAR = f"{OWN}rows_past_two_to_the_31_elements"
FAR_ROWS = "triton/test_launchers.py::test_rows_past_two_to_the_31_elements"
FORMS = "ops/test_fusion.py::test_it_is_the_composition"
SHORT = f"{OWN}a_workspace_that_is_too_small_is_refused_before_anything_is_written"


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in loading packed values."""
    return mutant(name, "matmul/load_int4", old, new, *tests)


def shared(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in the kernels that all quantized weights share."""
    return mutant(name, "matmul/quantized", old, new, *tests)


INT4_MUTANTS = [
    fault("rows of a pair swapped", "numbers(words >> 4, dtype)", "numbers(words >> 8, dtype)", EXACT),
    fault("neighbours swapped", "tl.join(low, high)", "tl.join(high, low)", EXACT),
    fault("the upper half is the lower", "(words >> 16).to(tl.uint16)", "(words & 0xFFFF).to(tl.uint16)", EXACT),
    fault("five bits", "words & 0x000F000F", "words & 0x001F000F", EXACT),
    fault("words of another half", "start // 64 * 512", "start // 128 * 512", EXACT),
    fault("the first words of a half", "packed_ptr += start % 64 // 16", "packed_ptr += 0", EXACT),
    fault("rows of tiles interleaved", "trans(0, 6, 1, 3, 5, 2, 4)", "trans(6, 0, 1, 3, 5, 2, 4)", EXACT),
    fault("values off by one", "136.0 if", "135.0 if", EXACT),
    fault("tiles past the last", "lane // 128 * STEP, (N - 1) // 64", "lane // 128 * STEP, N", SHAPES),
    fault("every tile the first", "tile + lane // 128 * STEP", "tile + lane // 256 * STEP", SHAPES),
    fault("up from the gate's next tile", "lane // 128 * STEP", "lane // 128", FORMS),
    shared("columns past K", "some if SIZE % 128 == 0 else some & exists[None, :]", "some", NOISE),
    shared("the first tile again", "packed_ptr += 256 * BITS", "packed_ptr += 0", SHAPES),
    shared("x of the first tile", "x_ptr += 128", "x_ptr += 0", SHAPES),
    shared("rows of x past the end", "some = (row < num_rows)[:, None]", "some = (row < BLOCK_M)[:, None]", NOISE),
    shared(
        "scale of the next group",
        "tile_start // GROUP + part, GROUPS",
        "tile_start // GROUP + part + 1, GROUPS",
        SHAPES,
    ),
    shared(
        "scale of the tile's first group", "tile_start // GROUP + part, GROUPS", "tile_start // GROUP, GROUPS", SHAPES
    ),
    shared(
        "a scale past the last",
        "tl.minimum(tile_start // GROUP + part, GROUPS - 1)",
        "tile_start // GROUP + part",
        NOISE,
    ),
    shared("zero forgotten", "group) - 8.0) * sums", "group) - 8.0) * 0.0", SHAPES),
    shared("zero of 8 twice", "group) - 8.0) * sums", "group)) * sums", SHAPES),
    shared("sums of one block", "tl.dot(ones, tl.trans(x), sums,", "tl.dot(ones, tl.trans(x), sums * 0.0,", SHAPES),
    shared(
        "zeros truncated to integers",
        "(zeros_ptr, feature, zeros_row_stride, group)",
        "(zeros_ptr, feature, zeros_row_stride, group).to(tl.int32)",
        BETWEEN,
    ),
    shared("a split overlaps the next", END, "tl.minimum(begin + SPLIT + 1, SIZE)", SPLITS),
    shared("a split ends a tile early", END, "tl.minimum(begin + SPLIT - 128, SIZE)", SPLITS),
    shared("every split is the first", "begin = tl.program_id(1) * SPLIT", "begin = tl.program_id(1) * 0", SPLITS),
    shared(
        "32-bit rows of tiles",
        "tile = tl.program_id(0).to(tl.int64) * (1",
        "tile = tl.program_id(0) * (1",
        FAR,
    ),
    shared("32-bit rows of x", "tl.arange(0, BLOCK_M).to(tl.int64)", "tl.arange(0, BLOCK_M)", FAR_ROWS),
    shared(
        "32-bit rows of the weight",
        "tile, start = tl.program_id(0).to(tl.int64)",
        "tile, start = tl.program_id(0)",
        FAR,
    ),
    shared("weight without zeros", "group) - 8.0\n", "group) * 0.0\n", SHAPES),
    shared(
        "weight past K",
        "mask=inside[:, None] & (col < K)",
        "mask=inside[:, None]",
        f"{OWN}the_weight_of_many_rows_is_written_once",
        SHAPES,
    ),
    shared("the scale that the weight's first group has", "tl.minimum(start // GROUP,", "tl.minimum(0,", SHAPES),
    shared("a short workspace is taken", "scratch(workspace, elements,", "scratch(workspace, elements - 1,", SHORT),
    shared("a tile of gate and up", "features % (2 * ROWS) == 0", "features % 2 == 0", FORMS),
]
