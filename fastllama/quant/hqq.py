"""HQQ: scales and zeros fitted to the weight alone, by half-quadratic splitting, without a calibration text.

Rounding to nearest spans each group's extremes. Here values are rounded, the errors E that a norm with p < 1 takes for
outliers are set aside by its shrinkage, and scale and zero become those of least squares for W - E, in turns.
Other than as published, errors are in units of the scale, so that a weight and its multiple are rounded alike; scales
are fitted too; and zeros are whole numbers, which is what files can hold: rounded so, zeros alone hardly move.
Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastllama.kernels.reference.int4 import LARGEST
from fastllama.quant.rounding import CHUNK, on_grid, round_to_nearest
from fastllama.quant.weight import QuantizedWeight

STEPS, NORM, SHRINKAGE, GROWTH = 20, 0.7, 10.0, 1.01  # as published: iterations, p, beta, and what multiplies beta


def hqq(weight: Tensor, group_size: int | None, dtype: torch.dtype) -> QuantizedWeight:
    """A weight [N, K] fp32 in "int4" with zeros, whose scales in dtype and zeros were fitted.

    group_size: as for `rounding.group_size_of`. Of what the iterations give, each group has the scale and zero with the
    least squared error; the first are those of rounding to nearest.
    """
    start = round_to_nearest(weight, "int4", group_size, symmetric=False)
    rows = max(CHUNK // weight.shape[1], 1)
    parts = zip(*(each.split(rows) for each in (weight, *start.grid)), strict=True)
    groups = ((part.unflatten(1, (-1, start.group_size)), scales, zeros) for part, scales, zeros in parts)
    fitted = [_fitted(*each, dtype) for each in groups]
    scales, zeros = (torch.cat(each) for each in zip(*fitted, strict=True))
    return on_grid(weight, replace(start, scales=scales.to(dtype), zeros=zeros.to(torch.uint8)))


def _fitted(groups: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, K / G] fp32 of groups [N, K / G, G], from those of rounding to nearest."""
    scales, zeros = scales[..., None], zeros[..., None]
    best_scales, best_zeros, least = scales, zeros, torch.full_like(scales, torch.inf)
    shrinkage = SHRINKAGE
    for _ in range(STEPS):
        scales = scales.to(dtype).float()
        scales = torch.where(scales == 0, 1, scales)  # of zeros alone, or of what dtype does not hold
        steps = groups / scales
        values = steps.round().add_(zeros).clamp_(0, LARGEST)
        levels = values - zeros
        errors = steps - levels
        squared = (errors * scales).square_().sum(2, keepdim=True)
        better = squared < least
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
        least = torch.where(better, squared, least)
        outliers = errors.sign() * (errors.abs() - errors.abs() ** (NORM - 1) / shrinkage).clamp_(min=0)
        sought = steps.sub_(outliers).mul_(scales)
        squares = levels.square().sum(2, keepdim=True)
        scales = torch.where(squares > 0, (sought * levels).sum(2, keepdim=True) / squares, scales)
        zeros = (values - sought / torch.where(scales == 0, 1, scales)).mean(2, keepdim=True).round().clamp_(0, LARGEST)
        shrinkage *= GROWTH
    return best_scales[..., 0], best_zeros[..., 0]
