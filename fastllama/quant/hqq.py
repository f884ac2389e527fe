"""HQQ: scales and zeros fitted to the weight alone, by half-quadratic splitting, without a calibration text.

Rounding to nearest covers each group's extremes. HQQ alternates: values are rounded; the shrinkage operator of a norm
with p < 1 separates outlier errors E; scale and zero are fitted to W - E by least squares.
Unlike the published method, errors are in units of the scale, so that a weight and its multiples are rounded alike;
scales are fitted too; and zeros are integers, as files require: rounded zeros alone would hardly move.
Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastllama.kernels.reference.int4 import LARGEST
from fastllama.quant.rounding import CHUNK, on_grid, round_to_nearest
from fastllama.quant.weight import QuantizedWeight

STEPS, NORM, SHRINKAGE, GROWTH = 20, 0.7, 10.0, 1.01  # as published: iterations, p, beta, and the growth of beta


def hqq(weight: Tensor, group_size: int | None, dtype: torch.dtype) -> QuantizedWeight:
    """Quantize a weight [N, K] fp32 to "int4" with fitted zeros and scales, the latter in dtype.

    group_size: as for `rounding.group_size_of`. Each group keeps the scale and zero with the least squared error of all
    iterations, which start from those of rounding to nearest.
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
        scales = torch.where(scales == 0, 1, scales)  # a group of zeros, or an underflow in dtype
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
