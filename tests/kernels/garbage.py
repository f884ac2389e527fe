"""Calls with random index tensors, most of whose values are illegal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastllama.catalogue.arguments import inputs
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS

INT32 = torch.iinfo(torch.int32)
WRONG = (-1, INT32.min, INT32.max)
INDICES = {"ids", "positions", "slots", "starts", "ends", "page_table", "seq_lens", "cu_seqlens_q", "cu_seqlens_k"}
INDEXED = [op for op in OPS if INDICES & set(OPS[op].names)]


def garbage_calls(op: str, count: int = 12) -> Iterator[Arguments]:
    """Calls of an op, without outputs, on the CPU, the same each time. Slots are distinct: writes have no order."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        call = inputs(op, small_call(op))
        for name in sorted(INDICES & set(call)):
            value: Tensor = call[name]
            numbers = torch.tensor([0, 1, 2, 3, 5, 8, 14, 15, 35, 1000, *WRONG], dtype=value.dtype)
            drawn = numbers[torch.randint(len(numbers), value.shape, generator=generator)]
            call[name] = torch.where(torch.rand(value.shape, generator=generator) < 0.3, drawn, value)
        if "slots" not in call or len(call["slots"].unique()) == len(call["slots"]):
            yield call
