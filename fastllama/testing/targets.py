"""The GPU targets of compiled kernels, which need not be present: limits per multiprocessor, and occupancy.

Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

from fastllama.errors import check_choice

_KIB = 1024
_SCHEDULERS = 4  # per multiprocessor (NVIDIA) or compute unit (AMD)


@dataclass(frozen=True)
class Target:
    """One GPU architecture, with the size of a common model. `arch` is Triton's spelling; memory is in bytes."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str
    warp_size: int
    multiprocessors: int  # compute units on AMD
    registers: int  # 32-bit registers of one scheduler
    max_warps: int  # resident on a multiprocessor
    max_blocks: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved: int  # taken by the driver from every block
    tensor_memory: int = 0  # columns of Blackwell's memory for tensor cores

    @property
    def triton(self) -> Any:
        """The GPUTarget of Triton's compiler."""
        return GPUTarget(self.backend, self.arch, self.warp_size)


def _nvidia(
    arch: int, *, multiprocessors: int, max_warps: int, max_blocks: int, shared_per_multiprocessor: int
) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        multiprocessors=multiprocessors,
        registers=16384,
        max_warps=max_warps,
        max_blocks=max_blocks,
        shared_per_block=(shared_per_multiprocessor - 1) * _KIB,
        shared_per_multiprocessor=shared_per_multiprocessor * _KIB,
        shared_reserved=_KIB,
        tensor_memory=512 if arch == 100 else 0,
    )


TARGETS = {
    target.name: target
    for target in (
        # A100, RTX 4090, H100 and H200, B200
        _nvidia(80, multiprocessors=108, max_warps=64, max_blocks=32, shared_per_multiprocessor=164),
        _nvidia(89, multiprocessors=128, max_warps=48, max_blocks=24, shared_per_multiprocessor=100),
        _nvidia(90, multiprocessors=132, max_warps=64, max_blocks=32, shared_per_multiprocessor=228),
        _nvidia(100, multiprocessors=148, max_warps=64, max_blocks=32, shared_per_multiprocessor=228),
        Target(
            name="gfx942",  # MI300X
            backend="hip",
            arch="gfx942",
            warp_size=64,
            multiprocessors=304,
            registers=32768,
            max_warps=32,
            max_blocks=16,
            shared_per_block=64 * _KIB,
            shared_per_multiprocessor=64 * _KIB,
            shared_reserved=0,
        ),
    )
}


def target(name: str) -> Target:
    """The target of that name. Raises ValueError with the legal names."""
    check_choice("target", name, TARGETS)
    return TARGETS[name]


@dataclass(frozen=True)
class Occupancy:
    """The number of a kernel's blocks resident on one multiprocessor, and the limiting resource."""

    blocks: int
    percent: int  # of the warps that the multiprocessor can hold
    limiter: str  # "registers", "shared memory", "tensor memory", "warps" or "blocks"


def occupancy(target: Target, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> Occupancy:
    """For blocks of `warps` warps: registers per thread (allocated in eights), bytes of shared memory, columns."""
    per_warp = max(-(-registers // 8), 1) * 8 * target.warp_size
    # A compute unit has 16 barriers, one per block; a block of one warp needs none.
    blocks = target.max_warps if target.backend == "hip" and warps == 1 else target.max_blocks
    limits = {
        "warps": target.max_warps // warps,
        "registers": _SCHEDULERS * (target.registers // per_warp) // warps,
        "shared memory": _blocks_by_shared(target, shared),
        "blocks": blocks,
        "tensor memory": target.tensor_memory // tensor_memory if tensor_memory else blocks,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limiter], 100 * limits[limiter] * warps // target.max_warps, limiter)


def _blocks_by_shared(target: Target, shared: int) -> int:
    if shared > target.shared_per_block:
        return 0
    taken = shared + target.shared_reserved
    return target.shared_per_multiprocessor // taken if taken else target.max_warps
