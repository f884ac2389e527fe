"""The arguments that peers' attention gets, from libraries that this machine cannot run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.attention_libraries import xformers_decode
from fastllama.bench.ops.judge import judged
from fastllama.catalogue.llama_calls import LlamaCall, toy_calls
from fastllama.catalogue.maker import Arguments

CPU = torch.device("cpu")


def toy(op: str, pages_dtype: torch.dtype | None = None) -> LlamaCall:
    return next(case for case in toy_calls(torch.float32, (op,)) if case.pages_dtype == pages_dtype)


class XFormers:
    """The part of xformers.ops.fmha that the peer calls, with the shapes of its attn_bias.py and triton_splitk.py.

    The library itself needs a GPU. That its kernel takes the call is the judge's to show, there.
    """

    def __init__(self) -> None:
        self.plans = 0
        mask = SimpleNamespace(from_seqlens=self.from_seqlens)
        self.attn_bias = SimpleNamespace(PagedBlockDiagonalPaddedKeysMask=mask)
        self.triton_splitk = SimpleNamespace(FwOp="split-K")

    def from_seqlens(
        self, q_seqlen: list[int], kv_seqlen: list[int], block_tables: Tensor, page_size: int, *, device: torch.device
    ) -> Any:
        self.plans += 1
        assert len(q_seqlen) == len(kv_seqlen) == len(block_tables)
        assert set(q_seqlen) == {1}
        assert block_tables.dtype == torch.int32
        assert block_tables.device == device
        return SimpleNamespace(lengths=kv_seqlen, tables=block_tables, page_size=page_size)

    def memory_efficient_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Any, op: str
    ) -> Tensor:
        """Queries [1, sequences, heads, D] over keys and values [1, tokens of all pages, heads, D]."""
        assert op == "split-K"
        assert key.stride(2) == value.stride(2) == 0  # how it knows that heads share their keys
        assert key.shape[1] % bias.page_size == 0
        out = torch.empty_like(query)
        for row, (length, table) in enumerate(zip(bias.lengths, bias.tables, strict=True)):
            tokens = (table[:, None] * bias.page_size + torch.arange(bias.page_size)).flatten()[:length]
            q, k, v = query[0, row, :, None], key[0, tokens].transpose(0, 1), value[0, tokens].transpose(0, 1)
            out[0, row] = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return out


def test_xformers_is_given_the_pages_as_it_reads_them() -> None:
    module = XFormers()
    case = toy("attention_decode")
    error, bound = judged(case, xformers_decode(module), CPU)
    assert error <= bound


def test_xformers_is_planned_once_for_a_page_table() -> None:
    module = XFormers()
    run = xformers_decode(module)
    sets: list[Arguments] = [toy("attention_decode").make(CPU, seed) for seed in (1, 2)]
    for inputs in sets * 2:
        run(inputs)
    assert module.plans == 2


def test_xformers_refuses_quantized_pages() -> None:
    case = toy("attention_decode", torch.int8)
    with pytest.raises(NotImplementedError, match="int8 pages"):
        xformers_decode(XFormers())(case.make(CPU, seed=0))
