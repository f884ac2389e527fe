"""tl.rand in a kernel gives the random numbers of the reference, so that both sample the same tokens."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastllama.kernels.reference.sampling import philox
from tests.kernels.honest import assert_equal


# One program owns one row.
@triton.jit
def draw_kernel(out_ptr, seed_ptr, offset_ptr):
    row = tl.program_id(0)
    seed = tl.load(seed_ptr + row)
    offset = tl.load(offset_ptr + row).to(tl.int32)  # 64-bit counters would make it another generator
    tl.store(out_ptr + row, tl.rand(seed, offset))


@pytest.mark.interpreter
def test_tl_rand_gives_the_numbers_of_the_reference() -> None:
    extremes = [0, 1, -1, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63)]
    offsets = [0, 1, 1000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
    seeds = torch.cat((torch.tensor(extremes), torch.randint(-(1 << 62), 1 << 62, (40,))))
    counters = torch.cat((torch.tensor(offsets), torch.randint(0, 1 << 32, (40,))))
    out = torch.empty(47)
    draw_kernel[(47,)](out_ptr=out, seed_ptr=seeds, offset_ptr=counters)
    assert_equal(out, philox(seeds, counters))
