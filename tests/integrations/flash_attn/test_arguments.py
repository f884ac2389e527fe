"""Wrong arguments of flash-attn's functions raise an error by flash-attn's name for them, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllama.integrations import flash_attn
from fastllama.integrations.flash_attn import bert_padding
from tests.integrations.flash_attn.test_refusals import FUNCTIONS, refused, varlen

TENSORS = {
    "flash_attn_func": ("q", "k", "v", "out"),
    "flash_attn_varlen_func": (
        *("q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "block_table", "page_table", "seqused_q", "seqused_k"),
    ),
    "flash_attn_with_kvcache": (
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "out"),
        *("block_table", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens"),
    ),
}
names = pytest.mark.parametrize("name", FUNCTIONS)


def paged() -> dict[str, Any]:
    pages = {"k": torch.randn(3, 4, 2, 16), "v": torch.randn(3, 4, 2, 16), "block_table": torch.tensor([[0], [2]])}
    return {**varlen(), **pages}


@names
def test_what_is_no_tensor_is_named(name: str) -> None:
    for argument in TENSORS[name]:
        for given in ([[1.0]], np.ones(2)):
            match = rf"^{argument} is .* of type {type(given).__name__}; legal: a tensor"
            refused(name, {argument: given}, TypeError, match)
    refused(name, {"q": None}, TypeError, "^q is None of type NoneType; legal: a tensor$")
    with pytest.raises(TypeError, match=r"^q has layout torch\.sparse_coo; legal: torch\.strided$"):
        getattr(flash_attn, name)(**FUNCTIONS[name]() | {"q": torch.ones(2, 3, 4, 16).to_sparse()})


@names
@pytest.mark.parametrize("value", [None, "no", 2, torch.tensor(True), torch.tensor([True, False])], ids=repr)
def test_causal_is_a_bool(name: str, value: object) -> None:
    refused(name, {"causal": value}, TypeError, "^causal is .*; legal: True or False$")


def results(name: str, argument: str, values: tuple[Any, ...]) -> list[Tensor]:
    """Results of one call for each value of an argument."""
    given = FUNCTIONS[name]()
    copies = [{key: x.clone() for key, x in given.items()} for _ in values]
    return [getattr(flash_attn, name)(**copy, **{argument: value}) for copy, value in zip(copies, values, strict=True)]


@names
@pytest.mark.parametrize("causal", [True, False])
def test_numpys_bools_and_0_and_1_are_flags(name: str, causal: bool) -> None:
    expected, *found = results(name, "causal", (causal, np.bool_(causal), int(causal)))
    assert all(torch.equal(each, expected) for each in found)


@names
def test_a_flag_of_what_is_returned_is_no_tensor(name: str) -> None:
    for argument in ("return_softmax_lse", "return_lse"):
        refused(name, {argument: torch.tensor([True, False])}, TypeError, f"^{argument} is .*; legal: True or False$")
        assert isinstance(getattr(flash_attn, name)(**FUNCTIONS[name]() | {argument: None}), Tensor)


@names
def test_a_scale_is_a_number_that_a_float_holds(name: str) -> None:
    expected, *found = results(name, "softmax_scale", (0.25, Fraction(1, 4), np.float32(0.25)))
    assert all(torch.equal(each, expected) for each in found)
    refused(name, {"softmax_scale": 10**400}, ValueError, "^softmax_scale is an integer of 401 digits; legal: a number")
    refused(name, {"softmax_scale": "x"}, TypeError, "^softmax_scale is 'x'; legal: a number or None$")


@names
def test_a_window_is_a_pair(name: str) -> None:
    refused(name, {"window_size": -1}, TypeError, r"^window_size is -1; legal: a pair, \(-1, -1\)$")


@names
def test_heads_of_nothing_are_refused(name: str) -> None:
    shape = FUNCTIONS[name]()["q"].shape
    for head in ((0, 16), (4, 0)):
        refused(name, {"q": torch.ones(*shape[:-2], *head)}, ValueError, "^q has shape .*; legal: at least one head of")


def test_a_rotations_flag_is_a_bool() -> None:
    match = "^rotary_interleaved is None of type NoneType; legal: True or False$"
    refused("flash_attn_with_kvcache", {"rotary_interleaved": None}, TypeError, match)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_cache_is_refused_by_its_name(dtype: torch.dtype) -> None:
    cache = torch.zeros(3, 8, 2, 16).to(dtype)
    match = f"^k_cache has dtype {dtype}; legal: torch.float32$"
    refused("flash_attn_with_kvcache", {"k_cache": cache, "v_cache": cache.clone()}, TypeError, match)
    refused("flash_attn_varlen_func", {**paged(), "k": cache, "v": cache}, TypeError, match.replace("k_cache", "k"))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"v": torch.ones(3, 4, 2, 16).half()}, TypeError, "^v has dtype torch.float16; legal: torch.float32$"),
        ({"k": torch.ones(3, 4, 2, 32)[..., ::2]}, ValueError, "^k has strides .*; legal: a contiguous last"),
        ({"k": torch.ones(3, 0, 2, 16)}, ValueError, "^k has shape .*; legal: each dimension at least 1"),
        ({"block_table": torch.ones(2, 1)}, TypeError, "^block_table has dtype torch.float32; legal: torch.int32"),
        ({"block_table": torch.ones(2, 1, device="meta").int()}, ValueError, "^block_table is on meta, q on cpu"),
        ({"seqused_k": torch.ones(2)}, TypeError, "^seqused_k has dtype torch.float32; legal: torch.int32"),
        ({"seqused_q": torch.ones(2, device="meta").int()}, ValueError, "^seqused_q is on meta, q on cpu"),
        ({"cu_seqlens_k": torch.ones(3)}, TypeError, "^cu_seqlens_k has dtype torch.float32; legal: torch.int32"),
    ],
)
def test_wrong_pages_are_refused_in_flash_attns_names(
    given: dict[str, Any], error: type[Exception], match: str
) -> None:
    refused("flash_attn_varlen_func", {**paged(), **given}, error, match)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (-1, ValueError, "^cache_seqlens is -1; legal: 0 to 2147483647$"),
        (2**40, ValueError, "^cache_seqlens is 1099511627776; legal: 0 to 2147483647$"),
        (1.0, TypeError, r"^cache_seqlens is 1.0; legal: an int, a tensor \[B\] or None$"),
        ([1, 2], TypeError, r"^cache_seqlens is \[1, 2\]; legal: an int"),
    ],
)
def test_one_length_for_all_is_a_whole_number(value: object, error: type[Exception], match: str) -> None:
    refused("flash_attn_with_kvcache", {"cache_seqlens": value}, error, match)


def with_room(len_q: int) -> dict[str, Any]:
    """A call whose cache has room for its result, and whose query tensor is longer than its rows."""
    given = {name: torch.randn(3, 64, 4, 16) for name in ("k_cache", "v_cache")}
    given |= {name: torch.randn(2, 3, 4, 16) for name in ("k", "v")}
    return {**given, "q": torch.randn(3, len_q, 4, 16)[:2], "cache_seqlens": torch.tensor([3, 1])}


OUTS: dict[str, tuple[Callable[[dict[str, Any]], Tensor], str]] = {
    "in k_cache": (lambda given: given["k_cache"].view(-1)[: given["q"].numel()], "out shares memory with k_cache"),
    "in v_cache": (lambda given: given["v_cache"].view(-1)[-given["q"].numel() :], "out shares memory with v_cache"),
    "q, shifted": (lambda given: given["q"]._base[1:], "out shares memory with q"),
    "one head": (lambda given: given["q"][:, :, :1].clone().expand(-1, -1, 4, -1), "out has shape .* share memory"),
}


@pytest.mark.parametrize("len_q", [1, 3, 40], ids=["one", "few", "many"])
@pytest.mark.parametrize("where", OUTS)
def test_a_result_in_memory_of_others_is_refused_before_new_keys_are_written(where: str, len_q: int) -> None:
    given = with_room(len_q)
    make, match = OUTS[where]
    out = make(given)
    given["out"] = out if out.dim() == 4 else out.view(given["q"].shape)
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=f"^{match}.*; legal: memory of its own"):
        flash_attn.flash_attn_with_kvcache(**given)
    for name, held in before.items():
        assert torch.equal(given[name], held), f"{name} was written"


def test_a_cache_whose_tokens_share_memory_is_refused_by_its_name() -> None:
    given = {"k_cache": torch.randn(1, 8, 2, 16).expand(3, 8, 2, 16)}
    refused("flash_attn_with_kvcache", given, ValueError, "^k_cache has shape .* so that elements share memory")
    cache = torch.randn(3, 8, 2, 16)
    given = {"k_cache": cache, "v_cache": cache}
    refused("flash_attn_with_kvcache", given, ValueError, "^k_cache shares memory with v_cache")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: flash_attn.flash_attn_qkvpacked_func([1]), "qkv"),
        (lambda: flash_attn.flash_attn_kvpacked_func(torch.ones(1, 1, 1, 8), None), "kv"),
        (lambda: flash_attn.flash_attn_varlen_qkvpacked_func(np.ones(3), None, 1), "qkv"),
        (lambda: flash_attn.flash_attn_varlen_kvpacked_func(torch.ones(1, 1, 8), [1], None, None, 1, 1), "kv"),
        (lambda: flash_attn.flash_attn_qkvpacked_func(torch.ones(1, 2, 8, 16), num_heads_q="x"), "num_heads_q"),
        (lambda: bert_padding.unpad_input(torch.ones(2, 3, 4), [[1, 1, 1]] * 2), "attention_mask"),
        (lambda: bert_padding.pad_input(torch.ones(3, 4), [0, 1, 2], 2, 3), "indices"),
    ],
)
def test_packed_tensors_and_masks_are_named_too(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(TypeError, match=f"^{argument} is .*; legal: "):
        call()
