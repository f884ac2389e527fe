"""The shipped launches: every Triton kernel as Llama 2 calls it, for the compile tier and docs/kernels.md.

To add a kernel: a generator of `Shipped` with tensors on the meta device (only dtypes, strides and alignment count),
and its name in FAMILIES. Then `make kernels-report`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import device, tuning
from fastllama.kernels.launch.device import Device
from fastllama.kernels.reference.int4 import packed_shape
from fastllama.kernels.reference.int8 import packed_shape as int8_shape
from fastllama.kernels.triton.attention import decode as decode_kernels
from fastllama.kernels.triton.attention import merge as merge_kernels
from fastllama.kernels.triton.attention import prefill as prefill_kernels
from fastllama.kernels.triton.matmul import w8a8 as w8a8_kernels
from fastllama.kernels.triton.rows import embedding as embedding_kernels
from fastllama.kernels.triton.rows import norm as norm_kernels
from fastllama.kernels.triton.rows import quantize_rows as quantize_kernels
from fastllama.kernels.triton.rows import rope as rope_kernels
from fastllama.kernels.triton.rows import swiglu as swiglu_kernels
from fastllama.kernels.triton.sampling import draw as sampling_kernels
from fastllama.testing.resources import NARROW
from fastllama.testing.targets import Target, target


@dataclass(frozen=True)
class Model:
    """What of a Llama 2 decides its launches."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 32000

    def qkv(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """The fused projection, as heads."""
        return meta(tokens, self.heads + 2 * self.kv_heads, self.head_dim, dtype=dtype)


MODELS = (Model("7B", 4096, 11008, 32, 32), Model("13B", 5120, 13824, 40, 40), Model("70B", 8192, 28672, 64, 8))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "uint8"}
# The tuned configurations of a GPU are packaged under its name: these are the ones that a target's launches use.
GPUS = {
    "sm_80": "nvidia-a100-sxm4-80gb",
    "sm_89": "nvidia-geforce-rtx-4090",
    "sm_90": "nvidia-h200",
    "sm_100": "nvidia-b200",
    "gfx942": "amd-instinct-mi300x",
}
STEPS = {"decode": 1, "prefill": 8192}  # tokens, at the extremes


@dataclass(frozen=True)
class Shipped:
    """One call of a launcher. Global accesses have at least `narrowest` bits a thread, `besides` so many of a kind.

    weights: of 4 or 8 bits, by kernel, that a program reads in one turn of its loop, or at all where it has none.
    """

    name: str
    call: Callable[[], Any]
    narrowest: int = NARROW
    besides: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def on(name: str) -> Iterator[Target]:
    """Inside, launchers choose their configurations for a target's usual GPU, and take nobody's own tuned ones."""
    gpu = target(name)
    facts = Device(GPUS[name], name, gpu.multiprocessors, gpu.warp_size, gpu.shared_per_block, l2_cache=32 << 20)
    tuning._launch.cache_clear()
    with ExitStack() as stack:
        stack.callback(tuning._launch.cache_clear)
        for module in (tuning, device):
            stack.enter_context(mock.patch.object(module, "device_info", return_value=facts))
        stack.enter_context(mock.patch.object(tuning, "user_folder", return_value=tuning.PACKAGED / facts.name))
        yield gpu


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def angles(model: Model, tokens: int) -> tuple[Tensor, Tensor]:
    """The cos/sin cache of 4096 positions, and the tokens' positions."""
    return meta(4096, model.head_dim, dtype=FP32), meta(tokens, dtype=torch.int64)


def norm() -> Iterator[Shipped]:
    """A row's program does not depend on the number of rows. fp32, and an fp32 weight, occur in tests alone."""

    def norms(hidden: int, dtype: torch.dtype, weight_dtype: torch.dtype, add: bool) -> None:
        x, weight = meta(8192, hidden, dtype=dtype), meta(hidden, dtype=weight_dtype)
        if add:
            norm_kernels.add_rms_norm(x, x, weight, 1e-5, x, x)
        else:
            norm_kernels.rms_norm(x, weight, 1e-5, x)

    kinds = [(model, BF16, BF16) for model in MODELS]
    kinds += [(MODELS[0], FP16, FP16), (MODELS[0], BF16, FP32), (MODELS[0], FP32, FP32)]
    for add in (False, True):
        for model, dtype, weight_dtype in kinds:
            weight = "" if weight_dtype == dtype else f", weight {SHORT[weight_dtype]}"
            name = f"{'add_rms_norm' if add else 'rms_norm'} {model.name} {SHORT[dtype]}{weight}"
            yield Shipped(name, partial(norms, model.hidden, dtype, weight_dtype, add), narrowest=128)


