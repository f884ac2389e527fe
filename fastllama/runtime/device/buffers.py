"""Host-to-device transfer buffers; pinned on a GPU, so that the copy is asynchronous."""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastllama.arithmetic import ceil_div

ALIGNMENT = 16  # bytes, for Triton's widest accesses


# NumPy converts a list in 1.4 us, torch.tensor in 3.9, and a decode step has a dozen.
_IN_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32, torch.float64: np.float64}


def on_device(values: abc.Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the values as a tensor on the device; copied to a GPU asynchronously, from pinned memory."""
    host = torch.from_numpy(np.array(values, _IN_NUMPY[dtype]))
    if device.type == "cpu":
        return host
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Buffers:
    """Tensors at fixed addresses, filled on the host and copied to the device together.

    host, device: the same tensors by name, initially zero; on a CPU they share memory. On a GPU the copy goes through
    one of two pinned buffers, since a step is prepared while the previous one runs. Before a buffer is refilled, an
    event confirms that it was copied, which blocks only after steps that were never read (after Ctrl-C).
    """

    def __init__(self, wanted: Mapping[str, tuple[abc.Sequence[int], torch.dtype]], device: torch.device) -> None:
        end = 0
        self._places: dict[str, slice] = {}  # in bytes
        for name, (shape, dtype) in wanted.items():
            size = math.prod(shape) * dtype.itemsize
            self._places[name] = slice(end, end + size)
            end += ceil_div(size, ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, device="cpu")
        num_pinned = 2 if device.type == "cuda" else 0
        self._pinned = [(torch.empty_like(self._host, pin_memory=True), torch.cuda.Event()) for _ in range(num_pinned)]
        self._device = self._host if device.type == "cpu" else torch.zeros(end, dtype=torch.uint8, device=device)
        hosts, self.device = (
            {name: memory[self._places[name]].view(dtype).view(*shape) for name, (shape, dtype) in wanted.items()}
            for memory in (self._host, self._device)
        )
        self.host = {name: tensor.numpy() for name, tensor in hosts.items()}

    def span(self, first: str, last: str) -> Tensor:
        """Returns the device memory from the start of one tensor to the end of another, as bytes."""
        return self._device[self._places[first].start : self._places[last].stop]

    def send(self, before: str | None = None) -> None:
        """Copy all tensors to the device, or those before one of them, asynchronously."""
        end = None if before is None else self._places[before].start
        if self._pinned:
            self._pinned.reverse()
            pinned, copied = self._pinned[0]
            if not copied.query():
                copied.synchronize()
            pinned[:end].copy_(self._host[:end])
            self._device[:end].copy_(pinned[:end], non_blocking=True)
            copied.record(torch.cuda.current_stream(self._device.device))
        elif self._device is not self._host:
            self._device[:end].copy_(self._host[:end])
