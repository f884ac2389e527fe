"""Faults planted in the dense matmul, its epilogue and the embedding."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

COLUMNS = "triton/matmul/test_dense.py::test_columns_in_any_number_of_splits"
ORDER = "triton/matmul/test_dense.py::test_the_order_of_a_sum_is_the_same_in_any_batch"
STRIDES = "ops/test_matmul.py::test_strided_inputs_and_outputs"
SPLITS = "triton/matmul/test_epilogue.py::test_any_form_in_splits"
LAST = "triton/matmul/test_epilogue.py::test_whichever_program_comes_last"
FORMS = "ops/test_fusion.py::test_it_is_the_composition"
WORKSPACE = "triton/matmul/test_dense.py::test_a_workspace_is_all_that_is_used"
OUTSIDE = "triton/rows/test_embedding.py::test_an_id_outside_the_table_gives_nan_and_reads_nothing"


def around(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in the prologue or epilogue of a matmul."""
    return mutant(name, "matmul/epilogue", old, new, *tests)


MATMUL_MUTANTS = [
    mutant("negative ids are read", "rows/embedding", "(row >= 0) & (row < num_rows)", "row < num_rows", OUTSIDE),
    mutant("an id past the last is read", "rows/embedding", "row < num_rows)", "row <= num_rows)", OUTSIDE),
    mutant(
        "the next row",
        "rows/embedding",
        "row * weight_row_stride + col",
        "(row + 1) * weight_row_stride + col",
        OUTSIDE,
    ),
    mutant("the row's end", "rows/embedding", "exists & (col < SIZE)", "exists", "ops/test_matmul.py::test_embedding"),
    mutant(
        "columns past the end", "matmul/dense", "exists = start + col < SIZE", "exists = start + col <= SIZE", COLUMNS
    ),
    mutant(
        "a split ends at the tile before",
        "matmul/dense",
        "tl.minimum(first + SPLIT, SIZE)",
        "tl.minimum(first + SPLIT - BLOCK_K, SIZE)",
        COLUMNS,
    ),
    mutant(
        "splits overlap",
        "matmul/dense",
        "first = tl.program_id(1) * SPLIT",
        "first = tl.program_id(1) * (SPLIT - BLOCK_K)",
        COLUMNS,
    ),
    mutant("the first tile again", "matmul/dense", "weight_ptr += BLOCK_K", "weight_ptr += 0", COLUMNS),
    mutant("rows past the last read", "matmul/dense", "tl.minimum(row, num_rows - 1)", "row", STRIDES),
    around("the last split forgotten", "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)", COLUMNS),
    around("the first program stores", "== SPLITS - 1:", "== 0:", LAST),
    around("counts stay", "tl.atomic_xchg(counters_ptr + tile, 0,", "tl.atomic_xchg(counters_ptr + tile, 1,", LAST),
    around("one count for all tiles", "tl.atomic_add(counters_ptr + tile,", "tl.atomic_add(counters_ptr,", COLUMNS),
    around(
        "parts of all tiles in one place",
        "parts_ptr += tile.to(tl.int64) * SPLITS * num_rows * BLOCK_N",
        "parts_ptr += tile.to(tl.int64) * 0",
        COLUMNS,
    ),
    around(
        "parts of one row",
        "place = row\n    ",
        "place = row * 0\n    ",
        COLUMNS,
    ),
    around(
        "squares of the last split alone",
        "squares += tl.load(squares_ptr + place",
        "squares = tl.load(squares_ptr + place",
        SPLITS,
    ),
    around("squares of other rows", "tl.load(squares_ptr + place", "tl.load(squares_ptr + place // 2 * 2", SPLITS),
    around("the mean of a tile", "squares / SIZE + eps", "squares / 128 + eps", FORMS),
    around("eps forgotten", "squares / SIZE + eps", "squares / SIZE", FORMS),
    around("the norm's weight forgotten", "norm[None, :]).to(x.dtype)", "1.0).to(x.dtype)", FORMS),
    around(
        "the norm's weight of the first tile",
        "tl.load(norm_ptr + col, mask",
        "tl.load(norm_ptr + col % 32, mask",
        FORMS,
    ),
    around(
        "squares without their neighbours", "return first + second\n\n\n# [M, 4]", "return first\n\n\n# [M, 4]", FORMS
    ),
    around("no bias", "    if bias_ptr is not None:\n        acc +=", "    if False:\n        acc +=", COLUMNS),
    around("the next feature's bias", "bias_ptr + owned", "bias_ptr - 1 + owned", COLUMNS),
    around(
        "bias before the factor",
        "acc *= tl.rsqrt(squares / SIZE + eps)[None, :]\n    if bias_ptr",
        "acc = (acc + 1.0) * tl.rsqrt(squares / SIZE + eps)[None, :] - 1.0\n    if bias_ptr",
        FORMS,
    ),
    around("gate and up swapped", "gate, up = tl.split", "up, gate = tl.split", FORMS),
    around(
        "neighbours for gate and up",
        "reshape(2, WIDTH, acc.shape[1]).trans(1, 2, 0)",
        "reshape(WIDTH, 2, acc.shape[1]).trans(0, 2, 1)",
        FORMS,
    ),
    around("sigmoid of -gate", "1.0 + tl.exp(-gate)", "1.0 + tl.exp(gate)", FORMS),
    around("up of the gate's rows", "feature += lane // (BLOCK_N // 2) * (FEATURES // 2)", "feature += 0", FORMS),
    around("features past the last stored", "(col < COLUMNS)[:, None]", "(col < COLUMNS + 1)[:, None]", COLUMNS),
    around(
        "rows past the last stored",
        "& (row < num_rows)[None, :]\n    if",
        "& (row <= num_rows)[None, :]\n    if",
        COLUMNS,
    ),
    around("residual forgotten", "    if residual_ptr is not None:", "    if False:", FORMS),
    around(
        "splits by the rows",
        "each = ceil_div(blocks, wanted)",
        "each = ceil_div(blocks, wanted if num_rows > 16 else 1)",
        ORDER,
    ),
    around("a short workspace is taken", "scratch(workspace, splits.elements,", "scratch(workspace, 0,", WORKSPACE),
]
