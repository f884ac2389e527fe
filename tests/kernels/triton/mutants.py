"""Faults planted in the Triton kernels, each of which some test must find.

python -m fastllama.testing.mutants tests/kernels/triton/mutants.py
"""

from __future__ import annotations

from fastllama.testing.mutants import Mutant

KERNELS = "fastllama/kernels/triton"
TESTS = "tests/kernels"


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in a kernel's file, and the tests under tests/kernels that find it in the interpreter."""
    return Mutant(name, f"{KERNELS}/{file}.py", old, new, ("-m", "interpreter", *(f"{TESTS}/{test}" for test in tests)))


NORM = "triton/test_norm.py::test_several_rows_of_one_program"
NORM_OPS = "test_norm.py"
SILU = "test_swiglu.py"
ROPE = "test_rope.py::test_rope"
PASSED = "test_rope.py::test_what_is_not_rotated_passes_through_whatever_it_is"
WRITE = "test_rope.py::test_rope_and_write_kv"
CODES = "test_quantized_pages.py"
FAR = "triton/test_launchers.py"

NORM_MUTANTS = [
    mutant("rows past the end", "norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows + 9) & (col < SIZE)", NORM),
    mutant("columns past the end", "norm", "(row < num_rows) & (col < SIZE)", "(row < num_rows) & (col < BLOCK)", NORM),
    mutant("mean over the padded row", "norm", "/ SIZE + eps", "/ BLOCK + eps", NORM),
    mutant("eps forgotten", "norm", "/ SIZE + eps", "/ SIZE", NORM_OPS),
    mutant("weight meets an unrounded value", "norm", "(x * scale).to(dtype).to(tl.float32)", "x * scale", NORM_OPS),
    mutant("sum normalised before it is rounded", "norm", "x = total.to(tl.float32)", "x += 0.0", NORM),
    mutant("residual left out", "norm", "        x += tl.load(residual_ptr", "        tl.load(residual_ptr", NORM),
    mutant("32-bit rows", "norm", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", FAR),
]
SWIGLU_MUTANTS = [
    mutant("sigmoid of -gate", "swiglu", "tl.exp(-gate)", "tl.exp(gate)", SILU),
    mutant("up at the block's end", "swiglu", "gate_ptrs + SIZE", "gate_ptrs + BLOCK", SILU),
    mutant("columns past the end", "swiglu", "col < SIZE", "col < BLOCKS * BLOCK", SILU),
    mutant(
        "silu rounded too",
        "swiglu",
        "gate / (1.0 + tl.exp(-gate)) * up",
        "(gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32) * up",
        SILU,
    ),
    mutant("32-bit rows", "swiglu", "(tl.program_id(0) // BLOCKS).to(tl.int64)", "tl.program_id(0) // BLOCKS", FAR),
]
ROPE_MUTANTS = [
    mutant("turned the other way", "heads", "first * cos - second * sin", "first * cos + second * sin", ROPE),
    mutant("neighbours swapped", "heads", "tl.join(first, second)", "tl.join(second, first)", ROPE),
    mutant("sines are cosines", "heads", "angles_ptr + ROTARY // 2 + pair", "angles_ptr + pair", ROPE),
    mutant("0 * inf in what passes", "heads", "    if ROTARY < HEAD_DIM:  # sin", "    if False:  # sin", PASSED),
    mutant(
        "odd heads cut", "heads", "mask & (other_dim < HEAD_DIM), other=0.0)", "mask & (pair < 2), other=0.0)", ROPE
    ),
    mutant(
        "heads past the end",
        "rope",
        "mask = head < NUM_HEADS  # [HEADS, 1]\n    first, second = load_pairs(x_ptr, head * X",
        "mask = head < NUM_HEADS + 1\n    first, second = load_pairs(x_ptr, head * X",
        ROPE,
    ),
    mutant(
        "32-bit tokens",
        "rope",
        "+ 2 * KV_BLOCKS\n    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64)",
        "+ 2 * KV_BLOCKS\n    token, block = tl.program_id(0) // BLOCKS",
        FAR,
    ),
    mutant(
        "32-bit slots",
        "rope",
        "slot = tl.load(slots_ptr + token).to(tl.int64)",
        "slot = tl.load(slots_ptr + token).to(tl.int32)",
        FAR,
    ),
    mutant("padding written", "rope", "    elif slot >= 0:", "    else:", WRITE),
    mutant("values turned", "rope", "                False,\n", "                True,\n", WRITE),
    mutant(
        "pages taken for contiguous",
        "rope",
        "page * STRIDES[0] + head * STRIDES[1] + place * STRIDES[2]",
        "((page * NUM_HEADS + head) * PAGE_SIZE + place) * HEAD_DIM",
        WRITE,
    ),
    mutant(
        "keys in the pages of values", "rope", "                v_pages_ptr,", "                k_pages_ptr,", WRITE
    ),
]
QUANTIZE_MUTANTS = [
    mutant("codes truncated", "quantize", "(x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)", "x.to(tl.int8)", CODES),
    mutant("ties upwards", "quantize", "((magnitude >> 20) & 1)", "1", CODES),
    mutant("no small codes", "quantize", "tl.where(magnitude < (121 << 23), small, normal)", "normal", CODES),
    mutant("sign lost", "quantize", " | ((bits >> 24) & 0x80)", "", CODES),
    mutant("half a head's maximum", "quantize", "tl.maximum(first_bits, second_bits)", "first_bits", CODES),
    mutant("infinity scaled", "quantize", 'absmax < float("inf")', "absmax > 0.0", CODES),
    mutant("zeros without a scale", "quantize", "(127 - 100) << 23", "0", CODES),
]
MUTANTS = [*NORM_MUTANTS, *SWIGLU_MUTANTS, *ROPE_MUTANTS, *QUANTIZE_MUTANTS]
