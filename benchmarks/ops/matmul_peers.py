"""What else multiplies by a weight of codes: torch's own products, and gemlite, given the codes and scales of our case.

bitsandbytes is left out: its 4 bits are nf4 or fp4, the unevenly spaced values of tables compiled into its kernels,
which our evenly spaced codes are not. Of `matmul_w8a8` gemlite is too: it rounds x itself, in the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.attention_peers import Function
from benchmarks.ops.compiling import compiled
from benchmarks.ops.inputs import Inputs
from fastllama import kernels

TINYGEMM_GROUPS = (32, 64, 128, 256)
TINYGEMM_TILES = 8  # of 16 columns, stored together: the most that there are
TINYGEMM_SHAPE = (8, 16 * TINYGEMM_TILES)  # divisors of the weight's


def torch_products(op: str, device: torch.device, backend: str) -> dict[str, Callable[[], Function]]:
    """torch's own by name, as `peers`. backend: of torch.compile."""
    if op not in ("matmul_int4", "matmul_int8", "matmul_w8a8"):
        return {}
    found: dict[str, Callable[[], Function]] = {"F.linear, unquantized": linear}
    if op == "matmul_int4" and device.type == "cuda":  # a CPU has it by another name, in another layout
        found["_weight_int4pack_mm"] = lambda: tinygemm(torch.ops.aten)
    if op == "matmul_int8":
        found["_weight_int8pack_mm"] = int8pack
    if op == "matmul_w8a8":
        found["_int_mm"] = lambda: int_mm(backend)
    return found


def _prepared(prepare: Callable[[Inputs], Any], run: Callable[[Inputs, Any], Tensor]) -> Function:
    """run(inputs, what prepare made of them): made at the first call of each weight, as a model loads it: not timed."""
    made: dict[int, tuple[Tensor, Any]] = {}  # the weight is held, or another could come to lie at its address

    def call(t: Inputs) -> Tensor:
        key = t["packed"].data_ptr()
        if key not in made:
            made[key] = t["packed"], prepare(t)
        return run(t, made[key][1])

    return call


def _codes(t: Inputs) -> Tensor:
    """[N, K] uint8 of 4 bits or int8, contiguous."""
    unpack = kernels.unpack_int4 if t["packed"].dtype == torch.int32 else kernels.unpack_int8
    return unpack(t["packed"], t["scales"].shape[0], t["x"].shape[1]).contiguous()


def _group(t: Inputs) -> int:
    """How many columns share a scale."""
    return int(t["x"].shape[1] // t["scales"].shape[1])


def linear() -> Function:
    """What a model that is not quantized runs: all weights, and x where it is codes, in the result's dtype."""

    def prepare(t: Inputs) -> tuple[Tensor, Tensor]:
        codes, scales = _codes(t), t["scales"]
        if "x_scales" in t:
            x = (t["x"] * t["x_scales"][:, None]).to(scales.dtype)
            return x, kernels.dequantize_int8(codes, scales[:, None])
        dequantize = kernels.dequantize_int4 if codes.dtype == torch.uint8 else kernels.dequantize_int8
        return t["x"], dequantize(codes, scales)

    return _prepared(prepare, lambda t, made: F.linear(*made))


def tinygemm(aten: Any) -> Function:
    """aten: torch.ops.aten. A weight is (code - 8) * scale + zero there, ours with zeros of 0."""

    def prepare(t: Inputs) -> tuple[Tensor, int, Tensor]:
        scales, group, shape = t["scales"], _group(t), (t["scales"].shape[0], t["x"].shape[1])
        if t["x"].dtype != torch.bfloat16:
            raise NotImplementedError(f"x and scales of {t['x'].dtype}: only torch.bfloat16")
        if group not in TINYGEMM_GROUPS:
            raise NotImplementedError(f"groups of {group}: only {TINYGEMM_GROUPS}")
        if any(size % divisor for size, divisor in zip(shape, TINYGEMM_SHAPE, strict=True)):
            raise NotImplementedError(f"a weight of {shape}: only multiples of {TINYGEMM_SHAPE}")
        codes = _codes(t)
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
        return aten._convert_weight_to_int4pack(pairs, TINYGEMM_TILES), group, scales_and_zeros

    return _prepared(prepare, lambda t, made: aten._weight_int4pack_mm(t["x"], *made))


def int8pack() -> Function:
    def prepare(t: Inputs) -> tuple[Tensor, Tensor]:
        if t["scales"].shape[1] > 1:
            raise NotImplementedError(f"groups of {_group(t)}: only one scale for a row")
        return _codes(t), t["scales"][:, 0].contiguous()

    return _prepared(prepare, lambda t, made: torch.ops.aten._weight_int8pack_mm(t["x"], *made))


def int_mm(backend: str) -> Function:
    """Sums of codes, then one compiled kernel that scales them. On a GPU torch wants more than 16 rows, and says so."""
    scaled = compiled(_scaled, backend, fullgraph=True)

    def run(t: Inputs, codes: Tensor) -> Tensor:
        return scaled(torch._int_mm(t["x"], codes), t["x_scales"], t["scales"])

    return _prepared(lambda t: _codes(t).T, run)


def _scaled(sums: Tensor, x_scales: Tensor, scales: Tensor) -> Tensor:
    return (sums * x_scales[:, None] * scales.to(x_scales.dtype)).to(scales.dtype)


def gemlite(module: Any) -> Function:
    """Codes as they are, with the one zero 8 where they have 4 bits. Its kernels are tuned at the judge's call."""

    def prepare(t: Inputs) -> Any:
        codes, dtype = _codes(t), module.TORCH_TO_DTYPE[t["x"].dtype]
        bits, zero = (4, 8) if codes.dtype == torch.uint8 else (8, None)
        layer = module.GemLiteLinearTriton(
            W_nbits=bits,
            group_size=_group(t),
            in_features=codes.shape[1],
            out_features=codes.shape[0],
            input_dtype=dtype,
            output_dtype=dtype,
        )
        return layer.pack(codes, t["scales"], zero)

    return _prepared(prepare, lambda t, layer: layer(t["x"]))
