"""Rounding to nearest, and the choice of scales for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.reference.int4 import GROUPS, LARGEST, MIDDLE
from fastllama.quant.weight import QuantizedWeight

WHOLE_ROWS = -1  # as a group size
CLIPPING = 1, 0.96, 0.92, 0.88, 0.84, 0.8  # of the largest magnitude; 26 steps down to half gained nothing
CHUNK = 1 << 16  # weights searched at once, which fit into a CPU's cache


def group_size_of(kind: str, columns: int, group_size: int | None = None) -> int:
    """The number of columns that share a scale, for a weight of `columns` columns.

    It is the largest of 32, 64 and 128 that is at most group_size and divides the columns; else, or if group_size is
    the number of columns, whole rows. None: 128 for "int4", whole rows for "int8". "w8a8" always has whole rows.
    """
    if group_size is None:
        group_size = max(GROUPS) if kind == "int4" else WHOLE_ROWS
    if kind == "w8a8" or group_size == columns:
        return columns
    return max((each for each in GROUPS if each <= group_size and columns % each == 0), default=columns)


def round_to_nearest(
    weight: Tensor, kind: str, group_size: int | None = None, *, symmetric: bool = True
) -> QuantizedWeight:
    """Quantize a weight [N, K], rounded to nearest; scales are in its dtype.

    kind: "int4", "int8" or "w8a8". group_size: as for `group_size_of`. symmetric: without zeros; only "int4" has any.
    """
    size = group_size_of(kind, weight.shape[1], group_size)
    if kind == "int4":
        return QuantizedWeight(kind, *kernels.quantize_int4(weight, size, symmetric=symmetric))
    return QuantizedWeight(kind, *kernels.quantize_int8(weight, size))


def on_grid(weight: Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """Quantize a weight [N, K] with start's scales and zeros, rounded to nearest."""
    scales, zeros = (each[..., None] for each in start.grid)
    values = _nearest(weight.float().unflatten(1, (-1, start.group_size)), scales, zeros, start.limits)
    return replace(start, values=values.flatten(1).to(start.values.dtype))


def clipped(weight: Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """Scales for "int4" with the least squared error of the weight, which may clip a group's largest values.

    weight: [N, K]. start: of the weight rounded to nearest, symmetrically; its values are not used. Scales of both
    signs are tried, for the largest magnitude and down to 0.8 of it.
    With GPTQ this lowers a model's KL divergence; with rounding to nearest it does not (docs/measured/cpu.md).
    """
    rows = max(CHUNK // weight.shape[1], 1)
    parts = weight.unflatten(1, (-1, start.group_size)).split(rows)
    found = [_clipped(part.float(), scales) for part, scales in zip(parts, start.scales.split(rows), strict=True)]
    return replace(start, scales=torch.cat(found))


def _clipped(groups: Tensor, scales: Tensor) -> Tensor:
    best, least = scales, torch.full(scales.shape, torch.inf, dtype=torch.float32, device=scales.device)
    for factor in CLIPPING:
        tried = (scales * factor).to(scales.dtype)
        wide = tried.float()[..., None]
        levels = groups.div(torch.where(wide == 0, torch.inf, wide)).round_()
        for sign in (1, -1):  # of the scale: levels are -8 to 7, or 8 to -7
            low, high = sorted((-sign * MIDDLE, sign * (LARGEST - MIDDLE)))
            error = torch.linalg.vector_norm(torch.addcmul(groups, levels.clamp(low, high), wide, value=-1), dim=2)
            best, least = torch.where(error < least, sign * tried, best), torch.minimum(error, least)
    return best


def _nearest(groups: Tensor, scales: Tensor, zeros: Tensor, limits: tuple[int, int]) -> Tensor:
    """Quantized values of groups [N, K / G, G]; the zero where a scale is 0."""
    return (groups / torch.where(scales == 0, torch.inf, scales)).round_().add_(zeros).clamp_(*limits)
