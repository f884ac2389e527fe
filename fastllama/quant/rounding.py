"""Rounding to nearest, and the scales that it rounds to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.reference.int4 import GROUPS
from fastllama.quant.weight import QuantizedWeight

WHOLE_ROWS = -1  # as a group size
CLIPPING = [1 - step / 50 for step in range(26)]  # of the largest magnitude
CHUNK = 1 << 18  # weights that are searched at once, so that they stay in a CPU's cache


def group_size_of(kind: str, columns: int, group_size: int | None = None) -> int:
    """Columns that share a scale, of a weight of so many.

    group_size: the largest of 32, 64 and 128 that is at most so large and divides them; whole rows where there is none,
    or where it is the number of columns. None: 128 in "int4", whole rows in "int8". "w8a8" has whole rows always.
    """
    if group_size is None:
        group_size = max(GROUPS) if kind == "int4" else WHOLE_ROWS
    if kind == "w8a8" or group_size == columns:
        return columns
    return max((each for each in GROUPS if each <= group_size and columns % each == 0), default=columns)


def round_to_nearest(
    weight: Tensor, kind: str, group_size: int | None = None, *, symmetric: bool = True
) -> QuantizedWeight:
    """A weight [N, K], each value rounded to nearest; scales are in its dtype.

    kind: "int4", "int8" or "w8a8". group_size: as for `group_size_of`. symmetric: without zeros, which only "int4" has.
    """
    size = group_size_of(kind, weight.shape[1], group_size)
    if kind == "int4":
        return QuantizedWeight(kind, *kernels.quantize_int4(weight, size, symmetric=symmetric))
    return QuantizedWeight(kind, *kernels.quantize_int8(weight, size))


def on_grid(weight: Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """A weight [N, K], rounded to the nearest values under start's scales and zeros."""
    scales, zeros = (each[..., None] for each in start.grid)
    values = _nearest(weight.float().unflatten(1, (-1, start.group_size)), scales, zeros, start.limits)
    return replace(start, values=values.flatten(1).to(start.values.dtype))


def clipped(weight: Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """Symmetric scales with the least squared error of the weight, which may cut off a group's largest values.

    weight: [N, K]. start: of the weight rounded to nearest, symmetrically; its values are not used. Scales of both
    signs are tried, from the largest magnitude's down to half.
    Beneath GPTQ this lowers a model's KL divergence; beneath rounding to nearest it does not (docs/tuning.md).
    """
    rows = max(CHUNK // weight.shape[1], 1)
    pairs = zip(weight.split(rows), start.scales.split(rows), strict=True)
    return replace(start, scales=torch.cat([_clipped(part.float(), scales, start) for part, scales in pairs]))


def _clipped(weight: Tensor, scales: Tensor, start: QuantizedWeight) -> Tensor:
    groups = weight.unflatten(1, (-1, start.group_size))
    _, zeros = (each[: len(weight), :, None] for each in start.grid)
    best, least = scales, torch.full(scales.shape, torch.inf, dtype=torch.float32, device=scales.device)
    for factor in CLIPPING:
        for sign in (1, -1):
            tried = (scales * (sign * factor)).to(scales.dtype)
            wide = tried.float()[..., None]
            values = _nearest(groups, wide, zeros, start.limits)
            error = values.sub_(zeros).mul_(wide).sub_(groups).square_().sum(2)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _nearest(groups: Tensor, scales: Tensor, zeros: Tensor, limits: tuple[int, int]) -> Tensor:
    """Values of groups [N, K / G, G]; where a scale is 0 the zero."""
    return (groups / torch.where(scales == 0, torch.inf, scales)).round_().add_(zeros).clamp_(*limits)
