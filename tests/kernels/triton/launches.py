"""The shipped launches: every Triton kernel as Llama 2 calls it, for the compile tier and docs/reference/kernels/.

Calls are the catalogue's, on the meta device: only dtypes, strides and alignment count. To add a kernel: a generator of
`Shipped` and its name in FAMILIES. Then `make kernels-report`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from fastllama.catalogue import attention as attentions
from fastllama.catalogue import matmuls, rotary, rows, sampling
from fastllama.catalogue.arguments import in_order, positional
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.sizes import LLAMA_2, LlamaSizes
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import device, tuning
from fastllama.kernels.launch.device import Device
from fastllama.testing.resources import NARROW
from fastllama.testing.targets import Target, target

MODELS = tuple(sorted(LLAMA_2, key=lambda sizes: sizes.hidden))
SMALL, _, LARGE = MODELS
META = torch.device("meta")
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
SEQUENCES, PAGES = 64, 8192  # of attention; pages of 64 tokens


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
    """Within, launchers choose configurations for a target's usual GPU, and ignore the user's tuned ones."""
    gpu = target(name)
    facts = Device(GPUS[name], name, gpu.multiprocessors, gpu.warp_size, gpu.shared_per_block, l2_cache=32 << 20)
    tuning._launch.cache_clear()
    with ExitStack() as stack:
        stack.callback(tuning._launch.cache_clear)
        for module in (tuning, device):
            stack.enter_context(mock.patch.object(module, "device_info", return_value=facts))
        stack.enter_context(mock.patch.object(tuning, "user_folder", return_value=tuning.PACKAGED / facts.name))
        yield gpu


def launching(make: Callable[..., Arguments], dtype: torch.dtype, *sizes: Any, **options: Any) -> Callable[[], Any]:
    """What launches a call of the catalogue, by the maker that has its op's name."""
    op = make.__name__

    def launch() -> None:
        call = in_order(op, make(Maker(dtype, META), *sizes, **options))
        OPS[op].launcher("cuda")(*positional(op, call))

    return launch


def norm() -> Iterator[Shipped]:
    """A row's program does not depend on the number of rows. fp32, and an fp32 weight, occur in tests alone."""
    kinds = [(sizes, BF16, BF16) for sizes in MODELS]
    kinds += [(SMALL, FP16, FP16), (SMALL, BF16, FP32), (SMALL, FP32, FP32)]
    for make in (rows.rms_norm, rows.add_rms_norm):
        for sizes, dtype, weight_dtype in kinds:
            weight = "" if weight_dtype == dtype else f", weight {SHORT[weight_dtype]}"
            call = launching(make, dtype, STEPS["prefill"], sizes.hidden, weight_dtype=weight_dtype)
            yield Shipped(f"{make.__name__} {sizes.short} {SHORT[dtype]}{weight}", call, narrowest=128)


WRITES = (
    ("decode", None, None),
    ("decode", torch.int8, None),
    ("decode", torch.int8, 0.5),
    ("decode", torch.float8_e4m3fn, 0.5),
    ("prefill", None, None),
)


def rope() -> Iterator[Shipped]:
    """In place in the fused projection, with the keys and values into pages, and the write of these alone."""
    call = launching(rotary.rope, BF16, STEPS["decode"], *SMALL.attention, angles=BF16)
    yield Shipped("rope 7B bf16 decode, angles bf16", call, besides={"load 16": 4})  # of 64 pairs by 64 threads
    heads = (SMALL.kv_heads, SMALL.head_dim)
    for step, pages_dtype, scale in WRITES:
        options = {"pages": PAGES, "pages_dtype": pages_dtype, "scale": scale}
        name = f"write_kv 7B bf16 {step}, pages {SHORT[pages_dtype or BF16]}{', one scale' if scale else ''}"
        yield Shipped(name, launching(rotary.write_kv, BF16, STEPS[step], *heads, **options))
    for step, tokens in STEPS.items():
        for sizes in MODELS:
            call = launching(rotary.rope, BF16, tokens, *sizes.attention, fused=True)
            yield Shipped(f"rope {sizes.short} bf16 {step}", call)
            for pages_dtype in (None, torch.int8, torch.float8_e4m3fn)[: 1 if sizes.short == "13B" else 3]:
                name = f"rope_and_write_kv {sizes.short} bf16 {step}, pages {SHORT[pages_dtype or BF16]}"
                options = {"pages": PAGES, "pages_dtype": pages_dtype}
                yield Shipped(name, launching(rotary.rope_and_write_kv, BF16, tokens, *sizes.attention, **options))


