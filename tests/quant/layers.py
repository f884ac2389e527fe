"""Random linear layers with what quantizers need of real ones: correlated inputs, and channels of unusual size."""

from __future__ import annotations

import torch
from torch import Tensor


def correlated(rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] with heavy tails, and inputs [tokens, columns] that lie near columns / 16 directions.

    Channels differ in size as exp(0.6 n), and one in 200 of them, at least one, is 8 times larger than that.
    """
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(6.0).sample((rows, columns)) * 0.02
    rank = columns // 16
    directions = torch.randn(rank, columns) * torch.linspace(3, 0.3, rank)[:, None]
    inputs = torch.randn(tokens, rank) @ directions * 0.5 + torch.randn(tokens, columns)
    sizes = torch.exp(torch.randn(columns) * 0.6)
    sizes[torch.randint(0, columns, (max(columns // 200, 1),))] *= 8
    return weight, inputs * sizes


def output_error(found: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """The root of the summed squared errors of outputs for inputs [T, K], in fp64."""
    return (inputs.double() @ (found.double() - weight.double()).T).norm().item()
