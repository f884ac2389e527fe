"""Peers of quantized matmuls: torch's own ops, from the packed weights and scales of our call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama import kernels
from fastllama.bench.ops.compiling import compiled
from fastllama.bench.ops.formulas import Function
from fastllama.catalogue.maker import Arguments

TINYGEMM_GROUPS = (32, 64, 128, 256)
TINYGEMM_TILES = 8  # tiles of 16 columns stored together, the maximum
TINYGEMM_SHAPE = (8, 16 * TINYGEMM_TILES)  # must divide the weight's shape


def torch_matmuls(op: str, device: torch.device, backend: str) -> dict[str, Callable[[], Function]]:
    """torch's own ops by name, as in `peers`. backend: of torch.compile."""
    if op == "matmul_bf12":
        return {"F.linear, unpacked": linear}
    if op not in ("matmul_int4", "matmul_int8", "matmul_w8a8"):
        return {}
    found: dict[str, Callable[[], Function]] = {"F.linear, unquantized": linear}
    if op == "matmul_int4" and device.type == "cuda":  # on a CPU it has another name and layout
        found["_weight_int4pack_mm"] = lambda: tinygemm(torch.ops.aten)
    if op == "matmul_int8":
        found["_weight_int8pack_mm"] = int8pack
    if op == "matmul_w8a8":
        found["_int_mm"] = lambda: int_mm(backend)
    return found


def prepared(prepare: Callable[[Arguments], Any], run: Callable[[Arguments, Any], Tensor]) -> Function:
    """run(inputs, prepare(inputs)); prepare runs once per weight, untimed, as when a model is loaded."""
    made: dict[int, tuple[Tensor, Any]] = {}  # keeps the weight alive, so that no other gets its address

    def call(t: Arguments) -> Tensor:
        weight = t["codes" if "exponent" in t else "packed"]
        key = weight.data_ptr()
        if key not in made:
            made[key] = weight, prepare(t)
        return run(t, made[key][1])

    return call


def values_of(t: Arguments) -> Tensor:
    """[N, K] uint8 of 4 bits or int8, contiguous."""
    unpack = kernels.unpack_int4 if t["packed"].dtype == torch.int32 else kernels.unpack_int8
    return unpack(t["packed"], t["scales"].shape[0], t["x"].shape[1]).contiguous()


def group_of(t: Arguments) -> int:
    """Columns per scale."""
    return int(t["x"].shape[1] // t["scales"].shape[1])


def linear() -> Function:
    """The matmul of an unquantized model: the weight, and a quantized x, in the result's dtype."""

    def prepare(t: Arguments) -> tuple[Tensor, Tensor]:
        if "exponent" in t:
            return t["x"], kernels.unpack_bf12(t["codes"], t["outliers"], t["exponent"]).to(t["x"].dtype)
        values, scales = values_of(t), t["scales"]
        if "x_scales" in t:
            x = (t["x"] * t["x_scales"][:, None]).to(scales.dtype)
            return x, kernels.dequantize_int8(values, scales[:, None])
        dequantize = kernels.dequantize_int4 if values.dtype == torch.uint8 else kernels.dequantize_int8
        return t["x"], dequantize(values, scales)

    return prepared(prepare, lambda t, made: F.linear(*made))


def tinygemm(aten: Any) -> Function:
    """aten: torch.ops.aten. Its weights are (value - 8) * scale + zero; zero is 0 for ours."""

    def prepare(t: Arguments) -> tuple[Tensor, int, Tensor]:
        scales, group, shape = t["scales"], group_of(t), (t["scales"].shape[0], t["x"].shape[1])
        if t["x"].dtype != torch.bfloat16:
            raise NotImplementedError(f"x and scales of {t['x'].dtype}: only torch.bfloat16")
        if group not in TINYGEMM_GROUPS:
            raise NotImplementedError(f"groups of {group}: only {TINYGEMM_GROUPS}")
        if any(size % divisor for size, divisor in zip(shape, TINYGEMM_SHAPE, strict=True)):
            raise NotImplementedError(f"a weight of {shape}: only multiples of {TINYGEMM_SHAPE}")
        values = values_of(t)
        pairs = values[:, ::2] << 4 | values[:, 1::2]
        scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
        return aten._convert_weight_to_int4pack(pairs, TINYGEMM_TILES), group, scales_and_zeros

    return prepared(prepare, lambda t, made: aten._weight_int4pack_mm(t["x"], *made))


def int8pack() -> Function:
    def prepare(t: Arguments) -> tuple[Tensor, Tensor]:
        if t["scales"].shape[1] > 1:
            raise NotImplementedError(f"groups of {group_of(t)}: only one scale for a row")
        return values_of(t), t["scales"][:, 0].contiguous()

    return prepared(prepare, lambda t, made: torch.ops.aten._weight_int8pack_mm(t["x"], *made))


def int_mm(backend: str) -> Function:
    """An int8 matmul, then one compiled kernel for the scales. On a GPU torch requires more than 16 rows."""
    scaled = compiled(_scaled, backend, fullgraph=True)

    def run(t: Arguments, values: Tensor) -> Tensor:
        return scaled(torch._int_mm(t["x"], values), t["x_scales"], t["scales"])

    return prepared(lambda t: values_of(t).T, run)


def _scaled(sums: Tensor, x_scales: Tensor, scales: Tensor) -> Tensor:
    return (sums * x_scales[:, None] * scales.to(x_scales.dtype)).to(scales.dtype)
