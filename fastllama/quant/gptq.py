"""GPTQ: rounds a weight column by column, so that each compensates for the rounding errors of those before it.

The values Q minimise, one column after another, the error of the output over the calibration text,
||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T) with the Hessian H = X^T X. With H = (A + I) D (A + I)^T, where A is
strictly upper triangular and D diagonal, column j is W_j + sum_{i < j} (W_i - Q_i) A_ij, rounded to nearest. GPTQ
finds the same values by the Cholesky factor of the inverse; this takes one Cholesky factor and no inverse.

Columns are rounded in descending order of the diagonal of H, with scales that are fixed before ("act-order" with
"static groups"): the most important come first, and the weight keeps its order.
Sources: Frantar et al., GPTQ, arXiv:2210.17323; Chee et al., QuIP, arXiv:2307.13304, theorem 6: the two are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastllama.quant.weight import QuantizedWeight

BLOCK = 128  # columns whose errors are added to later columns in one matmul
DAMPING = 0.01  # of the mean of H's diagonal, added to it


def gptq(weight: Tensor, hessian: Tensor, start: QuantizedWeight, damping: float = DAMPING) -> QuantizedWeight:
    """Quantize a weight [N, K] with start's scales and zeros; GPTQ chooses the values.

    hessian: [K, K] fp32, the sum of x^T x over rows x of the input, times any factor. A column whose input is always 0
    (a 0 on the diagonal) is rounded to nearest. start: its values are not used.
    Memory: three times the Hessian and twice the weight in fp32.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    feedback = feedback_of(hessian, order, damping)
    sought = weight.T[order].float()  # [K, N], a copy, in which columns of the weight are contiguous
    scales, zeros = (each.T.contiguous() for each in start.grid)  # [K / G, N]
    steps = torch.where(scales == 0, torch.inf, scales)
    values = torch.empty(sought.shape, dtype=start.values.dtype, device=weight.device)
    columns = order.tolist()
    for begin in range(0, len(columns), BLOCK):
        end = min(begin + BLOCK, len(columns))
        block, own = sought[begin:end], feedback[begin:end]
        errors = weight.T[order[begin:end]].float()
        for i, column in enumerate(columns[begin:end]):
            group = column // start.group_size
            nearest = (block[i] / steps[group]).round_().add_(zeros[group]).clamp_(*start.limits)
            values[column] = nearest.to(values.dtype)
            errors[i] -= nearest.sub_(zeros[group]).mul_(scales[group])
            block[i + 1 :].addr_(own[i, begin + i + 1 : end], errors[i])
        sought[end:].addmm_(own[:, end:].T, errors)
    return replace(start, values=values.T.contiguous())


def feedback_of(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """A of H = (A + I) D (A + I)^T [K, K], above the diagonal; on and below it the numbers are meaningless.

    order: [K], permutes rows and columns of the Hessian. damping: this times the mean of H's diagonal is added to the
    diagonal. Computed in fp32, and in fp64 if H is not positive definite in fp32. Raises ValueError if both fail: H is
    not a sum of x^T x, or holds NaN or infinity.
    """
    backwards = order.flip(0)
    damped = hessian[backwards][:, backwards]  # a copy, whose lower Cholesky factor is H's upper one, backwards too
    mean = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, damping * mean, 1))
    lower = _cholesky(damped)
    if lower is None:
        lower = _cholesky(damped.double())
    if lower is None:
        raise ValueError("hessian is not positive definite; legal: a sum of x^T x over finite rows x")
    del damped
    upper = lower.flip(0, 1).float()
    return upper.div_(upper.diagonal().clone())


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor; None if the matrix is not positive definite or not finite: NaN reach the diagonal."""
    lower, trouble = torch.linalg.cholesky_ex(matrix)
    return None if trouble or not lower.diagonal().isfinite().all() else lower
