"""Helpers for tests of ops: the error bound (fastllama/testing/bounds.py), and public ops on one backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.testing.bounds import assert_equal, assert_honest, error

__all__ = ["DTYPES", "assert_equal", "assert_honest", "backends", "double", "error", "on_cpu", "public"]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_cpu(op: str) -> list[str]:
    """The backends that run an op on CPU tensors here, the preferred first."""
    return [each.backend for each in OPS[op].implementations("cpu")]


def backends(op: str) -> list[Any]:
    """Parameters: everything that runs an op on CPU tensors, and its Triton kernel where the interpreter can."""
    return [*on_cpu(op), pytest.param("triton", marks=pytest.mark.interpreter)]


def implementation(op: str, backend: str) -> Callable[..., None]:
    """What runs an op on CPU tensors on one backend."""
    if backend == "triton":
        return OPS[op].launcher("cpu")
    (run,) = (each.run for each in OPS[op].implementations("cpu") if each.backend == backend)
    return run


def public(op: str, backend: str) -> Callable[..., Any]:
    """The public function of an op, on one backend."""
    run = implementation(op, backend)

    def call(*args: Any, **options: Any) -> Any:
        with OPS[op].bound_to(torch.device("cpu"), run):
            return getattr(kernels, op)(*args, **options)

    return call


def double(*values: Any) -> list[Any]:
    """Floating tensors in fp64, everything else as it is."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
