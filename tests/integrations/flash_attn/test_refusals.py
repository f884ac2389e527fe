"""Illegal calls raise an error that names the argument, and write nothing, new keys included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllama.integrations import flash_attn

REFUSED = {
    "dropout_p": 0.1,
    "window_size": (4, 0),
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "attention_chunk": 64,
    "qv": torch.ones(1),
    "q_descale": torch.ones(1),
    "k_descale": torch.ones(1),
    "v_descale": torch.ones(1),
    "learnable_sink": torch.ones(4),
    "s_aux": torch.ones(4),
    "score_mod": abs,
    "mask_mod": abs,
}
NOT_WITH_CACHE = {"dropout_p", "score_mod", "mask_mod"}  # flash-attn's own has none of them


def dense() -> dict[str, Any]:
    return {name: torch.randn(2, 3, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}


def varlen() -> dict[str, Any]:
    tensors = {name: torch.randn(6, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return {**tensors, "cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 2, 6])}


def with_cache() -> dict[str, Any]:
    return {
        **dense(),
        "k_cache": torch.randn(3, 8, 2, 16),
        "v_cache": torch.randn(3, 8, 2, 16),
        "cache_seqlens": torch.tensor([3, 1]),
        "rotary_cos": torch.randn(16, 4),
        "rotary_sin": torch.randn(16, 4),
    }


FUNCTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "flash_attn_func": dense,
    "flash_attn_varlen_func": varlen,
    "flash_attn_with_kvcache": with_cache,
}
ILLEGAL: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flash_attn_func", {"q": torch.randn(6, 4, 16)}, ValueError, r"q has shape \[6, 4, 16\]; legal: \[B, Sq, Hq, D\]"),
    ("flash_attn_func", {"k": torch.randn(2, 3, 3, 16)}, ValueError, "k has shape .*; legal: a number of heads that"),
    ("flash_attn_func", {"k": torch.randn(3, 3, 2, 16)}, ValueError, r"k has shape .*; legal: \[2, Sk, Hkv, D\]"),
    ("flash_attn_func", {"v": torch.randn(2, 4, 2, 16)}, ValueError, r"v has shape .*; legal: \[2, 3, 2, 16\]"),
    ("flash_attn_func", {"v": torch.randn(2, 3, 2, 16).half()}, TypeError, "v has dtype torch.float16"),
    ("flash_attn_func", {"out": torch.empty(2, 3, 4, 8)}, ValueError, r"out has shape .*; legal: \[2, 3, 4, 16\]"),
    ("flash_attn_varlen_func", {"cu_seqlens_q": torch.tensor([])}, ValueError, r"cu_seqlens_q has shape \[0\]"),
    ("flash_attn_varlen_func", {"cu_seqlens_q": torch.tensor([0.0, 2, 6])}, TypeError, "cu_seqlens_q has dtype"),
    ("flash_attn_varlen_func", {"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, r"cu_seqlens_k has shape \[2\]"),
    (
        "flash_attn_varlen_func",
        {"seqused_k": torch.tensor([1])},
        ValueError,
        r"seqused_k has shape \[1\]; legal: \[2\]",
    ),
    ("flash_attn_varlen_func", {"block_table": torch.tensor([[0]])}, ValueError, "k has shape .*; legal: .*page_size"),
    (
        "flash_attn_varlen_func",
        {"block_table": torch.tensor([[0]]), "page_table": torch.tensor([[0]])},
        ValueError,
        "block_table and page_table are both given",
    ),
    (
        "flash_attn_varlen_func",
        {"k": torch.randn(3, 4, 2, 16), "v": torch.randn(3, 4, 2, 16), "block_table": torch.tensor([[0]])},
        ValueError,
        r"block_table has shape \[1, 1\]; legal: \[2, pages\]",
    ),
    (
        "flash_attn_varlen_func",
        {
            "k": torch.randn(3, 4, 2, 16),
            "v": torch.randn(3, 4, 2, 16),
            "page_table": torch.tensor([[0], [1]]),
            "cu_seqlens_k": None,
        },
        ValueError,
        "seqused_k and cu_seqlens_k are None",
    ),
    *(
        ("flash_attn_with_kvcache", given, error, match)
        for given, error, match in (
            ({"q": torch.randn(2, 4, 16)}, ValueError, r"q has shape \[2, 4, 16\]; legal: \[B, Sq, Hq, D\]"),
            (
                {"q": torch.randn(2, 3, 4, 16).half()},
                TypeError,
                "k_cache has dtype torch.float32; legal: torch.float16",
            ),
            ({"q": torch.ones(2, 3, 4, 16, dtype=torch.int32)}, TypeError, "q has dtype torch.int32"),
            ({"k": torch.randn(2, 3, 4, 16)}, ValueError, r"k has shape .*; legal: \[2, Sn, 2, 16\]"),
            ({"k": torch.randn(2, 3, 2, 16).half()}, TypeError, "k has dtype torch.float16; legal: q's"),
            ({"v": torch.randn(2, 2, 2, 16)}, ValueError, r"v has shape .*; legal: \[2, 3, 2, 16\]"),
            ({"v": None}, ValueError, "k is a tensor, v is None; legal: both"),
            ({"cache_seqlens": None}, ValueError, "cache_seqlens is None; legal where k and v are given"),
            ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens has shape \[1\]; legal: \[2\]"),
            ({"cache_seqlens": torch.tensor([1.0, 2])}, TypeError, "cache_seqlens has dtype torch.float32"),
            ({"cache_batch_idx": torch.tensor([1])}, ValueError, r"cache_batch_idx has shape \[1\]; legal: \[2\]"),
            ({"cache_leftpad": torch.tensor([[1]])}, ValueError, r"cache_leftpad has shape \[1, 1\]; legal: \[2\]"),
            ({"rotary_seqlens": torch.tensor([1])}, ValueError, r"rotary_seqlens has shape \[1\]; legal: \[2\]"),
            ({"k_cache": torch.randn(3, 8, 3, 16)}, ValueError, "k_cache has shape .*; legal: a number of heads that"),
            ({"k_cache": torch.randn(3, 8, 2, 8)}, ValueError, "k_cache has shape .* q's head dimension 16"),
            (
                {"k_cache": torch.randn(3, 0, 2, 16)},
                ValueError,
                "k_cache has shape .*; legal: each dimension at least 1",
            ),
            ({"k_cache": torch.randn(3, 8, 16, 2).mT}, ValueError, "k_cache has strides .*; legal: a contiguous last"),
            ({"v_cache": torch.randn(3, 9, 2, 16)}, ValueError, r"v_cache has shape .*; legal: \[3, 8, 2, 16\]"),
            (
                {"k_cache": torch.randn(1, 8, 2, 16), "v_cache": torch.randn(1, 8, 2, 16)},
                ValueError,
                "k_cache has 1 rows for 2 sequences",
            ),
            ({"block_table": torch.tensor([[1]])}, ValueError, r"block_table has shape \[1, 1\]; legal: \[2, pages\]"),
            ({"page_table": torch.tensor([[1.0], [2.0]])}, TypeError, "block_table has dtype torch.float32"),
            (
                {"block_table": torch.tensor([[1], [0]]), "cache_batch_idx": torch.tensor([0, 1])},
                ValueError,
                "cache_batch_idx is a tensor; legal with block_table: None",
            ),
            ({"rotary_sin": None}, ValueError, "rotary_cos is a tensor, rotary_sin is None; legal: both"),
            ({"rotary_cos": torch.randn(16, 9)}, ValueError, "rotary_cos has shape .* with R up to 16"),
            ({"rotary_sin": torch.randn(15, 4)}, ValueError, r"rotary_sin has shape .*; legal: \[16, 4\]"),
            ({"rotary_cos": torch.randn(16, 4).half()}, TypeError, "rotary_cos has dtype torch.float16"),
            ({"k": None, "v": None}, ValueError, "rotary_cos is a tensor; legal where k and v are None: None"),
            ({"out": torch.empty(2, 3, 4, 8)}, ValueError, r"out has shape .*; legal: \[2, 3, 4, 16\]"),
            ({"out": torch.empty(2, 3, 4, 16).half()}, TypeError, "out has dtype torch.float16"),
            (
                {"out": torch.empty(2, 5, 4, 16)[:, :3]},
                ValueError,
                "out has strides .*; legal: all tokens at one stride",
            ),
            ({"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale is tensor.*; legal: a number or None"),
            ({"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, r"q has shape .*; legal: \[total_q, Hq, D\]"),
            ({"cu_seqlens_k_new": torch.tensor([0, 3])}, ValueError, r"k has shape .*; legal: \[total_new, 2, 16\]"),
            (
                {"k": torch.randn(6, 2, 16), "v": torch.randn(6, 2, 16), "cu_seqlens_k_new": torch.tensor([0, 6])},
                ValueError,
                r"cu_seqlens_k_new has shape \[2\]; legal: \[3\]",
            ),
            ({"v_cache": torch.empty(3, 8, 2, 16, device="meta")}, ValueError, "v_cache is on meta, q on cpu"),
            ({"cache_seqlens": torch.ones(2, device="meta").int()}, ValueError, "cache_seqlens is on meta, q on cpu"),
            (
                {"v_cache": torch.randn(3, 2, 8, 16).transpose(1, 2), "cache_leftpad": torch.tensor([1, 1])},
                ValueError,
                "k_cache has strides .*; legal with cache_leftpad",
            ),
        )
    ),
]


def refused(name: str, given: dict[str, Any], error: type[Exception], match: str) -> None:
    """`error` for a call with these arguments, after which all its tensors hold what they held."""
    arguments = FUNCTIONS[name]() | given
    tensors = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor) and x.device.type != "meta"}
    before = {key: x.clone() for key, x in tensors.items()}
    with pytest.raises(error, match=match):
        getattr(flash_attn, name)(**arguments)
    for key, x in tensors.items():
        assert torch.equal(x.double().nan_to_num(), before[key].double().nan_to_num()), f"{key} was written"


@pytest.mark.parametrize(("name", "given", "error", "match"), ILLEGAL, ids=[f"{n}-{m}" for n, _, _, m in ILLEGAL])
def test_an_illegal_call_names_the_argument_and_writes_nothing(
    name: str, given: dict[str, Any], error: type[Exception], match: str
) -> None:
    refused(name, given, error, match)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_no_op_computes_is_refused_by_name(name: str) -> None:
    for argument, value in REFUSED.items():
        if name != "flash_attn_with_kvcache" or argument not in NOT_WITH_CACHE:
            refused(name, {argument: value}, NotImplementedError, f"{argument} is .*, which {name} does not implement")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_refused_before_anything_is_written(name: str) -> None:
    for argument in set(FUNCTIONS[name]()) & {"q", "k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin"}:
        x = FUNCTIONS[name]()[argument].requires_grad_()
        refused(name, {argument: x}, RuntimeError, f"{argument} requires grad, and {name} has no backward here")
        with torch.no_grad():
            getattr(flash_attn, name)(**FUNCTIONS[name]() | {argument: x})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_calls_that_are_made_illegal_are_legal(name: str) -> None:
    getattr(flash_attn, name)(**FUNCTIONS[name]())
