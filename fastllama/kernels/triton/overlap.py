"""Programmatic dependent launch: a kernel begins while the previous one in the stream ends (NVIDIA, sm_90 and later).

Each kernel launched so lets the next one begin at its own first instruction, and waits for the previous one before its
first access to memory: `follow`. Only prefetches of weights into L2, which no launch writes, come before the wait.
Every program waits, on every path. So when a wait returns, all earlier launches are complete, not only the last: that
one could not complete before its own wait returned. A kernel launched without the option waits for all of them anyway.
Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastllama import env
from fastllama.kernels.launch.device import arch


def overlaps(device: torch.device) -> bool:
    """Whether a launch on a device may begin before the previous one has ended: never in the interpreter."""
    target = arch(device)
    able = device.type != "cpu" and target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90
    return able and env.PDL.read() == "1"


def overlapping(device: torch.device) -> dict[str, bool]:
    """The arguments and options, on a device, of a launch of a kernel with a PDL parameter."""
    if overlaps(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}  # launch_pdl is an option of NVIDIA's compiler alone


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next launch begin, and wait for the previous one."""
    release(PDL)
    wait(PDL)


@triton.jit
def release(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(ptrs, PDL: tl.constexpr):
    """Prefetch the lines at ptrs, which no launch may write, into L2: between `release` and `wait`."""
    if PDL:
        FETCH: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(FETCH, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
