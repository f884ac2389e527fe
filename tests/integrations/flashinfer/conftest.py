"""FlashInfer's replacement on each device, and FlashInfer itself where it is installed beside a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastllama.integrations import flashinfer


@dataclass(frozen=True)
class Library:
    """The subject of a behaviour test. ours: whether it is the replacement."""

    module: Any
    device: torch.device
    ours: bool


@pytest.fixture(
    params=[
        pytest.param((True, "cpu"), id="ours"),
        pytest.param((True, "cuda"), id="ours on a GPU", marks=pytest.mark.gpu),
        pytest.param((False, "cuda"), id="flashinfer", marks=pytest.mark.gpu),
    ]
)
def library(request: pytest.FixtureRequest, _poison_and_seed: None) -> Library:
    """The same tests hold for both, so one can replace the other."""
    ours, device = request.param
    if device == "cuda":
        torch.use_deterministic_algorithms(False)  # under which torch's own cumsum warns there
    module = flashinfer if ours else pytest.importorskip("flashinfer")
    return Library(module, torch.device(device), ours)
