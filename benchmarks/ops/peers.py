"""What else computes an op: torch in several forms, and the libraries that are installed.

A peer takes the inputs of the public op and returns what it returns; it may overwrite its inputs where that is all it
offers. Every peer passes the judge before it is timed. Where a library has no op like ours it does not appear.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import attention_peers as attention
from benchmarks.ops import matmul_peers as product
from benchmarks.ops.attention_peers import Function
from benchmarks.ops.compiling import compiled
from benchmarks.ops.inputs import EPS, Inputs


@dataclass(frozen=True)
class Library:
    """An installed package that has some of our ops. make: by op, given the imported module named, its function."""

    distribution: str
    module: str
    make: dict[str, tuple[str, Callable[[Any], Function]]]

    def version(self) -> str | None:
        """Its version; None where it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def libraries() -> dict[str, str | None]:
    """The version of each library that could be a peer; None where it is not installed."""
    return {library.distribution: library.version() for library in LIBRARIES}


def peers(op: str, device: torch.device) -> dict[str, Callable[[], Function]]:
    """What to face at an op on a device, by name; calling a value imports or compiles what it needs."""
    found: dict[str, Callable[[], Function]] = {}
    backend = "inductor" if device.type == "cuda" else "eager"  # a CPU only walks the plan
    if op in EAGER:
        found["torch eager"] = lambda: EAGER[op]
        found["torch.compile"] = lambda: compiled(EAGER[op], backend)
    if op in FUSED:
        name, function = FUSED[op]
        found[name] = lambda: function
    if op in attention.FLEX:
        gathered, flex = attention.FLEX[op]
        found["flex_attention" + gathered] = lambda: flex(attention.compiled_flex(backend))
    found |= product.torch_products(op, device, backend)
    if device.type == "cuda":
        for library in LIBRARIES:
            if op in library.make and library.version() is not None:
                found[library.distribution] = lambda library=library: _load(library, op)
    return found


def _load(library: Library, op: str) -> Function:
    module, make = library.make[op]
    return make(importlib.import_module(f"{library.module}.{module}"))


def _rms_norm(t: Inputs) -> Tensor:
    """As Hugging Face's LlamaRMSNorm computes it."""
    x = t["x"].float()
    return t["weight"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(t["x"].dtype)


def _add_rms_norm(t: Inputs) -> tuple[Tensor, Tensor]:
    total = t["x"] + t["residual"]
    return _rms_norm({"x": total, "weight": t["weight"]}), total


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by angles [T, 1, D / 2] in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _rope(t: Inputs) -> tuple[Tensor, Tensor]:
    cos, sin = t["cos_sin"][t["positions"]][:, None].chunk(2, dim=-1)
    return _turn(t["q"], cos, sin), _turn(t["k"], cos, sin)


def _rope_and_write_kv(t: Inputs) -> Tensor:
    _, kv_heads, page, dim = t["k_pages"].shape
    heads = t["qkv"].unflatten(-1, (-1, dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q, k = _rope({"q": q, "k": k, "cos_sin": t["cos_sin"], "positions": t["positions"]})
    at, slot = t["slots"] // page, t["slots"] % page
    t["k_pages"][at, :, slot] = k
    t["v_pages"][at, :, slot] = v
    return q


def _silu_mul(t: Inputs) -> Tensor:
    gate, up = t["gate_up"].chunk(2, dim=-1)
    return F.silu(gate) * up


def _merge_state(t: Inputs) -> tuple[Tensor, Tensor]:
    a_share, b_share = torch.stack((t["a_lse"], t["b_lse"])).softmax(0).to(t["a"].dtype)[..., None]
    return t["a"] * a_share + t["b"] * b_share, torch.logaddexp(t["a_lse"], t["b_lse"])


def _sample(t: Inputs) -> tuple[Tensor, Tensor]:
    """One sort for top-k, top-p and min-p, then the first token whose cumulative mass passes a random number."""
    logits = t["logits"].float()
    probs, order = (logits / t["temperature"][:, None]).softmax(-1).sort(dim=-1, descending=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    probs = probs.masked_fill(ranks >= t["top_k"][:, None], 0.0)
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= t["top_p"][:, None] * mass[:, -1:], 0.0)
    probs = probs.masked_fill(probs < probs[:, :1] * t["min_p"][:, None], 0.0)
    mass = probs.cumsum(-1)
    place = (mass <= torch.rand_like(mass[:, :1]) * mass[:, -1:]).sum(-1, keepdim=True)
    tokens = order.gather(1, place)[:, 0]
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _matmul(t: Inputs) -> Tensor:
    return F.linear(t["x"], t["weight"])


def _embedding(t: Inputs) -> Tensor:
    return F.embedding(t["ids"], t["weight"])


EAGER: dict[str, Function] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "rope_and_write_kv": _rope_and_write_kv,
    "silu_mul": _silu_mul,
    "merge_state": _merge_state,
    "sample": _sample,
}
FUSED: dict[str, tuple[str, Function]] = {
    "rms_norm": ("F.rms_norm", lambda t: F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS)),
    "matmul": ("F.linear", _matmul),
    "embedding": ("F.embedding", _embedding),
    "attention_varlen": ("SDPA", attention.sdpa_varlen),
    "attention_prefill": ("SDPA, gathered", attention.sdpa_prefill),
    "attention_decode": ("SDPA, gathered", attention.sdpa_decode),
}


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
    """For the fused addition that FlashInfer and vLLM share: x becomes the norm, residual the sum."""

    def run(t: Inputs) -> tuple[Tensor, Tensor]:
        function(t["x"], t["residual"], t["weight"], EPS)
        return t["x"], t["residual"]

    return run


def _flashinfer_silu(module: Any) -> Function:
    return lambda t: module.silu_and_mul(t["gate_up"], out=t["out"])


def _flashinfer_rope(module: Any) -> Function:
    def run(t: Inputs) -> tuple[Tensor, Tensor]:
        q, k = t["q"], t["k"]
        module.apply_rope_with_cos_sin_cache_inplace(
            t["positions"], q.flatten(1), k.flatten(1), q.shape[-1], t["cos_sin"], is_neox=True
        )
        return q, k

    return run


def _flashinfer_sample(module: Any) -> Function:
    """Tokens without log-probabilities: less work than ours."""

    def run(t: Inputs) -> tuple[Tensor, None]:
        logits = t["logits"] / t["temperature"][:, None]
        return module.top_k_top_p_sampling_from_logits(logits, t["top_k"], t["top_p"]).long(), None

    return run


def _vllm_norm(module: Any) -> Function:
    def run(t: Inputs) -> Tensor:
        module.rms_norm(t["out"], t["x"], t["weight"], EPS)
        return t["out"]

    return run


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
        {"matmul_int4": ("core", product.gemlite), "matmul_int8": ("core", product.gemlite)},
    ),
)
