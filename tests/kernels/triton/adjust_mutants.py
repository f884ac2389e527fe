"""Faults planted in the kernel of biases and penalties."""

from __future__ import annotations

from fastllama.testing.mutants import Mutant
from tests.kernels.triton.planted import mutant

FILE = "sampling/adjust_logits"
OPS = "ops/test_adjust_logits.py::test_"
HONEST, ORDER = f"{OPS}adjust_logits", f"{OPS}the_order_is_bias_then_repetition_then_presence_and_frequency"
RECENT = f"{OPS}a_token_has_the_same_logit_whether_it_is_recent_or_counted"
OUTSIDE = f"{OPS}recent_ids_outside_of_the_vocabulary_are_left_out"
PASSES, BAN = f"{OPS}a_row_that_asks_for_nothing_passes_bit_for_bit", f"{OPS}a_ban_stays_a_ban"
OVERFLOW, NO_SLOT = f"{OPS}what_would_overflow_stays_a_number", f"{OPS}a_slot_past_the_tables_makes_its_row_nan"
PAST_THE_END, STRIDED = f"{OPS}recent_tokens_past_the_end_are_not_read", f"{OPS}strided_rows_and_output"
FAR = "triton/test_far.py::test_a_tensor_past_two_to_the_31_elements[adjust_logits-{}-0]"


def fault(name: str, old: str, new: str, *tests: str) -> Mutant:
    return mutant(name, FILE, old, new, *tests)


ADJUST_MUTANTS = [
    fault("no end above", "tl.where(changed > LIMIT, LIMIT, ", "tl.where(changed > LIMIT, changed, ", OVERFLOW),
    fault("no end below", "changed < -LIMIT, -LIMIT, changed", "changed < -LIMIT, changed, changed", OVERFLOW),
    fault("infinities are bounded", 'tl.where(tl.abs(x) < float("inf"), changed, x)', "changed", OVERFLOW),
    fault(
        "a ban is bounded",
        'tl.where(tl.abs(bias) < float("inf"), _bounded(x, x + bias), x + bias)',
        "_bounded(x, x + bias)",
        BAN,
    ),
    fault("a bias may overflow", "_bounded(x, x + bias), x + bias)", "x + bias, x + bias)", OVERFLOW),
    fault("a repetition penalty may overflow", "_bounded(biased, repeated), biased)", "repeated, biased)", OVERFLOW),
    fault("a presence penalty may overflow", "_bounded(x, x - less)", "x - less", OVERFLOW),
    fault(
        "one penalty after the other",
        "x - less)",
        "x - tl.load(presence_ptr + row) - (less - tl.load(presence_ptr + row)))",
        OVERFLOW,
    ),
    fault("columns past the end", "mask = col < VOCAB", "mask = col < BLOCKS * BLOCK", STRIDED),
    fault("no slot is the last's", "if slot >= num_slots:", "if slot > num_slots:", NO_SLOT),
    fault("a row that asks for nothing adjusted", "elif slot >= 0:", "else:", PASSES),
    fault(
        "recent tokens before the first",
        "tl.maximum(tl.load(starts_ptr + row), 0)",
        "tl.load(starts_ptr + row)",
        PAST_THE_END,
    ),
    fault(
        "recent tokens past the last",
        "tl.minimum(tl.load(ends_ptr + row), num_tokens)",
        "tl.load(ends_ptr + row)",
        PAST_THE_END,
    ),
    fault("the low half of an id", "tl.where((token >= 0) & (token < VOCAB), token, -1)", "token", OUTSIDE),
    fault("recent tokens count once", "generated += (col", "generated = (counted >> 1) + (col", RECENT),
    fault("recent tokens are not seen", "(counted != 0) | (generated > 0)", "counted != 0", RECENT),
    fault("prompt tokens are not seen", "(counted != 0) | (generated > 0)", "generated > 0", ORDER),
    fault("prompt tokens are generated", "generated = counted >> 1", "generated = counted + 1 >> 1", ORDER),
    fault("counts twice as high", "generated = counted >> 1", "generated = counted", HONEST),
    fault(
        "negative logits are raised",
        "tl.where(biased > 0, tl.div_rn(biased, repetition), biased * repetition)",
        "tl.div_rn(biased, repetition)",
        ORDER,
    ),
    fault("the sign before the bias", "tl.where(biased > 0", "tl.where(x > 0", ORDER),
    fault(
        "no frequency", "tl.load(frequency_ptr + row) * generated.to(tl.float32)", "tl.load(frequency_ptr + row)", ORDER
    ),
    fault("the first row's presence", "tl.load(presence_ptr + row)", "tl.load(presence_ptr)", HONEST),
    fault("the first row's frequency", "tl.load(frequency_ptr + row)", "tl.load(frequency_ptr)", HONEST),
    fault("the first row's repetition", "tl.load(repetition_ptr + row)", "tl.load(repetition_ptr)", HONEST),
    fault(
        "penalties of what is not generated",
        "x = tl.where(generated > 0, _bounded(x, x - less), x)",
        "x = _bounded(x, x - less)",
        ORDER,
    ),
    fault("a bias of the row", "slot * bias_row_stride", "row * bias_row_stride", HONEST),
    fault("counts of the row", "slot * counts_row_stride", "row * counts_row_stride", HONEST),
    fault(
        "32-bit rows",
        "(tl.program_id(0) // BLOCKS).to(tl.int64)",
        "tl.program_id(0) // BLOCKS",
        FAR.format("logits"),
        FAR.format("out"),
    ),
    fault("32-bit slots", "slot * bias_row_stride", "slot.to(tl.int32) * bias_row_stride", FAR.format("bias")),
    fault(
        "32-bit slots of counts",
        "slot * counts_row_stride",
        "slot.to(tl.int32) * counts_row_stride",
        FAR.format("counts"),
    ),
]
