"""The honest bound, and public ops on one chosen implementation.

error(x) = max over rows (vectors along the last dimension) of max |x - exact| / max |exact|, exact the fp64 reference.
An implementation passes if error(ours) <= 2 * error(plain torch in the same dtype) + one rounding of it (eps / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.op import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def error(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of any row; inf where one is NaN and the other is not. Equal infinities are equal."""
    assert found.shape == exact.shape
    if not exact.numel():
        return 0.0
    found, exact = found.double(), exact.double()
    difference = (found - exact).abs().masked_fill(found == exact, 0.0).nan_to_num(nan=math.inf)
    size = exact.abs().masked_fill(exact.isinf(), 0.0).amax(-1)
    return float((difference.amax(-1) / size.where(size > 0, 1.0)).max())


def assert_honest(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Ours against the oracle, in the shape and dtype of plain torch's."""
    assert found.dtype == plain.dtype
    assert exact.dtype == torch.float64
    bound = 2 * error(plain, exact) + torch.finfo(plain.dtype).eps / 2
    assert error(found, exact) <= bound


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, dtype included."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def on_cpu(op: str) -> list[str]:
    """The backends that run an op on CPU tensors here, the preferred first."""
    return [each.backend for each in OPS[op].implementations("cpu")]


def public(op: str, backend: str) -> Callable[..., Any]:
    """The public function of an op, on one backend."""
    (run,) = (each.run for each in OPS[op].implementations("cpu") if each.backend == backend)

    def call(*args: Any, **options: Any) -> Any:
        with mock.patch.dict(OPS[op]._bound, {torch.device("cpu"): run}):
            return getattr(kernels, op)(*args, **options)

    return call


def double(*values: Any) -> list[Any]:
    """Floating tensors in fp64, everything else as it is."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
