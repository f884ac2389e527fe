"""Faults planted in the dense product and the embedding."""

from __future__ import annotations

from tests.kernels.triton.planted import mutant

COLUMNS = "triton/test_matmul.py::test_columns_in_any_number_of_splits"
ORDER = "triton/test_matmul.py::test_the_order_of_a_sum_is_the_same_in_any_batch"
STRIDES = "test_matmul.py::test_strided_inputs_and_outputs"
OUTSIDE = "triton/test_embedding.py::test_an_id_outside_the_table_gives_nan_and_reads_nothing"
MATMUL_MUTANTS = [
    mutant("negative ids are read", "embedding", "(row >= 0) & (row < num_rows)", "row < num_rows", OUTSIDE),
    mutant("an id past the last is read", "embedding", "row < num_rows)", "row <= num_rows)", OUTSIDE),
    mutant(
        "the next row", "embedding", "row * weight_row_stride + col", "(row + 1) * weight_row_stride + col", OUTSIDE
    ),
    mutant("the row's end", "embedding", "exists & (col < SIZE)", "exists", "test_matmul.py::test_embedding"),
    mutant(
        "columns past the end",
        "matmul",
        "inside = (start + col < SIZE)[None, :]",
        "inside = (start + col <= SIZE)[None, :]",
        COLUMNS,
    ),
    mutant(
        "a split ends at the tile before",
        "matmul",
        "tl.minimum(first + SPLIT, SIZE)",
        "tl.minimum(first + SPLIT - BLOCK_K, SIZE)",
        COLUMNS,
    ),
    mutant("splits overlap", "matmul", "first = split * SPLIT", "first = split * (SPLIT - BLOCK_K)", COLUMNS),
    mutant(
        "the last split forgotten", "parts", "tl.static_range(PARTS)", "tl.static_range(max(PARTS - 1, 1))", COLUMNS
    ),
    mutant("bias in every split", "matmul", "bias_ptr=bias if splits == 1 else None", "bias_ptr=bias", COLUMNS),
    mutant(
        "no bias in the sum",
        "parts",
        "    if bias_ptr is not None:\n        total +=",
        "    if False:\n        total +=",
        COLUMNS,
    ),
    mutant(
        "the next feature's bias",
        "matmul",
        "bias_ptr + tl.minimum(feature, FEATURES - 1)",
        "bias_ptr + tl.minimum(feature + 1, FEATURES - 1)",
        COLUMNS,
    ),
    mutant(
        "features past the last stored",
        "matmul",
        "mask = (feature < FEATURES)[:, None] & (row",
        "mask = (feature < FEATURES + 1)[:, None] & (row",
        COLUMNS,
    ),
    mutant("rows past the last stored", "matmul", "(row < num_rows)[None, :]", "(row <= num_rows)[None, :]", COLUMNS),
    mutant("rows past the last read", "matmul", "tl.minimum(row, num_rows - 1)", "row", STRIDES),
    mutant("parts of one row", "parts", "part * part_stride + row * FEATURES", "part * part_stride", COLUMNS),
    mutant(
        "splits by the rows",
        "matmul",
        "each = tuning.ceil_div(blocks, launch.splits)",
        "each = tuning.ceil_div(blocks, launch.splits if num_rows > 16 else 1)",
        ORDER,
    ),
]
