"""Runs code as if torch's autocast were off, whoever called it.

Autocast intercepts torch's matmuls and casts their operands: w8a8's sums, exact in fp32, were 2e-3 off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

Function = Callable[..., Any]

_DEVICES = ("CPU", "CUDA", "XPU", "MPS", "HPU", "IPU", "PrivateUse1", "PrivateUse2")


def _autocast_keys() -> Any:
    keys = [getattr(torch._C.DispatchKey, f"Autocast{device}", None) for device in _DEVICES]
    return functools.reduce(lambda a, b: a | b, [torch._C.DispatchKeySet(key) for key in keys if key is not None])


_AUTOCAST_KEYS = _autocast_keys()


def autocast_enabled(device_type: str) -> bool:
    """Whether the calling thread is inside torch.autocast for a device type: 0.1 us."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast() -> AbstractContextManager[None]:
    """Within, autocast intercepts nothing in the calling thread: 0.5 us.

    Its dispatch keys are excluded. `torch.autocast(enabled=False)` takes 23 us, and on the way out of the outermost
    empties autocast's cache of weights.
    """
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)
    return guard


def without_autocast(run: Function) -> Function:
    """`run` within `no_autocast`, for a caller that finds `autocast_enabled`."""

    @functools.wraps(run)
    def isolated(*args: Any) -> Any:
        with no_autocast():
            return run(*args)

    return isolated
