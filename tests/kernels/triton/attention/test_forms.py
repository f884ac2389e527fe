"""Attention kernels in forms that Llama 2 does not use, compiled ahead of time: none spills, all fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama.catalogue import attention
from fastllama.catalogue.arguments import in_order, positional
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.kernels.dispatch.op import OPS
from fastllama.testing.compile_report import CACHE, compile_report
from tests.kernels.triton.launches import BF16, LARGE, META, PAGES, on

KEPT = Path(__file__).parents[4] / CACHE
M = Maker(BF16, META)
LENGTHS = [128] * 64
CALLS: dict[str, Callable[[], Arguments]] = {
    "attention_varlen": lambda: attention.attention_varlen(M, LENGTHS, LENGTHS, *LARGE.attention, causal=False),
    "attention_prefill": lambda: attention.attention_prefill(
        M, LENGTHS, LENGTHS, *LARGE.attention, causal=False, pages=PAGES, pages_dtype=torch.float8_e4m3fn
    ),
    "attention_decode": lambda: attention.attention_decode(
        M, LENGTHS, *LARGE.attention, queries=4, causal=False, width=64, pages=PAGES, pages_dtype=torch.int8
    ),
}


@pytest.mark.compile
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("op", CALLS)
def test_without_a_mask_with_64_bit_indices_and_one_scale_of_all_quantized_pages(op: str, target: str) -> None:
    """And with log-sum-exps as flash-attn has them, [Hq, T]."""
    call = CALLS[op]()
    call |= {name: value.long() for name, value in call.items() if getattr(value, "dtype", None) == torch.int32}
    if "k_pages" in call:
        call |= {"k_scales": None, "v_scales": None, "k_scale": 0.5, "v_scale": 0.25}
    rows, heads, _ = call["q"].shape
    call["lse_out"] = torch.empty(heads, rows, device=META).t()

    def launch() -> None:
        OPS[op].launcher("cuda")(*positional(op, in_order(op, call)))

    with on(target):
        reports = compile_report(launch, [target], KEPT)
    assert [each for report in reports for each in report.problems()] == []
