"""Scales for the input channels of a linear layer, with which its weight, or its input, is easier to round.

x W^T = (x / s) (W s)^T. AWQ makes the columns of channels with large activations larger, so that rounding the weight
costs them less; SmoothQuant takes outlier channels of the activations into the weight, where both become 8 bits. Either
finds its exponent by the error of the layer's output on sampled rows, and no scaling at all is among what is tried.
Sources: Lin et al., AWQ, arXiv:2306.00978; Xiao et al., SmoothQuant, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.quant.rounding import round_to_nearest

STEPS = 20  # exponents, evenly spaced from 0
FLOOR = 1e-4  # of the largest magnitude: a channel that is never fed counts as this, so that scales stay within bounds
Function = Callable[[Tensor], Tensor]


def awq_scales(weight: Tensor, rows: Tensor, magnitudes: Tensor, quantize: Function) -> Tensor:
    """Scales [K] by which columns of a weight are multiplied before it is rounded, and inputs divided.

    weight: [N, K] fp32. rows: [R, K] fp32, sampled from the input. magnitudes: [K], the mean of |x| over rows; channels
    that must have one scale have one magnitude. quantize: from a weight to what it is once it is rounded, both fp32.
    """

    def output(scales: Tensor) -> Tensor:
        return (rows / scales) @ quantize(weight * scales).T

    magnitudes = _floored(magnitudes)
    return _best((magnitudes ** (step / STEPS) for step in range(STEPS)), rows @ weight.T, output)


def smoothquant_scales(weight: Tensor, rows: Tensor, magnitudes: Tensor, columns: Tensor) -> Tensor:
    """Scales [K] by which columns of a weight are multiplied and inputs divided before both are rounded to 8 bits.

    weight: [N, K] fp32. rows: [R, K] fp32, sampled from the input. magnitudes, columns: [K], the largest |x| over the
    whole input, and the largest |w| of the column; channels that must have one scale have one of either.
    They leave the largest input as large as it is, since it has to fit into the model's dtype: rounding does not depend
    on a factor of all scales.
    """

    def output(scales: Tensor) -> Tensor:
        values, steps = kernels.quantize_rows(rows / scales)
        return (values * steps[:, None]) @ round_to_nearest(weight * scales, "w8a8").dequantize().T

    magnitudes, columns = _floored(magnitudes), _floored(columns)

    def candidates() -> Iterator[Tensor]:
        yield torch.ones_like(magnitudes)
        for step in range(STEPS + 1):
            exponent = step / STEPS
            yield magnitudes**exponent / columns ** (1 - exponent)

    best = _best(candidates(), rows @ weight.T, output)
    return best * ((magnitudes / best).amax() / magnitudes.amax())


def _floored(magnitudes: Tensor) -> Tensor:
    most = magnitudes.amax()
    return torch.where(most > 0, magnitudes.clamp(min=FLOOR * most), 1)


def _best(candidates: Iterator[Tensor], wanted: Tensor, output: Function) -> Tensor:
    """The scales with the least squared error of the output; their middle, geometrically, becomes 1."""
    centred = (scales / (scales.amax() * scales.amin()).sqrt() for scales in candidates)
    return min(centred, key=lambda scales: float((output(scales) - wanted).square_().sum()))
