"""Announces on stderr that kernels are being compiled, whichever compiler does it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from fastllama.kernels.dispatch.op import backend_of


def compiling_announced(device: torch.device) -> AbstractContextManager[None]:
    """A context in which compiling kernels for a CPU is announced on stderr, if it takes more than a moment.

    Without a stderr (pythonw, a service, `2>&-`) nothing is printed.
    """
    silent = sys.stderr is None or getattr(sys.stderr, "closed", False)
    if silent or not any(each.backend == "numba" for each in backend_of(device).values()):
        return nullcontext()
    from fastllama.kernels.numba.compiling import announced

    return announced()