def swiglu() -> Iterator[Shipped]:
    """Every access is of 128 bits."""
    for step, tokens in STEPS.items():
        for sizes in MODELS:
            call = launching(rows.silu_mul, BF16, tokens, sizes.intermediate)
            yield Shipped(f"silu_mul {sizes.short} bf16 {step}", call, narrowest=128)
    call = launching(rows.silu_mul, FP16, STEPS["prefill"], SMALL.intermediate)
    yield Shipped("silu_mul 7B fp16 prefill", call, narrowest=128)
    call = launching(rows.silu_mul, BF16, STEPS["decode"], SMALL.intermediate, apart=True)
    yield Shipped("silu_mul 7B bf16, gate and up apart", call, narrowest=128)


def sample() -> Iterator[Shipped]:
    """Several kernels; a row's programs do not depend on the number of rows. The chosen logit is one load by itself.

    Vocabularies of Llama 2, of Llama 3, and the largest in use: each dtype at the least and at another, as each of
    these takes the compile tier 10 s.
    """
    for vocab, dtype in ((SMALL.vocab, FP32), (SMALL.vocab, BF16), (128256, BF16), (262144, FP32)):
        chosen = {"load 16": 1} if dtype == BF16 else {}
        yield Shipped(f"sample V={vocab} {SHORT[dtype]}", launching(sampling.sample, dtype, 64, vocab), besides=chosen)


def adjust() -> Iterator[Shipped]:
    """A row's programs do not depend on the number of rows. Slots, bounds, ids and penalties are single loads."""
    for vocab, dtype in ((SMALL.vocab, FP32), (SMALL.vocab, BF16), (128256, BF16)):
        call = launching(sampling.adjust_logits, dtype, 64, vocab)
        yield Shipped(f"adjust_logits V={vocab} {SHORT[dtype]}", call, besides={"load 64": 4, "load 32": 3})


