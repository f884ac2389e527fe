"""Integer division and powers of two, clamping to fp32, and exp without overflow."""

from __future__ import annotations

import math

FP32_SMALLEST, FP32_LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal and finite


# For launchers: triton.next_power_of_2 and triton.cdiv take 5 us each on the host, a third of a launch.
def power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def within_fp32(value: float) -> float:
    """`value` with its magnitude clamped to the normal fp32 numbers; 0 and the sign are kept."""
    if value == 0:
        return value
    return math.copysign(min(max(abs(value), FP32_SMALLEST), FP32_LARGEST), value)


def exp(value: float) -> float:
    """e to the power of `value`; inf instead of OverflowError beyond fp64."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
