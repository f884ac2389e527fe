"""Peers of the ops in other libraries, if installed: Liger, FlashInfer, vLLM and others.

A library without a matching op does not appear.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import attention_libraries as attention
from fastllama.bench.ops.formulas import Function
from fastllama.bench.ops.matmuls import group_of, prepared, values_of
from fastllama.bench.ops.peers import Peers, torch_peers
from fastllama.catalogue.maker import EPS, Arguments


@dataclass(frozen=True)
class Library:
    """A package with counterparts of some ops. make: op -> function of the imported module that returns the peer."""

    distribution: str
    module: str
    make: dict[str, tuple[str, Callable[[Any], Function]]]

    def version(self) -> str | None:
        """Its version; None if it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def libraries() -> dict[str, str | None]:
    """Version of each library that could be a peer; None if it is not installed."""
    return {library.distribution: library.version() for library in LIBRARIES}


def peers(op: str, device: torch.device) -> Peers:
    """The peers of a case: torch's and the libraries'."""
    found = torch_peers(op, device, "inductor" if device.type == "cuda" else "eager")  # a CPU only dry-runs the plan
    if device.type == "cuda":
        for library in LIBRARIES:
            if op in library.make and library.version() is not None:
                found[library.distribution] = lambda library=library: _load(library, op)
    return found


def _load(library: Library, op: str) -> Function:
    module, make = library.make[op]
    return make(importlib.import_module(f"{library.module}.{module}"))


def _liger_norm(module: Any) -> Function:
    return lambda t: module.LigerRMSNormFunction.apply(t["x"], t["weight"], EPS, 0.0, "llama", False)


def _liger_add_norm(module: Any) -> Function:
    apply = module.LigerFusedAddRMSNormFunction.apply
    return lambda t: apply(t["x"], t["residual"], t["weight"], EPS, 0.0, "llama", False)


def _liger_silu(module: Any) -> Function:
    return lambda t: module.LigerSiLUMulFunction.apply(*t["gate_up"].chunk(2, dim=-1))


def _flashinfer_norm(module: Any) -> Function:
    return lambda t: module.rmsnorm(t["x"], t["weight"], EPS, out=t["out"])


def _in_place_add_norm(function: Callable[..., None]) -> Function:
    """The in-place fused add and norm of FlashInfer and vLLM: x becomes the norm, residual the sum."""

    def run(t: Arguments) -> tuple[Tensor, Tensor]:
        function(t["x"], t["residual"], t["weight"], EPS)
        return t["x"], t["residual"]

    return run


def _flashinfer_silu(module: Any) -> Function:
    return lambda t: module.silu_and_mul(t["gate_up"], out=t["out"])


def _flashinfer_rope(module: Any) -> Function:
    def run(t: Arguments) -> tuple[Tensor, Tensor]:
        q, k = t["q"], t["k"]
        module.apply_rope_with_cos_sin_cache_inplace(
            t["positions"], q.flatten(1), k.flatten(1), q.shape[-1], t["cos_sin"], is_neox=True
        )
        return q, k

    return run


def _flashinfer_sample(module: Any) -> Function:
    """FlashInfer's sampling, without log-probabilities: less work than this project's op."""

    def run(t: Arguments) -> tuple[Tensor, None]:
        logits = t["logits"] / t["temperature"][:, None]
        return module.top_k_top_p_sampling_from_logits(logits, t["top_k"], t["top_p"]).long(), None

    return run


def _vllm_norm(module: Any) -> Function:
    def run(t: Arguments) -> Tensor:
        module.rms_norm(t["out"], t["x"], t["weight"], EPS)
        return t["out"]

    return run


def gemlite(module: Any) -> Function:
    """GemLite on the same quantized weights (4 bits: zero point 8). It tunes in the judged call, before timing."""

    def prepare(t: Arguments) -> Any:
        codes, dtype = values_of(t), module.TORCH_TO_DTYPE[t["x"].dtype]
        bits, zero = (4, 8) if codes.dtype == torch.uint8 else (8, None)
        layer = module.GemLiteLinearTriton(
            W_nbits=bits,
            group_size=group_of(t),
            in_features=codes.shape[1],
            out_features=codes.shape[0],
            input_dtype=dtype,
            output_dtype=dtype,
        )
        return layer.pack(codes, t["scales"], zero)

    return prepared(prepare, lambda t, layer: layer(t["x"]))


LIBRARIES = (
    Library(
        "liger-kernel",
        "liger_kernel.ops",
        {
            "rms_norm": ("rms_norm", _liger_norm),
            "add_rms_norm": ("fused_add_rms_norm", _liger_add_norm),
            "silu_mul": ("swiglu", _liger_silu),
        },
    ),
    Library(
        "flashinfer-python",
        "flashinfer",
        {
            "rms_norm": ("norm", _flashinfer_norm),
            "add_rms_norm": ("norm", lambda module: _in_place_add_norm(module.fused_add_rmsnorm)),
            "silu_mul": ("activation", _flashinfer_silu),
            "rope": ("rope", _flashinfer_rope),
            "sample": ("sampling", _flashinfer_sample),
            "attention_decode": ("decode", attention.flashinfer_decode),
            "attention_varlen": ("prefill", attention.flashinfer_varlen),
        },
    ),
    Library(
        "vllm",
        "vllm",
        {
            "rms_norm": ("_custom_ops", _vllm_norm),
            "add_rms_norm": ("_custom_ops", lambda module: _in_place_add_norm(module.fused_add_rms_norm)),
        },
    ),
    Library("flash-attn", "flash_attn", {"attention_varlen": ("flash_attn_interface", attention.flash_attn_varlen)}),
    Library("xformers", "xformers.ops", {"attention_decode": ("fmha", attention.xformers_decode)}),
    Library(
        "gemlite",
        "gemlite",
        {"matmul_int4": ("core", gemlite), "matmul_int8": ("core", gemlite)},
    ),
)
