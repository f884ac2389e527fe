"""A wrong tensor raises one sentence with its name, its value and what is legal, before anything is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.table import HKV, SMALL_PAGE, D, T, small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import assert_equal, on_cpu, public

TENSORS = [(op, name) for op in OPS for name, value in small_call(op).items() if isinstance(value, Tensor)]
OUTPUTS = ("out", "residual_out", "q_out", "k_out", "tokens", "logprobs", "lse_out", "scales_out", "k_pages", "v_pages")
ANY_SIZE = [
    *(("sample", "logits"), ("adjust_logits", "tokens")),
    *((op, "page_table") for op in ("attention_prefill", "attention_decode")),
]
ANY_STRIDES = ("a_lse", "b_lse", "lse_out")  # log-sum-exps, which flash-attn has as [H, T]
SHAPE = r"^\w+ has shape \[.*\]; legal: \[.*\]"
every_tensor = pytest.mark.parametrize(("op", "name"), TENSORS)


def refuse(op: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    """The call raises, and leaves every tensor it could write as it was."""
    before = {name: given[name].clone() for name in OUTPUTS if name in given and not given[name].is_meta}
    with pytest.raises(error, match=message):
        getattr(kernels, op)(**given)
    for name, value in before.items():
        assert_equal(given[name], value)


def wrong(op: str, name: str, value: Tensor) -> dict[str, Any]:
    return small_call(op) | {name: value}


@pytest.mark.parametrize("op", OPS)
def test_the_calls_are_legal_and_complete(op: str) -> None:
    """Only then do the refusals below come from what is wrong in them."""
    given = small_call(op)
    schema = {argument.name for argument in getattr(torch.ops.fastllama, op).default._schema.arguments}
    assert schema - {"lse_out"} == set(given) - {"lse_out"}
    getattr(kernels, op)(**given)


@every_tensor
def test_rank(op: str, name: str) -> None:
    """A dimension more, one less, none at all. Where any number is legal, the other tensors no longer agree."""
    value = small_call(op)[name]
    for other in (value[None], value[0], value.flatten()[0]):
        refuse(op, wrong(op, name, other), ValueError, SHAPE)


@pytest.mark.parametrize(("op", "name"), [case for case in TENSORS if case not in ANY_SIZE])
def test_size(op: str, name: str) -> None:
    """One element more in the last dimension: named here, or in a tensor that has to agree with this one.

    Logits and page tables may be of any width, and recent tokens any number.
    """
    value = small_call(op)[name]
    refuse(op, wrong(op, name, torch.cat((value, value[..., :1]), -1)), ValueError, SHAPE)


@every_tensor
def test_dtype(op: str, name: str) -> None:
    """Integers where floats belong and the other way round; of one integer's width where another's is written."""
    value = small_call(op)[name]
    refuse(
        op,
        wrong(op, name, value.to(torch.int16 if value.is_floating_point() else torch.float32)),
        TypeError,
        r"^\w+ has dtype torch\.\w+; legal: torch\.\w+",
    )


ANY_DTYPE = {("embedding", "weight"), ("matmul_w8a8", "out")}  # the tensor that sets the dtype of the others


def names_of_one_dtype() -> list[tuple[str, str]]:
    """What has to be of the first tensor's dtype, or of fp32 where that is a vector of parameters."""
    first = {op: next(iter(small_call(op))) for op in OPS}
    return [
        (op, name)
        for op, name in TENSORS
        if small_call(op)[name].is_floating_point() and name != first[op] and (op, name) not in ANY_DTYPE
    ]


@pytest.mark.parametrize(("op", "name"), names_of_one_dtype())
def test_a_mixture_of_dtypes(op: str, name: str) -> None:
    """Each float tensor alone in fp16, where all others are fp32."""
    message = rf"^{name} has dtype torch\.float16; legal: (torch\.float32|.*, torch\.float32)$"
    refuse(op, wrong(op, name, small_call(op)[name].half()), TypeError, message)


@pytest.mark.parametrize(("op", "name"), [case for case in TENSORS if case[1] not in ANY_STRIDES])
def test_stride(op: str, name: str) -> None:
    """Every second element: the last dimension of every other tensor is contiguous."""
    value = small_call(op)[name]
    spread = torch.stack((value, value), -1).flatten(-2)[..., ::2]
    message = rf"^{name} has strides \[.*2\]; legal: a contiguous last dimension"
    refuse(op, wrong(op, name, spread), ValueError, message)


