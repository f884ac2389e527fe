"""Programmatic dependent launch: a kernel begins while the one before it in the stream ends (NVIDIA, sm_90 and on).

Each kernel that is launched so lets the next one begin at its own first instruction, and waits for the one before ahead
of its first access to memory: `follow`. Only prefetches of weights into L2, which no launch writes, stand in between.
Every program waits, on every path. So when a wait returns, all launches before are complete, not only the last one: it
could not complete before its own wait did. A kernel that is launched without the option waits for all of them anyway.
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
    """Whether a launch on a device may begin before the one before it has ended: never in the interpreter."""
    target = arch(device)
    able = device.type != "cpu" and target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90
    return able and env.PDL.read() == "1"


def overlapping(device: torch.device) -> dict[str, bool]:
    """The arguments and options with which a kernel that takes PDL is launched on a device."""
    if overlaps(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}  # launch_pdl is an option of NVIDIA's compiler alone


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next launch begin, and wait for the one before."""
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
    """Ask L2 for the lines at ptrs, of what no launch writes: between `release` and `wait`."""
    if PDL:
        FETCH: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(FETCH, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
