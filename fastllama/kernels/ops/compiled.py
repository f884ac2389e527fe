"""The kernels of each compiler, imported on first use, so that Numba and Triton stay optional."""

from __future__ import annotations

from collections.abc import Mapping

from fastllama.kernels.dispatch.backends import Kernels


def numba_kernels() -> Mapping[str, Kernels]:
    """The Numba kernels by op."""
    from fastllama.kernels.numba.table import KERNELS

    return KERNELS


def triton_kernels() -> Mapping[str, Kernels]:
    """The Triton kernels by op."""
    from fastllama.kernels.triton.table import KERNELS

    return KERNELS