@every_tensor
def test_device(op: str, name: str) -> None:
    """One tensor on another device: the message names it and the first tensor."""
    given = small_call(op)
    first, *others = (key for key, value in given.items() if isinstance(value, Tensor))
    seen, told = (others[0], "cpu, {} on meta") if name == first else (name, "meta, {} on cpu")
    message = rf"^{seen} is on {told.format(first)}; legal: one device for all"
    refuse(op, given | {name: given[name].to("meta")}, ValueError, message)


@pytest.mark.parametrize(
    ("op", "name", "shape", "message"),
    [
        ("rope", "cos_sin", (16, 7), "cos_sin has shape [16, 7]; legal: [max_position, R] with R even and at most 8"),
        ("rope", "cos_sin", (16, 10), "cos_sin has shape [16, 10]; legal: [max_position, R] with R even and at most 8"),
        ("rope_and_write_kv", "qkv", (T, 2 * HKV * D), "legal: [T, (Hq + 2 * 2) * 8] with Hq >= 1"),
        ("rope_and_write_kv", "qkv", (T, 60), "qkv has shape [3, 60]; legal: [T, (Hq + 2 * 2) * 8]"),
        ("rope_and_write_kv", "k_pages", (0, HKV, SMALL_PAGE, D), "[P, Hkv, page_size, D], each at least 1"),
        ("rope_and_write_kv", "k_pages", (5, HKV, 0, D), "[P, Hkv, page_size, D], each at least 1"),
        ("attention_decode", "k_pages", (5, HKV, 0, D), "all but the first at least 1"),
        ("attention_decode", "k_pages", (5, 0, SMALL_PAGE, D), "all but the first at least 1"),
        ("attention_prefill", "k_pages", (5, 4, SMALL_PAGE, D), "Hkv a divisor of q's 6 heads"),
        ("attention_varlen", "k", (T, 4, D), "Hkv a divisor of q's 6 heads"),
        ("attention_varlen", "cu_seqlens_q", (0,), "cu_seqlens_q has shape [0]; legal: [B + 1]"),
        ("attention_decode", "q", (4, 6, D), "[B * Q, Hq, D] for the 3 sequences in seq_lens"),
        ("silu_mul", "gate_up", (), "gate_up has shape []; legal: [..., 2I], an even last dimension"),
        ("silu_mul_int8", "gate_up", (T, 7), "gate_up has shape [3, 7]; legal: [..., 2I], an even last dimension"),
        ("adjust_logits", "logits", (T, 0), "logits has shape [3, 0]; legal: [R, V] with V >= 1"),
        ("sample", "logits", (T, 0), "logits has shape [3, 0]; legal: [B, V] with V >= 1"),
    ],
)
def test_sizes_that_mean_nothing(op: str, name: str, shape: tuple[int, ...], message: str) -> None:
    value = torch.zeros(shape, dtype=small_call(op)[name].dtype)
    given = wrong(op, name, value)
    if name == "k_pages":
        given["v_pages"] = value.clone()
    refuse(op, given, ValueError, re.escape(message))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("rms_norm", "x"),
        ("add_rms_norm", "residual"),
        ("add_rms_norm", "residual_out"),
        ("silu_mul", "gate_up"),
        ("silu_mul", "up"),
        ("silu_mul", "out"),
        ("matmul", "x"),
        ("matmul", "out"),
        ("matmul_int4", "x"),
        ("matmul_int4", "out"),
        ("matmul_int8", "x"),
        ("matmul_int8", "out"),
        ("matmul_w8a8", "x"),
        ("matmul_w8a8", "out"),
    ],
)
def test_rows_at_two_strides(op: str, name: str) -> None:
    """Kernels over rows refuse what they could read only as a copy; the reference takes it."""
    given = {
        key: value.expand(2, *value.shape).clone() if isinstance(value, Tensor) and value.shape[0] == T else value
        for key, value in small_call(op).items()
    }
    expected = getattr(kernels, op)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()})
    given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    for backend in on_cpu(op):
        if backend == "reference":
            found = public(op, backend)(**given)
            results = found if isinstance(found, tuple) else (found,)
            for ours, theirs in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))
        else:
            with pytest.raises(ValueError, match=rf"^{name} has strides \[.*\]; legal: all rows at one stride"):
                public(op, backend)(**given)


def test_the_frequencies_of_the_cache_are_a_vector() -> None:
    with pytest.raises(ValueError, match=r"^inv_freq has shape \[2, 2\]; legal: \[R/2\]$"):
        kernels.cos_sin_cache(torch.ones(2, 2), 4)
