"""Settings of torch for a process or a thread, which must change no bit of a result; each is restored after its use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def within(write: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    write(value)
    try:
        yield
    finally:
        write(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return within(torch.set_default_dtype, dtype, torch.get_default_dtype())


def default_device(device: str) -> AbstractContextManager[None]:
    return within(torch.set_default_device, device, None)


def matmul_precision(precision: str) -> AbstractContextManager[None]:
    return within(torch.set_float32_matmul_precision, precision, torch.get_float32_matmul_precision())


def fp32_precision(place: Any, precision: str) -> AbstractContextManager[None]:
    """place: torch.backends, or a backend's operators, "none" of themselves."""
    return within(partial(setattr, place, "fp32_precision"), precision, "none")


@contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    """Where it is off, uninitialised memory is not filled: tests/conftest.py turns it on, with warnings alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def default_settings() -> tuple[Any, ...]:
    """The values of all settings, to check that they are restored."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it contradicts a backend's
        precision = ""
    read = getattr(torch._C, "_get_fp32_precision_getter", lambda *place: "ieee")
    places = [("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul"), ("cuda", "all"), ("cuda", "matmul")]
    fp32 = (read(*place).replace("none", "ieee") for place in places)  # the default, which is not always named
    sums = (torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),)
    sums += (torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),)
    return torch.get_default_dtype(), torch.get_default_device(), precision, *fp32, *sums


Setting = Callable[[], AbstractContextManager[Any]]

SETTINGS: Mapping[str, Setting] = {
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp16": lambda: default_dtype(torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "matmul precision high": lambda: matmul_precision("high"),
    "SDPA: math": lambda: sdpa_kernel(SDPBackend.MATH),
    "SDPA: flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "SDPA: what a CPU has not": lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]),
    "deterministic": lambda: deterministic(True),
    "not deterministic": lambda: deterministic(False),
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
}
if hasattr(torch._C, "_get_fp32_precision_getter"):  # torch 2.9
    SETTINGS = {
        **SETTINGS,
        "fp32_precision bf16 of the CPU's matmuls": lambda: fp32_precision(torch.backends.mkldnn.matmul, "bf16"),
        "fp32_precision bf16": lambda: fp32_precision(torch.backends, "bf16"),
        "fp32_precision tf32": lambda: fp32_precision(torch.backends, "tf32"),
    }
