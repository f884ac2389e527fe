"""Prove a Triton kernel of your own without a GPU: its values and memory accesses, then its machine code for GPUs.

python examples/own_kernel.py

`fastllama.testing` knows nothing of fastllama's kernels: replace softmax_kernel by yours. Triton decides at import
whether to interpret or to compile, so the two halves are two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.testing.bounds import assert_honest, error
from fastllama.testing.checks import CheckError, checks
from fastllama.testing.compile_report import compile_report, table


@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, columns, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * row_stride + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < (columns if MASKED else BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=-float("inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + offsets, (x / tl.sum(x, 0)).to(out_ptr.dtype.element_ty), mask=inside)


def softmax(x: Tensor, masked: bool = True) -> Tensor:
    """Softmax of each row of x [M, N]. masked=False plants the fault of a forgotten mask."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    softmax_kernel[(len(x),)](out, x, x.stride(0), x.shape[1], MASKED=masked, BLOCK=block)
    return out


def values() -> None:
    """In Triton's interpreter: errors against fp64, bytes moved, and what a forgotten mask is caught by."""
    x = torch.randn(5, 300, dtype=torch.bfloat16)
    exact = torch.softmax(x.double(), -1)
    with checks() as report:
        found = softmax(x)
    assert_honest(found, torch.softmax(x, -1), exact)  # at most twice the error of plain torch in bf16
    print(f"error {error(found, exact):.1e}, plain torch's {error(torch.softmax(x, -1), exact):.1e}")
    print(f"{report.bytes_loaded} bytes loaded for an input of {x.nbytes}: one pass over memory")
    try:
        with checks():
            softmax(x, masked=False)
    except CheckError as caught:
        print(f"without its mask: {caught}")


def machine_code() -> None:
    """Compiled ahead of time: registers, spills, shared memory and access widths, with no such GPU here."""
    report = compile_report(lambda: softmax(torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")))
    print(table(report), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        values()
    else:
        subprocess.run([sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
        machine_code()
