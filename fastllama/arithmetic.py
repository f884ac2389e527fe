"""Whole numbers of blocks."""

from __future__ import annotations


# Launchers use these two: triton.next_power_of_2 and triton.cdiv take 5 us each on the host, a third of a launch.
def power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)
