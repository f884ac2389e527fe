"""A quantized weight: integers with a scale for each group of a row, between files and packed layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.reference import int4, int8


class Form(NamedTuple):
    """The format of a quantized weight. scales, zeros: their dtypes; None without zeros."""

    kind: str
    columns: int
    group_size: int
    scales: torch.dtype
    zeros: torch.dtype | None

    @classmethod
    def of(cls, kind: str, columns: int, scales: Tensor, zeros: Tensor | None) -> Form:
        """The form of a weight with `columns` columns."""
        return cls(kind, columns, columns // scales.shape[1], scales.dtype, None if zeros is None else zeros.dtype)

    def __str__(self) -> str:
        """`int4 in groups of 128`."""
        groups = "whole rows" if self.group_size == self.columns else f"groups of {self.group_size}"
        return f"{self.kind} in {groups}{'' if self.zeros is None else ' with zeros'}"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K], or some of its rows: (value - zero) * scale, with one scale for each group of G columns.

    kind: "int4", "int8" or "w8a8". values: [N, K], in "int4" uint8 of 0 to 15, else int8. scales: [N, K / G] floats.
    zeros: for "int4" alone, [N, K / G] in units of values, uint8 or floats; None if all are 8.
    """

    kind: str
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.values.shape

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.form.group_size

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest value after rounding."""
        return (0, int4.LARGEST) if self.kind == "int4" else (-int8.LARGEST, int8.LARGEST)

    @property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros [N, K / G] fp32, with the implied zeros where there are none."""
        scales = self.scales.float()
        middle = int4.MIDDLE if self.kind == "int4" else 0
        return scales, torch.full_like(scales, middle) if self.zeros is None else self.zeros.float()

    @property
    def form(self) -> Form:
        """The format of this weight."""
        return Form.of(self.kind, self.shape[1], self.scales, self.zeros)

    def dequantize(self) -> Tensor:
        """The weight [N, K] fp32, exactly."""
        if self.kind != "int4":
            return kernels.dequantize_int8(self.values, self.scales.float())
        zeros = self.zeros if self.zeros is None or self.zeros.dtype == torch.uint8 else self.zeros.float()
        return kernels.dequantize_int4(self.values, self.scales.float(), zeros)

    def equals(self, other: QuantizedWeight) -> bool:
        """Whether another weight of this `form` is the same, bit for bit."""
        pairs = [(self.values, other.values), (self.scales, other.scales)]
        if self.zeros is not None and other.zeros is not None:
            pairs.append((self.zeros, other.zeros))
        return all(torch.equal(one, another) for one, another in pairs)