def rope() -> Iterator[Shipped]:
    """In place in the fused projection, and with the keys and values into pages: 8192 of 64 tokens."""

    def turn(model: Model, tokens: int, dtype: torch.dtype) -> None:
        q, k, _ = model.qkv(tokens, dtype).split((model.heads, model.kv_heads, model.kv_heads), dim=1)
        rope_kernels.rope(q, k, *angles(model, tokens), False, q, k)

    def turn_and_write(model: Model, tokens: int, dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
        pages = meta(8192, model.kv_heads, 64, model.head_dim, dtype=pages_dtype)
        scales = None if pages_dtype == dtype else meta(8192, model.kv_heads, 64, dtype=FP32)
        qkv = model.qkv(tokens, dtype)
        slots, q_out = meta(tokens, dtype=torch.int64), meta(tokens, model.heads, model.head_dim, dtype=dtype)
        turned = angles(model, tokens)
        rope_kernels.rope_and_write_kv(qkv.flatten(1), *turned, slots, pages, pages, scales, scales, False, q_out)

    for step, tokens in STEPS.items():
        for model in MODELS:
            yield Shipped(f"rope {model.name} bf16 {step}", partial(turn, model, tokens, BF16))
            for pages_dtype in (BF16, torch.int8, torch.float8_e4m3fn)[: 1 if model.name == "13B" else 3]:
                name = f"rope_and_write_kv {model.name} bf16 {step}, pages {SHORT[pages_dtype]}"
                yield Shipped(name, partial(turn_and_write, model, tokens, BF16, pages_dtype))


def swiglu() -> Iterator[Shipped]:
    """Every access is of 128 bits."""

    def multiply(model: Model, tokens: int, dtype: torch.dtype) -> None:
        gate_up = meta(tokens, 2 * model.intermediate, dtype=dtype)
        swiglu_kernels.silu_mul(gate_up, meta(tokens, model.intermediate, dtype=dtype))

    for step, tokens in STEPS.items():
        for model in MODELS:
            call = partial(multiply, model, tokens, BF16)
            yield Shipped(f"silu_mul {model.name} bf16 {step}", call, narrowest=128)
    yield Shipped("silu_mul 7B fp16 prefill", partial(multiply, MODELS[0], STEPS["prefill"], FP16), narrowest=128)


def sampling() -> Iterator[Shipped]:
    """Several kernels; a row's programs do not depend on the number of rows. The chosen logit is one load by itself.

    Vocabularies of Llama 2, of Llama 3, and the largest in use: each dtype at the least and at another, as each of
    these takes the compile tier 10 s.
    """

    def sample(vocab: int, dtype: torch.dtype) -> None:
        rows = 64
        real, whole = meta(rows, dtype=FP32), meta(rows, dtype=torch.int64)
        top_k = meta(rows, dtype=torch.int32)
        sampling_kernels.sample(
            meta(rows, vocab, dtype=dtype), real, top_k, real, real, whole, whole, whole, real, None
        )

    for vocab, dtype in ((32000, FP32), (32000, BF16), (128256, BF16), (262144, FP32)):
        chosen = {"load 16": 1} if dtype == BF16 else {}
        yield Shipped(f"sample V={vocab} {SHORT[dtype]}", partial(sample, vocab, dtype), besides=chosen)


def attention() -> Iterator[Shipped]:
    """64 sequences of 32 pages at most. Lengths, bounds and page ids are loads by themselves."""

    def decode(model: Model, dtype: torch.dtype, pages_dtype: torch.dtype, max_pages: int, queries: int) -> None:
        q = meta(64 * queries, model.heads, model.head_dim, dtype=dtype)
        pages = meta(8192, model.kv_heads, 64, model.head_dim, dtype=pages_dtype)
        table, lengths = meta(64, max_pages, dtype=torch.int32), meta(64, dtype=torch.int32)
        scales = None if pages_dtype == dtype else meta(8192, model.kv_heads, 64, dtype=FP32)
        held = (pages, pages, table, lengths, scales, scales)
        decode_kernels.attention_decode(q, *held, 0.1, False, q, None, None)

    def prefill(model: Model, dtype: torch.dtype, pages_dtype: torch.dtype) -> None:
        q = meta(8192, model.heads, model.head_dim, dtype=dtype)
        pages = meta(8192, model.kv_heads, 64, model.head_dim, dtype=pages_dtype)
        table, lengths, cu = meta(64, 32, dtype=torch.int32), meta(64, dtype=torch.int32), meta(65, dtype=torch.int32)
        scales = None if pages_dtype == dtype else meta(8192, model.kv_heads, 64, dtype=FP32)
        held = (pages, pages, table, lengths, cu, scales, scales)
        prefill_kernels.attention_prefill(q, *held, 0.1, False, q, None)

    def varlen(model: Model, dtype: torch.dtype) -> None:
        q, k = (meta(8192, heads, model.head_dim, dtype=dtype) for heads in (model.heads, model.kv_heads))
        cu = meta(65, dtype=torch.int32)
        prefill_kernels.attention_varlen(q, k, k, cu, cu, 0.1, True, False, q, None)

    for model in (MODELS[0], MODELS[2]):
        for pages_dtype in (BF16, torch.int8, torch.float8_e4m3fn):
            held = f"pages {SHORT[pages_dtype]}"
            call = partial(decode, model, BF16, pages_dtype, 64, 1)
            yield Shipped(f"attention_decode {model.name} bf16, split, {held}", call)
            yield Shipped(f"attention_prefill {model.name} bf16, {held}", partial(prefill, model, BF16, pages_dtype))
    yield Shipped("attention_decode 70B bf16, 4 queries", partial(decode, MODELS[2], BF16, BF16, 8, 4))
    for dtype in (FP16, FP32):
        yield Shipped(f"attention_varlen 7B {SHORT[dtype]}", partial(varlen, MODELS[0], dtype))
    for pages_dtype in (FP32, torch.int8):
        call = partial(prefill, MODELS[0], FP32, pages_dtype)
        yield Shipped(f"attention_prefill 7B fp32, pages {SHORT[pages_dtype]}", call)


FORMS = {"": (), "norm": ("norm",), "residual": ("residual",), "norm, gated": ("norm", "gated")}


def around(form: str, x: Tensor, features: int) -> tuple[Any, ...]:
    """What a product takes of the ops before and behind it, its result, and a workspace."""
    names, columns = FORMS[form], features // 2 if "gated" in form else features
    norm = x[0] if "norm" in names else None
    out = meta(x.shape[0], columns, dtype=x.dtype)
    return norm, 1e-5, out if "residual" in names else None, "gated" in names, out, None


def matmul() -> Iterator[Shipped]:
    """A 7B's products and a 70B's largest, alone and as its block calls them, at the fewest and most rows."""

    def multiply(rows: int, features: int, size: int, form: str, dtype: torch.dtype) -> None:
        x, weight = meta(rows, size, dtype=dtype), meta(features, size, dtype=dtype)
        OPS["matmul"].launcher("cuda")(x, weight, None, *around(form, x, features))

    products = [("7B qkv", 12288, 4096, ""), ("7B qkv", 12288, 4096, "norm"), ("7B down", 4096, 11008, "residual")]
    products += [("7B gate_up", 22016, 4096, "norm, gated"), ("70B gate_up", 57344, 8192, "norm, gated")]
    for rows in (1, 32, 64):
        for name, features, size, form in products:
            title = f"matmul {name} bf16, {rows} rows{form and ', ' + form}"
            once = {"load 16": 1} if "norm" in form else {}  # the norm's weight: one number of each column
            call = partial(multiply, rows, features, size, form, BF16)
            yield Shipped(title, call, besides=once)
    yield Shipped("matmul 7B qkv fp16, 1 rows", partial(multiply, 1, 12288, 4096, "", FP16))
    yield Shipped("matmul 7B qkv fp32, 64 rows", partial(multiply, 64, 12288, 4096, "", FP32))


def embedding() -> Iterator[Shipped]:
    """The id is one load by itself."""

    def look_up(hidden: int) -> None:
        ids, weight = meta(64, dtype=torch.int64), meta(32000, hidden, dtype=BF16)
        embedding_kernels.embedding(ids, weight, meta(64, hidden, dtype=BF16))

    for model in MODELS:
        yield Shipped(f"embedding {model.name} bf16", partial(look_up, model.hidden), besides={"load 64": 1})


def merge() -> Iterator[Shipped]:
    """A token's programs do not depend on the number of tokens. Of log-sum-exps a thread reads those of its heads."""

    def merge_state(model: Model, dtype: torch.dtype) -> None:
        side, lse = meta(64, model.heads, model.head_dim, dtype=dtype), meta(64, model.heads, dtype=FP32)
        merge_kernels.merge_state(side, lse, side, lse, side, lse)

    for model, dtype in ((MODELS[0], BF16), (MODELS[2], BF16), (MODELS[0], FP16), (MODELS[0], FP32)):
        call = partial(merge_state, model, dtype)
        sums = {"load 32": 6, "load 64": 2, "store 32": 1}
        yield Shipped(f"merge_state {model.name} {SHORT[dtype]}", call, narrowest=128, besides=sums)


DOWN, QKV, GATE_UP = ("7B down", 4096, 11008), ("7B qkv", 12288, 4096), ("70B gate_up", 57344, 8192)
BLOCK = (*QKV, "norm"), (*DOWN, "residual"), ("7B gate_up", 22016, 4096, "norm, gated"), (*GATE_UP, "norm, gated")


def int4() -> Iterator[Shipped]:
    """Fused projections of 7B and 70B; 16 rows stand for fewer. Scales and zeros are of one group, 16 and 8 bits."""

    def multiply(
        rows: int, features: int, size: int, group: int, dtype: torch.dtype, zeros: torch.dtype | None, form: str = ""
    ) -> None:
        x, packed = meta(rows, size, dtype=dtype), meta(*packed_shape(features, size), dtype=torch.int32)
        groups = (features, size // group)
        held = meta(*groups, dtype=dtype), None if zeros is None else meta(*groups, dtype=zeros)
        OPS["matmul_int4"].launcher("cuda")(x, packed, *held, None, *around(form, x, features))

    kinds = [(*weight, 128, BF16, None, rows) for weight in (DOWN, QKV, GATE_UP) for rows in (16, 64, 1024)]
    kinds += [(*DOWN, 128, FP16, None, 16), (*DOWN, 128, BF16, None, 32), (*DOWN, 11008, BF16, None, 16)]
    kinds += [(*DOWN, group, BF16, None, rows) for group in (64, 32) for rows in (16, 64)]
    kinds += [(*DOWN, 128, BF16, zeros, rows) for zeros in (torch.uint8, BF16) for rows in (16, 64)]
    kinds += [(*DOWN, 128, BF16, torch.uint8, 1024), (*DOWN, 128, FP32, None, 16)]
    for name, features, size, group, dtype, zeros, rows in kinds:
        call = partial(multiply, rows, features, size, group, dtype, zeros)
        held = f"groups of {group}" + ("" if zeros is None else f", zeros {SHORT[zeros]}")
        loads = 128 // min(group, 128) * (4 if rows > 64 else 2)  # in a tile: of a thread's two or four rows
        besides = {"load 16": loads * (1 + (zeros == BF16)), "load 8": loads * (zeros == torch.uint8)}
        weights = {
            "matmul_quantized_kernel": 64 * 128 * (1 if rows <= 16 else 2),
            "dequantize_kernel": 64 * min(group, 64),
        }
        title = f"matmul_int4 {name} {SHORT[dtype]}, {rows} rows, {held}"
        yield Shipped(title, call, besides=besides, weights=weights)
    for rows, (name, features, size, form) in itertools.product((16, 64), BLOCK):
        tiles = 2 if rows > 16 or "gated" in form else 1
        yield Shipped(
            f"matmul_int4 {name} bf16, {rows} rows, groups of 128, {form}",
            partial(multiply, rows, features, size, 128, BF16, None, form),
            besides={"load 16": 2},
            weights={"matmul_quantized_kernel": 64 * 128 * tiles},
        )


def int8() -> Iterator[Shipped]:
    """As of 4 bits."""

    def multiply(rows: int, features: int, size: int, group: int, dtype: torch.dtype, form: str = "") -> None:
        x, packed = meta(rows, size, dtype=dtype), meta(*int8_shape(features, size), dtype=torch.int8)
        scales = meta(features, size // group, dtype=dtype)
        OPS["matmul_int8"].launcher("cuda")(x, packed, scales, None, *around(form, x, features))

    kinds = [(*weight, 128, BF16, rows) for weight in (DOWN, QKV, GATE_UP) for rows in (16, 64, 1024)]
    kinds += [(*DOWN, 128, FP16, 16), (*DOWN, 128, FP16, 1024), (*DOWN, 128, BF16, 32), (*DOWN, 128, FP32, 16)]
    kinds += [(*DOWN, group, BF16, rows) for group in (64, 32, 11008) for rows in (16, 64)]
    for name, features, size, group, dtype, rows in kinds:
        call = partial(multiply, rows, features, size, group, dtype)
        besides = {"load 16": 128 // min(group, 128) * (4 if rows >= 64 else 2)}
        weights = {
            "matmul_quantized_kernel": 64 * 128 * (1 if dtype == FP32 else 2),
            "dequantize_kernel": 64 * min(group, 64),
        }
        title = f"matmul_int8 {name} {SHORT[dtype]}, {rows} rows, groups of {group}"
        yield Shipped(title, call, besides=besides, weights=weights)
    for rows, (name, features, size, form) in itertools.product((16, 64), BLOCK):
        call = partial(multiply, rows, features, size, 128, BF16, form)
        title = f"matmul_int8 {name} bf16, {rows} rows, groups of 128, {form}"
        weights = {
            "matmul_quantized_kernel": 2 * 64 * 128,
            "dequantize_kernel": 64 * 64,
        }  # of 64 rows on sm_80 and sm_89
        yield Shipped(title, call, besides={"load 16": 4}, weights=weights)


def w8a8() -> Iterator[Shipped]:
    """Rows as codes, and codes by codes: all tiles of rows. A weight's scales have 16 bits; some loops are unrolled."""

    def quantize(size: int, dtype: torch.dtype) -> None:
        x, codes, scales = meta(8192, size, dtype=dtype), meta(8192, size, dtype=torch.int8), meta(8192, dtype=FP32)
        quantize_kernels.quantize_rows(x, codes, scales)

    def norms(size: int) -> None:
        x, weight, rounded = meta(8192, size, dtype=BF16), meta(size, dtype=BF16), meta(8192, size, dtype=torch.int8)
        norm_kernels.add_rms_norm_int8(x, x, weight, 1e-5, rounded, meta(8192, dtype=FP32))

    def gates(size: int) -> None:
        gate_up, rounded = meta(8192, 2 * size, dtype=BF16), meta(8192, size, dtype=torch.int8)
        swiglu_kernels.silu_mul_int8(gate_up, rounded, meta(8192, dtype=FP32))

    for model in MODELS:
        once = {"store 32": 1}
        yield Shipped(f"add_rms_norm_int8 {model.name} bf16", partial(norms, model.hidden), besides=once)
        yield Shipped(f"silu_mul_int8 {model.name} bf16", partial(gates, model.intermediate), besides=once)

    def multiply(rows: int, features: int, size: int, dtype: torch.dtype) -> None:
        x, packed = meta(rows, size, dtype=torch.int8), meta(*int8_shape(features, size), dtype=torch.int8)
        scales, out = meta(features, dtype=dtype), meta(rows, features, dtype=dtype)
        w8a8_kernels.matmul_w8a8(x, meta(rows, dtype=FP32), packed, scales, None, out, None)

    for size, dtype in ((4096, BF16), (11008, BF16), (28672, BF16), (4096, FP32)):
        yield Shipped(f"quantize_rows K={size} {SHORT[dtype]}", partial(quantize, size, dtype), besides={"store 32": 1})
    weights = {"matmul_w8a8_kernel": 128 * 128}  # of two turns where they take 64 columns
    kinds = [(*weight, rows, BF16) for weight in (DOWN, QKV, GATE_UP) for rows in (1, 32, 64, 1024)]
    for name, features, size, rows, dtype in [*kinds, (*DOWN, 16, FP16), (*DOWN, 1024, FP32)]:
        call = partial(multiply, rows, features, size, dtype)
        yield Shipped(f"matmul_w8a8 {name} {SHORT[dtype]}, {rows} rows", call, besides={"load 16": 2}, weights=weights)


FAMILIES = {
    "norm": norm,
    "rope": rope,
    "swiglu": swiglu,
    "sampling": sampling,
    "attention": attention,
    "matmul": matmul,
    "embedding": embedding,
    "merge": merge,
    "int4": int4,
    "int8": int8,
    "w8a8": w8a8,
}
SHIPPED = {family: list(launches()) for family, launches in FAMILIES.items()}
