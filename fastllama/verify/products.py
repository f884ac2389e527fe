"""Cases of products: every kind of weight, alone and with what a block of Llama has before and behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import pack_bf12, pack_int4, pack_int8
from fastllama.verify import oracle
from fastllama.verify.case import EPS, Case, Random, Results

# tokens, columns, features, columns of a group: few rows and many, half tiles and whole ones
SHAPES = ((1, 4096, 96, 128), (5, 256, 256, 32), (33, 1024, 130, 1024), (70, 192, 66, 64))
FORMS = ("", "bias", "norm", "norm, gated", "residual")


class Weight(NamedTuple):
    """One weight as an op takes it, and what it stands for in the dtype of x: `plain(x, *packed, **known)`."""

    op: str
    label: str
    packed: tuple[Any, ...]
    plain: Callable[..., Tensor]
    known: dict[str, Tensor] = {}  # noqa: RUF012 - nobody writes to it


def products(random: Random) -> Iterator[Case]:
    """Op by op."""
    for make in (_matmul, _matmul_bf12, _matmul_int4, _matmul_int8):
        for tokens, inner, outer, group in SHAPES:
            for weight in make(random, inner, outer, group):
                for form in FORMS:
                    yield _case(random, weight, form, tokens, inner, outer)


def _case(random: Random, weight: Weight, form: str, tokens: int, inner: int, outer: int) -> Case:
    around = {"bias": random.normal(outer)} if "bias" in form else {}
    if "norm" in form:
        around["norm"] = random.normal(inner).abs()
    if "residual" in form:
        around["residual"] = random.normal(tokens, outer)
    gated = "gated" in form
    return Case(
        weight.op,
        f"x [{tokens}, {inner}], weight [{outer}, {inner}]{weight.label}{form and ', ' + form}",
        (random.normal(tokens, inner), *weight.packed, *around.values()),
        partial(_formula, plain=weight.plain, names=tuple(around), gated=gated),
        {"gated": gated, "eps": EPS},
        named=tuple(around),
        known=weight.known,
    )


def _formula(
    x: Tensor, *args: Any, plain: Callable[..., Tensor], names: tuple[str, ...], gated: bool, **known: Tensor
) -> Results:
    packed, around = args[: len(args) - len(names)], dict(zip(names, args[len(args) - len(names) :], strict=True))
    rows = oracle.rms_norm(x, around["norm"], EPS) if "norm" in around else x
    y = F.linear(rows, plain(x, *packed, **known), around.get("bias"))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y + around["residual"] if "residual" in around else y,)


def _matmul(random: Random, inner: int, outer: int, group: int) -> Iterator[Weight]:
    weight = random.normal(outer, inner) / math.sqrt(inner)
    yield Weight("matmul", "", (weight,), lambda x, weight: weight)


def _matmul_bf12(random: Random, inner: int, outer: int, group: int) -> Iterator[Weight]:
    weight = (random.normal(outer, inner) / math.sqrt(inner)).bfloat16()
    weight[:, ::97] *= 256  # values that have no code, in every row: sums of all are alike
    yield Weight("matmul_bf12", "", pack_bf12(weight), lambda x, *packed, values: values.to(x), {"values": weight})


def _matmul_int4(random: Random, inner: int, outer: int, group: int) -> Iterator[Weight]:
    codes = random.order(outer * inner).view(outer, inner) % 16

    def plain(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, codes: Tensor) -> Tensor:
        groups = codes.to(x).unflatten(1, (scales.shape[1], -1))
        return ((groups - (8 if zeros is None else zeros[..., None])) * scales[..., None]).flatten(1)

    counts = outer, inner // group
    packed, scales = pack_int4(codes.to(torch.uint8)), random.normal(*counts).sign() / (4 * math.sqrt(inner))
    yield Weight("matmul_int4", f", groups of {group}", (packed, scales), plain, {"codes": codes})
    zeros = random.normal(*counts).abs().clamp(max=1) * 15
    yield Weight("matmul_int4", f", groups of {group}, zeros", (packed, scales, zeros), plain, {"codes": codes})


def _matmul_int8(random: Random, inner: int, outer: int, group: int) -> Iterator[Weight]:
    codes = random.order(outer * inner).view(outer, inner) % 256 - 128

    def plain(x: Tensor, packed: Tensor, scales: Tensor, *, codes: Tensor) -> Tensor:
        return (codes.to(x).unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)

    scales = random.normal(outer, inner // group).sign() / (64 * math.sqrt(inner))
    yield Weight(
        "matmul_int8", f", groups of {group}", (pack_int8(codes.to(torch.int8)), scales), plain, {"codes": codes}
    )
