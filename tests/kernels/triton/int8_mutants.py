"""Faults planted in matmuls with 8-bit weights; a part of the table in mutants.py."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

EXACT = "ops/test_int8.py::test_every_code_is_exact"
SHAPES = "ops/test_int8.py::test_matmul_int8"
OWN = "triton/matmul/test_int8.py::test_"
READ = f"{OWN}the_weight_is_read_once"
SPLITS = f"{OWN}splits"
FAR = f"{OWN}rows_past_two_to_the_31_words"


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in loading packed values."""
    return mutant(f"bytes: {name}", "matmul/load_int8", old, new, *tests)


def shared(name: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in the kernels that all quantized weights share, where values have 8 bits."""
    return mutant(f"8 bits: {name}", "matmul/quantized", old, new, *tests)


INT8_MUTANTS = [
    fault("x in its own order", "k // 2 % 4 * 4 + k // 8 % 2 * 2", "k // 2 % 8 * 2", EXACT),
    fault("halves of a word swapped in x", "k // 8 % 2 * 2", "(1 - k // 8 % 2) * 2", EXACT),
    fault("every quarter the first", "quarter * 512 +", "quarter * 0 +", EXACT),
    fault("quarters of another place", "start // 32 * 512", "start // 64 * 512", EXACT),
    fault("every tile the first", "tile + lane // 128 * STEP", "tile + lane // 256 * STEP", SPLITS),
    fault("tiles past the last", "lane // 128 * STEP, (N - 1) // 64", "lane // 128 * STEP, N", SHAPES),
    fault("unsigned values", ".to(tl.int8, bitcast=True).to(tl.float32)", ".to(tl.float32)", EXACT),
    fault(
        "bf16 from the lower half", ">> 16).to(tl.uint16).to(tl.bfloat16", ">> 15).to(tl.uint16).to(tl.bfloat16", EXACT
    ),
    fault("bytes 1 and 2 swapped", "number(words >> 8, dtype)", "number(words >> 16, dtype)", EXACT),
    fault("signs not turned", "words ^ 0x80808080", "words ^ 0x80808000", EXACT),
    fault("assembly takes the wrong bytes", '"0x4342"', '"0x4142"', EXACT),
    fault(
        "the upper half is the lower",
        "(words >> 16).to(tl.uint16).to(half",
        "(words & 0xFFFF).to(tl.uint16).to(half",
        EXACT,
    ),
    fault("neighbours swapped", "(tl.join(low, high) *", "(tl.join(high, low) *", EXACT),
    fault("values off by one", "OFFSET: tl.constexpr = 128 / UNIT", "OFFSET: tl.constexpr = 127 / UNIT", EXACT),
    fault("twice the code", "1 / SMALLEST / UNIT", "2 / SMALLEST / UNIT", EXACT),
    fault("registers swapped", "trans(0, 5, 1, 3, 4, 7, 2, 6)", "trans(0, 5, 1, 3, 7, 4, 2, 6)", EXACT),
    fault("rows of a pair interleaved", "trans(0, 5, 1, 3, 4, 7, 2, 6)", "trans(0, 1, 5, 3, 4, 7, 2, 6)", EXACT),
    fault("the weight in x's order", "trans(0, 5, 1, 3, 4, 2, 7, 6)", "trans(0, 5, 1, 3, 4, 7, 2, 6)", EXACT),
    shared(
        "unit not taken back",
        "products * (per_row(scales_ptr, feature, scales_row_stride, group) * UNIT)",
        "products * per_row(scales_ptr, feature, scales_row_stride, group)",
        EXACT,
    ),
    shared(
        "unit not taken back from the weight",
        "weight = codes * (per_row(scales_ptr, row, scales_row_stride, group) * UNIT)",
        "weight = codes * per_row(scales_ptr, row, scales_row_stride, group)",
        EXACT,
    ),
    shared(
        "x's order for 4-bit weights",
        "k if BITS == 4 else order(k)",
        "order(k)",
        "ops/test_int4.py::test_every_code_is_exact",
    ),
    shared("one tile a program", "gated or (_bits(packed) == 8", "gated or (_bits(packed) == 9", READ),
    shared("launched as of 4 bits", "tuning.int4 if _bits(packed) == 4 else tuning.int8", "tuning.int4", SPLITS),
    shared(
        "words that are not whole",
        "    except RuntimeError:",
        "    except TypeError:",
        f"{OWN}words_that_are_not_whole_are_refused_before_anything_is_written",
    ),
    fault("32-bit words", "packed_ptr + tile * row_stride", "packed_ptr + (tile * row_stride).to(tl.int32)", FAR),
]
