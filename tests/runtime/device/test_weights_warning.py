"""The warning before weights load, for checkpoints that are quantized already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama.io.load import meta_model
from fastllama.layers import packing
from fastllama.layers.config import PRESETS
from fastllama.runtime.device import memory


@pytest.mark.parametrize("quantization", ["auto", None, "int4"])
def test_a_quantized_checkpoint_is_estimated_as_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quantization: str | None
) -> None:
    """Also on a CPU where "auto" packs bf16 weights into bf12: a 7B takes 4 GB in int4, and 10 GB in bf12."""
    monkeypatch.setattr(packing, "pays", lambda model, device=None: True)
    checkpoint: Any = SimpleNamespace(config=PRESETS["llama-2-7b"], quantization="int4")
    cpu = torch.device("cpu")
    model, kind = meta_model(checkpoint, torch.bfloat16, device=cpu, quantization=quantization)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 5 * 10**9)
    memory.warn_of_weights(model.config, model.dtype, kind, cpu, kept=checkpoint.quantization)
    assert not caplog.records
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * 10**9)
    memory.warn_of_weights(model.config, model.dtype, kind, cpu, kept=checkpoint.quantization)
    (warning,) = caplog.records
    assert warning.getMessage().startswith("the weights in int4 take about 3.95 GB")
