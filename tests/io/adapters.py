"""Small LoRA adapters, trained by no one: random tensors, saved by peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.io.checkpoints import random_llama

peft = pytest.importorskip("peft")
Q = "base_model.model.model.layers.0.self_attn.q_proj"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(
    model: transformers.LlamaForCausalLM, path: Path, *, save_embedding_layers: bool = False, **settings: Any
) -> Path:
    """An adapter of the model whose trained tensors are all random, as save_pretrained writes it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return path


def merged(base: Path, adapter: Path, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def base_in(path: Path, **settings: Any) -> Path:
    random_llama(**settings).save_pretrained(path)
    return path


def edit_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def edit_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
