"""Linear layers and norms over the ops; parameters never need gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastllama import kernels
from fastllama.arithmetic import ceil_div
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.ops.compose import compose
from fastllama.kernels.reference.int4 import ROWS
from fastllama.layers.batch import BatchMeta


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised inference parameter."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm, which the linear layer behind it applies."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self.eps = eps


class LinearBase(nn.Module):
    """y = x W^T (+ b), weight [out_features, in_features], with what a Llama's block has before and behind it."""

    def forward(
        self,
        x: Tensor,
        batch: BatchMeta,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        """x [..., in_features], normalised first by `norm` -> [..., out_features].

        residual: like the result, which is added to it in place. gated: the weight is [gate | up], and the result
        silu(gate) * up, of half as many features.
        """
        around: dict[str, Any] = {"residual": residual, "out": residual, "gated": gated}
        if norm is not None:
            around |= {"norm": norm.weight, "eps": norm.eps}
        return self.product(x, batch.workspace, deterministic=batch.deterministic, **around)

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        """The op on the weight; around: what `kernels.matmul` takes by name."""
        raise NotImplementedError

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """What `product` takes for so many rows of x in dtype, or fewer: [E] fp32; none needed has no elements."""
        return torch.empty(0, dtype=torch.float32, device="cpu")


class Linear(LinearBase):
    """A linear layer whose weight is kept as it is."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        return kernels.matmul(x, self.weight, self.bias, workspace=workspace, **around)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_workspace(num_rows, self.weight)


class PackedLinear(LinearBase):
    """A linear layer whose weight is kept in another form."""

    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        """Numbers that were trained."""
        return self.out_features * self.in_features

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked anew at each call."""
        raise NotImplementedError

    def set_rows(self, start: int, rows: Tensor) -> bool:
        """Write other rows [R, in_features] of the weight, in the model's dtype, in place of those from `start` on.

        The layer is then, bit for bit, what the whole weight would be packed into. Returns whether buffers have been
        replaced, which captured decode steps do not see. To be called in inference mode.
        """
        raise NotImplementedError


class Bf12Linear(PackedLinear):
    """A Linear in bf16 whose weight takes 12 bits, without loss: see kernels.pack_bf12."""

    codes: Tensor
    outliers: Tensor

    def __init__(self, codes: Tensor, outliers: Tensor, exponent: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("outliers", outliers)
        self.exponent, self.bias = exponent, bias
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * 2 // 3

    @property
    def weight(self) -> Tensor:
        return kernels.unpack_bf12(self.codes, self.outliers, self.exponent)

    def set_rows(self, start: int, rows: Tensor) -> bool:
        if rows.shape[0] < self.out_features:
            weight = self.weight
            weight[start : start + rows.shape[0]] = rows
            rows = weight
        codes, outliers, exponent = kernels.pack_bf12(rows)
        self.codes.copy_(codes)
        if (outliers.shape, exponent) == (self.outliers.shape, self.exponent):
            self.outliers.copy_(outliers)
            return False
        self.outliers, self.exponent = outliers, exponent
        return True

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        return kernels.matmul_bf12(x, self.codes, self.outliers, self.exponent, self.bias, **around)


class CodesLinear(PackedLinear):
    """A Linear whose weight is kept in codes, with a scale for each group of a row.

    weight is what codes and scales stand for, exactly, in fp32.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, packed: Tensor, scales: Tensor, in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.out_features, self.in_features, self.bias = scales.shape[0], in_features, bias

    @staticmethod
    def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """codes [N, K] and scales [N, K / group_size] of a weight [N, K]."""
        raise NotImplementedError

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """What is kept of codes [N, K]: tiles of 64 rows along the first dimension."""
        raise NotImplementedError

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        """The codes [rows, columns] that `pack` packed."""
        raise NotImplementedError

    def set_rows(self, start: int, rows: Tensor) -> bool:
        end = start + rows.shape[0]
        codes, scales = self.quantize(rows, self.in_features // self.scales.shape[1])
        first, last = start // ROWS, ceil_div(end, ROWS)
        tiles, base = self.packed[first:last], first * ROWS
        if start % ROWS or end % ROWS:
            some, codes = codes, self.unpack(tiles, (last - first) * ROWS, self.in_features)
            codes[start - base : end - base] = some
        tiles.copy_(self.pack(codes))
        self.scales[start:end] = scales
        return False

    def _like_x(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """A tensor [num_rows, in_features] in dtype that takes no memory."""
        return self.scales.new_empty((), dtype=dtype).expand(num_rows, self.in_features)


class Int4Linear(CodesLinear):
    """Codes of 4 bits: see kernels.quantize_int4."""

    @staticmethod
    def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        codes, scales, _ = kernels.quantize_int4(weight, group_size)
        return codes, scales

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        return kernels.pack_int4(codes)

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        return kernels.unpack_int4(packed, rows, columns)

    @property
    def weight(self) -> Tensor:
        codes = self.unpack(self.packed, self.out_features, self.in_features)
        return kernels.dequantize_int4(codes, self.scales.float())

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        return kernels.matmul_int4(x, self.packed, self.scales, None, self.bias, workspace=workspace, **around)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_int4_workspace(self._like_x(num_rows, dtype), self.packed, self.scales)


class Int8Linear(CodesLinear):
    """Codes of 8 bits: see kernels.quantize_int8."""

    @staticmethod
    def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        return kernels.quantize_int8(weight, group_size)

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        return kernels.pack_int8(codes)

    @staticmethod
    def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
        return kernels.unpack_int8(packed, rows, columns)

    @property
    def weight(self) -> Tensor:
        codes = self.unpack(self.packed, self.out_features, self.in_features)
        return kernels.dequantize_int8(codes, self.scales.float())

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        return kernels.matmul_int8(x, self.packed, self.scales, self.bias, workspace=workspace, **around)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_int8_workspace(self._like_x(num_rows, dtype), self.packed, self.scales)


class W8A8Linear(Int8Linear):
    """Codes of 8 bits, with a scale for each row of the weight, by rows of x that are rounded to 8 bits too."""

    def product(self, x: Tensor, workspace: Tensor | None, **around: Any) -> Tensor:
        out, gated, norm = around["out"], around["gated"], around.get("norm")
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.scales.shape[0] // (2 if gated else 1))

        def multiply(x: Tensor, out: Tensor) -> None:
            codes = kernels.quantize_rows(x) if norm is None else kernels.rms_norm_int8(x, norm, around["eps"])
            kernels.matmul_w8a8(*codes, self.packed, self.scales.squeeze(1), self.bias, out=out)

        compose(multiply, x, Fusion(residual=around["residual"], gated=gated), out)
        return out

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu")