def attention() -> Iterator[Shipped]:
    """Sequences of 32 pages at most, or 64 of a decode. Lengths, bounds and page ids are loads by themselves."""
    each = [STEPS["prefill"] // SEQUENCES] * SEQUENCES  # tokens of a prompt

    def decode(sizes: LlamaSizes, pages_dtype: torch.dtype | None, width: int, queries: int) -> Callable[[], Any]:
        options = {"queries": queries, "width": width, "pages": PAGES, "pages_dtype": pages_dtype}
        return launching(attentions.attention_decode, BF16, [1] * SEQUENCES, *sizes.attention, **options)

    def prefill(sizes: LlamaSizes, dtype: torch.dtype, pages_dtype: torch.dtype | None) -> Callable[[], Any]:
        options = {"width": 32, "pages": PAGES, "pages_dtype": pages_dtype}
        return launching(attentions.attention_prefill, dtype, each, each, *sizes.attention, **options)

    for sizes in (SMALL, LARGE):
        for pages_dtype in (None, torch.int8, torch.float8_e4m3fn):
            held = f"pages {SHORT[pages_dtype or BF16]}"
            yield Shipped(f"attention_decode {sizes.short} bf16, split, {held}", decode(sizes, pages_dtype, 64, 1))
            yield Shipped(f"attention_prefill {sizes.short} bf16, {held}", prefill(sizes, BF16, pages_dtype))
    yield Shipped("attention_decode 70B bf16, 4 queries", decode(LARGE, None, 8, 4))
    for sizes, count, queries in ((SMALL, 1, 32), (LARGE, 4, 8)):  # examples/cascade.py
        options = {"queries": queries, "width": 64, "pages": PAGES, "causal": False}
        call = launching(attentions.attention_decode, BF16, [1] * count, *sizes.attention, **options)
        yield Shipped(f"attention_decode {sizes.short} bf16, a prefix of 32 sequences", call)
    for dtype in (FP16, FP32):
        call = launching(attentions.attention_varlen, dtype, each, each, *SMALL.attention)
        yield Shipped(f"attention_varlen 7B {SHORT[dtype]}", call)
    for pages_dtype in (None, torch.int8):
        held = f"pages {SHORT[pages_dtype or FP32]}"
        yield Shipped(f"attention_prefill 7B fp32, {held}", prefill(SMALL, FP32, pages_dtype))


QKV, GATE_UP, DOWN = ("7B qkv", *SMALL.qkv), ("7B gate_up", *SMALL.gate_up), ("7B down", *SMALL.down)
LARGEST = ("70B gate_up", *LARGE.gate_up)
# A block's matmuls, with their fused prologues and epilogues.
BLOCK = (*QKV, "norm"), (*DOWN, "residual"), (*GATE_UP, "norm, gated"), (*LARGEST, "norm, gated")


def matmul() -> Iterator[Shipped]:
    """A 7B's matmuls and a 70B's largest, plain and fused as in a block, at the fewest and most rows."""
    for count in (1, 32, 64):
        for name, *sizes, form in ((*QKV, ""), *BLOCK):
            title = f"matmul {name} bf16, {count} rows{form and ', ' + form}"
            once = {"load 16": 1} if "norm" in form else {}  # the norm's weight: one number of each column
            yield Shipped(title, launching(matmuls.matmul, BF16, count, *sizes, form=form), besides=once)
    yield Shipped("matmul 7B qkv fp16, 1 rows", launching(matmuls.matmul, FP16, 1, *SMALL.qkv))
    yield Shipped("matmul 7B qkv fp32, 64 rows", launching(matmuls.matmul, FP32, 64, *SMALL.qkv))


def embedding() -> Iterator[Shipped]:
    """The id is one load by itself."""
    for sizes in MODELS:
        call = launching(rows.embedding, BF16, 64, sizes.vocab, sizes.hidden)
        yield Shipped(f"embedding {sizes.short} bf16", call, besides={"load 64": 1})


def merge() -> Iterator[Shipped]:
    """A token's programs do not depend on the number of tokens. A thread reads the log-sum-exps of its heads."""
    kinds = ((SMALL, BF16, False), (LARGE, BF16, False), (SMALL, FP16, False), (SMALL, FP32, False))
    for sizes, dtype, base2 in (*kinds, (SMALL, BF16, True)):
        call = launching(rows.merge_state, dtype, 64, sizes.heads, sizes.head_dim, base2=base2)
        sums = {"load 32": 6, "load 64": 2, "store 32": 1}
        name = f"merge_state {sizes.short} {SHORT[dtype]}{', base 2' if base2 else ''}"
        yield Shipped(name, call, narrowest=128, besides=sums)


def int4() -> Iterator[Shipped]:
    """Fused projections of 7B and 70B; 16 rows stand for fewer. A group has a 16-bit scale and an 8-bit zero."""
    kinds = [(*weight, 128, BF16, None, count) for weight in (DOWN, QKV, LARGEST) for count in (16, 64, 1024)]
    kinds += [(*DOWN, 128, FP16, None, 16), (*DOWN, 128, BF16, None, 32), (*DOWN, 11008, BF16, None, 16)]
    kinds += [(*DOWN, group, BF16, None, count) for group in (64, 32) for count in (16, 64)]
    kinds += [(*DOWN, 128, BF16, zeros, count) for zeros in (torch.uint8, BF16) for count in (16, 64)]
    kinds += [(*DOWN, 128, BF16, torch.uint8, 1024), (*DOWN, 128, FP32, None, 16)]
    for name, features, size, group, dtype, zeros, count in kinds:
        call = launching(matmuls.matmul_int4, dtype, count, features, size, group=group, zeros=zeros)
        held = f"groups of {group}" + ("" if zeros is None else f", zeros {SHORT[zeros]}")
        loads = 128 // min(group, 128) * (4 if count > 64 else 2)  # in a tile: of a thread's two or four rows
        besides = {"load 16": loads * (1 + (zeros == BF16)), "load 8": loads * (zeros == torch.uint8)}
        weights = {
            "matmul_quantized_kernel": 64 * 128 * (1 if count <= 16 else 2),
            "dequantize_kernel": 64 * min(group, 64),
        }
        title = f"matmul_int4 {name} {SHORT[dtype]}, {count} rows, {held}"
        yield Shipped(title, call, besides=besides, weights=weights)
    for count, (name, *sizes, form) in itertools.product((16, 64), BLOCK):
        tiles = 2 if count > 16 or "gated" in form else 1
        yield Shipped(
            f"matmul_int4 {name} bf16, {count} rows, groups of 128, {form}",
            launching(matmuls.matmul_int4, BF16, count, *sizes, form=form),
            besides={"load 16": 2},
            weights={"matmul_quantized_kernel": 64 * 128 * tiles},
        )


def int8() -> Iterator[Shipped]:
    """The same shapes as in 4 bits."""
    kinds = [(*weight, 128, BF16, count) for weight in (DOWN, QKV, LARGEST) for count in (16, 64, 1024)]
    kinds += [(*DOWN, 128, FP16, 16), (*DOWN, 128, FP16, 1024), (*DOWN, 128, BF16, 32), (*DOWN, 128, FP32, 16)]
    kinds += [(*DOWN, group, BF16, count) for group in (64, 32, 11008) for count in (16, 64)]
    for name, features, size, group, dtype, count in kinds:
        call = launching(matmuls.matmul_int8, dtype, count, features, size, group=group)
        besides = {"load 16": 128 // min(group, 128) * (4 if count >= 64 else 2)}
        weights = {
            "matmul_quantized_kernel": 64 * 128 * (1 if dtype == FP32 else 2),
            "dequantize_kernel": 64 * min(group, 64),
        }
        title = f"matmul_int8 {name} {SHORT[dtype]}, {count} rows, groups of {group}"
        yield Shipped(title, call, besides=besides, weights=weights)
    for count, (name, *sizes, form) in itertools.product((16, 64), BLOCK):
        call = launching(matmuls.matmul_int8, BF16, count, *sizes, form=form)
        title = f"matmul_int8 {name} bf16, {count} rows, groups of 128, {form}"
        # dequantized where there are 64 rows, on sm_80 and sm_89
        weights = {"matmul_quantized_kernel": 2 * 64 * 128, "dequantize_kernel": 64 * 64}
        yield Shipped(title, call, besides={"load 16": 4}, weights=weights)


def w8a8() -> Iterator[Shipped]:
    """Quantized rows and their matmuls, with all tiles of rows. A weight's scales have 16 bits; some loops unroll."""
    once, many = {"store 32": 1}, STEPS["prefill"]
    for sizes in MODELS:
        name = f"add_rms_norm_int8 {sizes.short} bf16"
        yield Shipped(name, launching(rows.add_rms_norm_int8, BF16, many, sizes.hidden), besides=once)
        name = f"silu_mul_int8 {sizes.short} bf16"
        yield Shipped(name, launching(rows.silu_mul_int8, BF16, many, sizes.intermediate), besides=once)
    for size, dtype in ((4096, BF16), (11008, BF16), (28672, BF16), (4096, FP32)):
        name = f"quantize_rows K={size} {SHORT[dtype]}"
        yield Shipped(name, launching(rows.quantize_rows, dtype, many, size), besides=once)
    weights = {"matmul_w8a8_kernel": 128 * 128}  # of two turns where they take 64 columns
    kinds = [(*weight, count, BF16) for weight in (DOWN, QKV, LARGEST) for count in (1, 32, 64, 1024)]
    for name, *sizes, count, dtype in [*kinds, (*DOWN, 16, FP16), (*DOWN, 1024, FP32)]:
        call = launching(matmuls.matmul_w8a8, dtype, count, *sizes)
        title = f"matmul_w8a8 {name} {SHORT[dtype]}, {count} rows"
        yield Shipped(title, call, besides={"load 16": 2}, weights=weights)


FAMILIES = {
    "norm": norm,
    "rope": rope,
    "swiglu": swiglu,
    "sampling": sample,
    "adjust": adjust,
    "attention": attention,
    "matmul": matmul,
    "embedding": embedding,
    "merge": merge,
    "int4": int4,
    "int8": int8,
    "w8a8": w8a8,
}
SHIPPED = {family: list(launches()) for family, launches in FAMILIES.items()}
