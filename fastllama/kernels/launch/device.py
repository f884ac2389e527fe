"""Properties of a device that decide how kernels are launched; queried from the driver once."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One device as launch configurations see it.

    name: lower case with dashes ("nvidia-h200"), the folder of its tuned configurations. arch: "sm_90", "gfx942" or
    "cpu". num_sms: multiprocessors (compute units on AMD). warp_size: threads of a warp. shared_memory: bytes that one
    block may take. l2_cache: bytes.
    """

    name: str
    arch: str
    num_sms: int
    warp_size: int
    shared_memory: int
    l2_cache: int


# The interpreter runs launchers on CPU tensors: they get the launches of a small GPU.
CPU = Device("cpu", "cpu", num_sms=1, warp_size=32, shared_memory=48 << 10, l2_cache=1 << 20)


@functools.cache
def device_info(device: torch.device) -> Device:
    """The properties of a torch device. A CPU's are returned without touching CUDA."""
    if device.type != "cuda":
        return CPU
    gpu = torch.cuda.get_device_properties(device)
    amd = getattr(gpu, "gcnArchName", "") if torch.version.hip else ""
    return Device(
        name=slug(gpu.name),
        arch=amd.split(":")[0] or f"sm_{gpu.major}{gpu.minor}",
        num_sms=gpu.multi_processor_count,
        warp_size=gpu.warp_size,
        shared_memory=getattr(gpu, "shared_memory_per_block_optin", 0) or gpu.shared_memory_per_block,
        l2_cache=gpu.L2_cache_size,
    )


def arch(device: torch.device) -> str:
    """The architecture that kernels are compiled for: "sm_90", "gfx942", or "cpu" where kernels are interpreted."""
    return device_info(device).arch


def runs_natively(dtype: torch.dtype) -> bool:
    """Whether torch has this CPU's matrix instructions for a 16-bit dtype (AVX-512 BF16 or FP16, AMX, Arm BF16)."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def slug(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
