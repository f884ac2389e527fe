"""Detects permanent device errors: some GPU faults stay until the process ends."""

from __future__ import annotations

import torch


def device_error(device: torch.device) -> Exception | None:
    """Returns the error that a minimal operation raises on the device; None if it works or memory is short.

    After an illegal access, a failed assertion in a kernel or a lost GPU, every later call of the process raises.
    """
    if device.type != "cuda":
        return None
    try:
        torch.ones(1, dtype=torch.int32, device=device).item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return error
    return None
