"""Linear layers and norms that call the ops; parameters never require gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastllama import kernels
from fastllama.layers.batch import BatchMeta


def parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised inference parameter."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm, which the next linear layer applies as its prologue."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self.eps = eps


class LinearBase(nn.Module):
    """y = x W^T (+ b), weight [out_features, in_features], with the prologue and epilogue of a Llama block."""

    def forward(
        self,
        x: Tensor,
        batch: BatchMeta,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        """x [..., in_features], normalised by `norm` first -> [..., out_features].

        residual: like the result, updated in place to residual + result. gated: the weight is [gate | up], and the
        result silu(gate) * up, of half as many features.
        """
        options: dict[str, Any] = {"residual": residual, "out": residual, "gated": gated}
        if norm is not None:
            options |= {"norm": norm.weight, "eps": norm.eps}
        return self.matmul(x, batch.workspace, deterministic=batch.deterministic, **options)

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        """Call the op for this weight. options: keyword arguments of `kernels.matmul`."""
        raise NotImplementedError

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory for `matmul` of up to num_rows rows of x in dtype: [E] fp32; empty if none is needed."""
        return torch.empty(0, dtype=torch.float32, device="cpu")


class Linear(LinearBase):
    """A linear layer with a dense weight."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = parameter(out_features, dtype=dtype, device=device) if bias else None

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        return kernels.matmul(x, self.weight, self.bias, workspace=workspace, **options)

    def workspace(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        return kernels.matmul_workspace(num_rows, self.weight)


class PackedLinear(LinearBase):
    """A linear layer with a packed weight."""

    in_features: int
    out_features: int

    @property
    def num_weights(self) -> int:
        """Elements of the dense weight."""
        return self.out_features * self.in_features

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked at each call."""
        raise NotImplementedError

    def set_rows(self, start: int, rows: Tensor) -> bool:
        """Overwrite rows of the weight from `start` on with rows [R, in_features] in the model's dtype.

        The layer then equals, bit for bit, the packed new weight. Returns whether buffers have been replaced, which
        invalidates captured decode steps. To be called in inference mode.
        """
        raise NotImplementedError

    def holds(self, start: int, rows: Tensor) -> bool:
        """Whether `set_rows` would change nothing."""
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

    def holds(self, start: int, rows: Tensor) -> bool:
        return torch.equal(self.weight[start : start + rows.shape[0]], rows)

    def matmul(self, x: Tensor, workspace: Tensor | None, **options: Any) -> Tensor:
        return kernels.matmul_bf12(x, self.codes, self.outliers, self.exponent, self.bias, **options)
