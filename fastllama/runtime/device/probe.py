"""Whether a device still works: some faults of a GPU stay until the process ends."""

from __future__ import annotations

import torch


def device_error(device: torch.device) -> Exception | None:
    """What the device answers to the smallest piece of work, if that is an error; too little memory is none.

    After an illegal access, a failed assertion in a kernel or a lost GPU every later call of the process raises.
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
