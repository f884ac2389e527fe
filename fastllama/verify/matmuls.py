"""Cases of matmuls: every kind of weight, alone and with the prologues and epilogues of a Llama block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.catalogue import matmuls as calls
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.verify import oracle
from fastllama.verify.case import FormulaCase, Results, given

# tokens, columns, features, group size: few and many rows, partial and whole tiles
SHAPES = ((1, 4096, 96, 128), (5, 256, 256, 32), (33, 1024, 130, 1024), (70, 192, 66, 64))


class JudgedWeight(NamedTuple):
    """One packed weight for an op, and its values in the dtype of x: `plain(x, **packed, **known)`."""

    call: Callable[..., Arguments]
    label: str
    packed: Arguments
    plain: Callable[..., Tensor]
    known: dict[str, Tensor] = {}  # noqa: RUF012 - never mutated


def matmuls(m: Maker) -> Iterator[FormulaCase]:
    """Op by op."""
    for make in (_matmul, _matmul_bf12, _matmul_int4, _matmul_int8):
        for tokens, inner, outer, group in SHAPES:
            for weight in make(m, inner, outer, group):
                for form in calls.FORMS:
                    yield _case(m, weight, form, tokens, inner, outer)


def _case(m: Maker, weight: JudgedWeight, form: str, tokens: int, inner: int, outer: int) -> FormulaCase:
    op = weight.call.__name__
    return FormulaCase(
        op,
        f"x [{tokens}, {inner}], weight [{outer}, {inner}]{weight.label}{form and ', ' + form}",
        given(op, weight.call(m, tokens, outer, inner, form=form, weight=weight.packed)),
        partial(_formula, plain=weight.plain),
        known=weight.known,
    )


def _formula(
    x: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    plain: Callable[..., Tensor],
    **weight: Any,
) -> Results:
    rows = x if norm is None else oracle.rms_norm(x, norm, eps)
    y = F.linear(rows, plain(x, **weight), bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual,)


def _matmul(m: Maker, inner: int, outer: int, group: int) -> Iterator[JudgedWeight]:
    yield JudgedWeight(calls.matmul, "", calls.matmul_weight(m, outer, inner), lambda x, weight: weight)


def _matmul_bf12(m: Maker, inner: int, outer: int, group: int) -> Iterator[JudgedWeight]:
    values = calls.bf12_values(m, outer, inner)
    packed = calls.bf12_weight(values)
    yield JudgedWeight(calls.matmul_bf12, "", packed, lambda x, values, **_: values.to(x), {"values": values})


def _matmul_int4(m: Maker, inner: int, outer: int, group: int) -> Iterator[JudgedWeight]:
    integers = m.some_of(outer * inner, outer * inner).view(outer, inner) % 16

    def plain(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, integers: Tensor) -> Tensor:
        groups = integers.to(x).unflatten(1, (scales.shape[1], -1))
        return ((groups - (8 if zeros is None else zeros[..., None])) * scales[..., None]).flatten(1)

    scales = _signs(m, outer, inner, group) / (4 * math.sqrt(inner))
    packed = calls.int4_weight(m, outer, inner, group, integers=integers.to(torch.uint8), scales=scales)
    label, known = f", groups of {group}", {"integers": integers}
    yield JudgedWeight(calls.matmul_int4, label, packed, plain, known)
    packed = packed | {"zeros": calls.int4_zeros(m, scales, m.dtype)}
    yield JudgedWeight(calls.matmul_int4, f"{label}, zeros", packed, plain, known)


def _matmul_int8(m: Maker, inner: int, outer: int, group: int) -> Iterator[JudgedWeight]:
    integers = m.some_of(outer * inner, outer * inner).view(outer, inner) % 256 - 128

    def plain(x: Tensor, packed: Tensor, scales: Tensor, integers: Tensor) -> Tensor:
        return (integers.to(x).unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)

    scales = _signs(m, outer, inner, group) / (64 * math.sqrt(inner))
    packed = calls.int8_weight(m, outer, inner, group, integers=integers.to(torch.int8), scales=scales)
    yield JudgedWeight(calls.matmul_int8, f", groups of {group}", packed, plain, {"integers": integers})


def _signs(m: Maker, outer: int, inner: int, group: int) -> Tensor:
    """Scales of one magnitude, so that no group hides another's error."""
    return m.normal(*calls.groups_of(outer, inner, group)).sign()
