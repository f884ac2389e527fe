"""Linear layers with quantized weights, packed in the layout of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastllama import kernels
from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.ops.compose import compose
from fastllama.kernels.reference import int4, int8
from fastllama.kernels.reference.int4 import ROWS
from fastllama.layers.linear import PackedLinear
from fastllama.quant.rounding import round_to_nearest
from fastllama.quant.weight import Form, QuantizedWeight


class QuantizedLinear(PackedLinear):
    """A linear layer with a quantized weight, packed in the layout of its op, with a scale for each group of a row.

    `weight` dequantizes it exactly, in fp32. If the layer is cast to another dtype (`.half()`, `.to()`), its scales
    stay or become fp32, which the ops accept for any x: no scale is rounded.
    """

    kind: ClassVar[str]

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, packed: Tensor, scales: Tensor, in_features: int, bias: nn.Parameter | None, zeros: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.out_features, self.in_features, self.bias = scales.shape[0], in_features, bias

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        """Pack quantized values [N, K]: tiles of 64 rows along the first dimension."""
        raise NotImplementedError

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        """The values [rows, columns] that `pack` packed."""
        raise NotImplementedError

    @staticmethod
    def empty(rows: int, columns: int, device: torch.device) -> Tensor:
        """An uninitialised result of `pack` for values [rows, columns]."""
        raise NotImplementedError

    @classmethod
    def of(cls, weight: QuantizedWeight, bias: nn.Parameter | None) -> QuantizedLinear:
        """A layer from a whole weight of this kind."""
        return cls(cls.pack(weight.values), weight.scales, weight.shape[1], bias, weight.zeros)

    @classmethod
    def empty_like(
        cls, rows: QuantizedWeight, out_features: int, bias: nn.Parameter | None, device: torch.device
    ) -> QuantizedLinear:
        """An uninitialised layer of out_features rows, of the form of `rows`."""
        size = rows.shape[1]
        shape = out_features, rows.scales.shape[1]
        packed = cls.empty(out_features, size, device)
        scales = torch.empty(shape, dtype=rows.scales.dtype, device=device)
        zeros = None if rows.zeros is None else torch.empty(shape, dtype=rows.zeros.dtype, device=device)
        return cls(packed, scales, size, bias, zeros)

    @property
    def weight(self) -> Tensor:
        return self.quantized_rows(0, self.out_features).dequantize()

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.form.group_size

    @property
    def form(self) -> Form:
        """The form of the QuantizedWeights that may be written to it."""
        return Form.of(self.kind, self.in_features, self.scales, self.zeros)

    def quantized_rows(self, start: int, count: int) -> QuantizedWeight:
        """Rows [start, start + count) of the quantized weight; the values are a copy."""
        first, end = start // ROWS, start + count
        tiles = self.packed[first : ceil_div(end, ROWS)]
        values = self.unpack(tiles, end - first * ROWS, self.in_features)[start - first * ROWS :]
        zeros = None if self.zeros is None else self.zeros[start:end]
        return QuantizedWeight(self.kind, values, self.scales[start:end], zeros)

    def set_quantized_rows(self, start: int, rows: QuantizedWeight) -> None:
        """Overwrite rows from `start` on with rows of this `form`. To be called in inference mode or no_grad."""
        end = start + rows.shape[0]
        first, last = start // ROWS, ceil_div(end, ROWS)
        tiles, base, values = self.packed[first:last], first * ROWS, rows.values
        if start % ROWS or (end % ROWS and end != self.out_features):  # tiles shared with other rows
            values = self.unpack(tiles, min((last - first) * ROWS, self.out_features - base), self.in_features)
            values[start - base : end - base] = rows.values
        tiles.copy_(self.pack(values))
        self.scales[start:end] = rows.scales
        if self.zeros is not None and rows.zeros is not None:
            self.zeros[start:end] = rows.zeros

    def set_rows(self, start: int, rows: Tensor) -> bool:
        self.set_quantized_rows(start, self._rounded(rows))
        return False

    def holds(self, start: int, rows: Tensor) -> bool:
        found, kept = self._rounded(rows), self.quantized_rows(start, rows.shape[0])
        return found.equals(kept)

    def _rounded(self, rows: Tensor) -> QuantizedWeight:
        """Rows [R, in_features] in the model's dtype, quantized to this layer's form."""
        found = round_to_nearest(rows, self.kind, self.group_size, symmetric=self.zeros is None)
        zeros = found.zeros if found.zeros is None or self.zeros is None else found.zeros.to(self.zeros.dtype)
        return QuantizedWeight(self.kind, found.values, found.scales.to(self.scales.dtype), zeros)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """nn.Module's hook for moves and casts, in which no scale and no zero may be rounded."""
        kept = {name: getattr(self, name) for name in ("scales", "zeros")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device, torch.float32))
        return self

    def _like_x(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """A tensor [num_rows, in_features] in dtype without memory of its own."""
        return self.scales.new_empty((), dtype=dtype).expand(num_rows, self.in_features)


class Int4Linear(QuantizedLinear):
    """4 bits, with or without zeros: see kernels.quantize_int4."""

    kind = "int4"

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        return kernels.pack_int4(values)

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        return kernels.unpack_int4(packed, rows, columns)

    @staticmethod
    def empty(rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty(int4.packed_shape(rows, columns), dtype=torch.int32, device=device)

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        return kernels.matmul_int4(x, self.packed, self.scales, self.zeros, self.bias, workspace=workspace, **options)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_int4_workspace(self._like_x(num_rows, dtype), self.packed, self.scales)


class Int8Linear(QuantizedLinear):
    """8 bits: see kernels.quantize_int8."""

    kind = "int8"

    @staticmethod
    def pack(values: Tensor) -> Tensor:
        return kernels.pack_int8(values)

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        return kernels.unpack_int8(packed, rows, columns)

    @staticmethod
    def empty(rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty(int8.packed_shape(rows, columns), dtype=torch.int8, device=device)

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        return kernels.matmul_int8(x, self.packed, self.scales, self.bias, workspace=workspace, **options)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_int8_workspace(self._like_x(num_rows, dtype), self.packed, self.scales)


class W8A8Linear(Int8Linear):
    """8 bits, with a scale for each row of the weight; rows of x are quantized to 8 bits at each call."""

    kind = "w8a8"

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        out, gated, norm = options["out"], options["gated"], options.get("norm")
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.scales.shape[0] // (2 if gated else 1))

        def multiply(x: Tensor, out: Tensor) -> None:
            codes = kernels.quantize_rows(x) if norm is None else kernels.rms_norm_int8(x, norm, options["eps"])
            kernels.matmul_w8a8(*codes, self.packed, self.scales.squeeze(1), self.bias, out=out)

        compose(multiply, x, Fusion(residual=options["residual"], gated=gated), out)
        return out

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")


LINEARS: dict[str, type[QuantizedLinear]] = {kind.kind: kind for kind in (Int4Linear, Int8Linear, W8A8Linear)}
