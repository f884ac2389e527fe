"""Scales for the input channels of a linear layer, with which its weight, or its input, is easier to quantize.

x W^T = (x / s) (W s)^T. AWQ scales up the columns of channels with large activations, so that rounding the weight costs
them less; SmoothQuant moves outliers of the activations into the weight, if both are quantized to 8 bits. Both choose
an exponent by the error of the layer's output on sampled rows; the candidates include no scaling at all.
Sources: Lin et al., AWQ, arXiv:2306.00978; Xiao et al., SmoothQuant, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.quant.rounding import round_to_nearest

STEPS = 20  # exponents, evenly spaced from 0
FLOOR = 1e-4  # of the largest magnitude: the least of a channel, so that scales are bounded where the input is 0
Function = Callable[[Tensor], Tensor]


def awq_scales(weight: Tensor, rows: Tensor, magnitudes: Tensor, quantize: Function) -> Tensor:
    """Scales [K] that multiply the columns of a weight before it is quantized, and divide its input.

    weight: [N, K] fp32. rows: [R, K] fp32, sampled from the input. magnitudes: [K], the mean of |x| over rows; channels
    that must share a scale have equal magnitudes. quantize: returns the dequantized rounding of a weight, both fp32.
    """

    def output(scales: Tensor) -> Tensor:
        return (rows / scales) @ quantize(weight * scales).T

    magnitudes = _floored(magnitudes)
    return _best((magnitudes ** (step / STEPS) for step in range(STEPS)), rows @ weight.T, output)


def smoothquant_scales(weight: Tensor, rows: Tensor, magnitudes: Tensor, columns: Tensor) -> Tensor:
    """Scales [K] that multiply the columns of a weight and divide its input before both are quantized to 8 bits.

    weight: [N, K] fp32. rows: [R, K] fp32, sampled from the input. magnitudes, columns: [K], the largest |x| over the
    whole input, and the largest |w| of the column; channels that must share a scale have equal ones.
    The largest input stays as large, since it must fit into the model's dtype; a common factor of all scales does not
    change the rounding.
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
    """The scales with the least squared error of the output, with the geometric mean of their extremes at 1."""
    centred = (scales / (scales.amax() * scales.amin()).sqrt() for scales in candidates)
    return min(centred, key=lambda scales: float((output(scales) - wanted).square_().sum()))
