"""The subjects of the behaviour tests: our functions, and on a GPU flash-attn itself, which they replace."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flash_attn


@dataclass(frozen=True)
class Library:
    """functions: a module with flash-attn's names. page_size: one that it takes."""

    functions: ModuleType
    device: str
    dtype: torch.dtype
    page_size: int

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.device, self.dtype)

    def ints(self, *numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)


def _make(name: str) -> Library:
    if name == "cpu":
        return Library(flash_attn, "cpu", torch.float32, 8)
    if name == "gpu":
        return Library(flash_attn, "cuda", torch.bfloat16, 8)
    pytest.importorskip("flash_attn.bert_padding")
    return Library(pytest.importorskip("flash_attn"), "cuda", torch.bfloat16, 256)


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu", "flash_attn"))])
def library(request: pytest.FixtureRequest) -> Library:
    """Ours on the CPU; ours and flash-attn's on a GPU."""
    torch.manual_seed(0)
    return _make(request.param)
