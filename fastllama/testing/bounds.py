"""The error bound of tests: twice the error of plain torch in the same dtype, instead of a fixed tolerance.

error(x) = max over rows (vectors along the last dimension) of max |x - exact| / max |exact|, exact computed in fp64.
An implementation passes if error(ours) <= 2 * error(plain torch in the same dtype) + one rounding of it (eps / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def error(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of any row; inf where only one is NaN. Equal infinities have error 0.

    found, exact: one shape, [..., N].
    """
    if found.shape != exact.shape:
        raise AssertionError(f"the result has shape {list(found.shape)}, the exact one {list(exact.shape)}")
    if not exact.numel():
        return 0.0
    found, exact = found.double(), exact.double()
    difference = (found - exact).abs().masked_fill(found == exact, 0.0)
    difference = difference.masked_fill(difference.isnan(), math.inf).masked_fill(found.isnan() & exact.isnan(), 0.0)
    size = exact.abs().masked_fill(~exact.isfinite(), 0.0).amax(-1)
    return float((difference.amax(-1) / size.where(size > 0, 1.0)).max())


def bound(theirs: float, dtype: torch.dtype) -> float:
    """The legal error, given plain torch's error `theirs` in a dtype: twice that, plus one rounding."""
    return 2 * theirs + torch.finfo(dtype).eps / 2


def assert_honest(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless the error of `found` is within the bound.

    found: [..., N], the result under test. plain: plain torch's in that dtype. exact: fp64, from the same inputs.
    """
    if found.dtype != plain.dtype:
        raise AssertionError(f"the result has dtype {found.dtype}, plain torch's {plain.dtype}")
    if exact.dtype != torch.float64:
        raise AssertionError(f"the exact result has dtype {exact.dtype}; legal: torch.float64")
    ours, theirs = error(found, exact), error(plain, exact)
    legal = bound(theirs, plain.dtype)
    if not ours <= legal:
        rounding = bound(0.0, plain.dtype)
        raise AssertionError(
            f"error {ours:.3g}; legal: {legal:.3g} (twice plain torch's {theirs:.3g}, and {rounding:.3g})"
        )


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both are bit-identical, dtype included; NaN equals NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
