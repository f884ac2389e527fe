"""Adds outlier channels, as in large language models, to a small model without changing its function."""

from __future__ import annotations

import math

import torch

from fastllama.errors import brief, check_range
from fastllama.layers.block import LlamaBlock
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantizing import check_dense
from fastllama.layers.rescaling import DOWN, GATE_UP, QKV, rescale
from fastllama.runtime.values import integer

DTYPES = (torch.float32, torch.bfloat16)  # in float16, columns divided by 32 become subnormal and lose bits
LARGEST = 2**16  # factor, so that nothing overflows


@torch.inference_mode()
def plant_outliers(model: LlamaForCausalLM, *, channels: int = 4, factor: float = 32.0, seed: int = 0) -> None:
    """Scale up a few input channels of each block's linear layers, and scale down the weights' columns, in place.

    channels: number per norm, and of up, in every block, chosen by seed. factor: a power of two from 2 to 65536, so
    that nothing is rounded: the logits stay bit-identical.

    Layers then get a few input channels 32 times as large as the others, as in models of billions of parameters
    (Dettmers et al., LLM.int8(), arXiv:2208.07339), so that AWQ and SmoothQuant, which address them, can be measured on
    a small model. A model of `from_transformers` shares its memory: use a copy.
    Raises ValueError for channels, factor, the dtype, and packed layers.
    """
    channels = integer("channels", channels, 1, min(model.config.hidden_size, model.config.intermediate_size))
    check_range("factor", factor, 2, LARGEST)
    _check(model, factor)
    generator = torch.Generator("cpu").manual_seed(seed)
    for block in model.layers:
        assert isinstance(block, LlamaBlock)
        for name in (QKV, GATE_UP, DOWN):
            scales = torch.ones(block.get_parameter(f"{name}.weight").shape[1], dtype=torch.float32, device="cpu")
            scales[torch.randperm(len(scales), generator=generator, dtype=torch.int64, device="cpu")[:channels]] = (
                1 / factor
            )
            rescale(block, model.config, name, scales.to(model.device), model.dtype)


def _check(model: LlamaForCausalLM, factor: float) -> None:
    if math.frexp(factor)[0] != 0.5:
        raise ValueError(f"factor is {brief(factor)}; legal: a power of two, 2 to {LARGEST}")
    if model.dtype not in DTYPES:
        raise ValueError(f"model is in {model.dtype}; legal: {' or '.join(map(str, DTYPES))}")
    check_dense(model)
