"""A decode step of a Llama block on Triton: its launches, and its result against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastllama import LlamaConfig
from fastllama.layers import packing
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.testing.monitor import CheckedRun
from tests.kernels.honest import error

BF16 = torch.bfloat16
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=40,
    max_position_embeddings=64,
)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG, BF16)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 8 if parameter.dim() > 1 else torch.rand_like(parameter))
    return model


def step(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """One new token of each of three sequences, through the block."""
    lengths = torch.tensor([3, 9, 20], dtype=torch.int32)
    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    positions = lengths.long() - 1
    slots = (table.long().gather(1, positions[:, None] // 16).squeeze(1)) * 16 + positions % 16
    rows = torch.arange(3)
    bounds = torch.zeros(1, dtype=torch.int32)
    batch = BatchMeta(positions, slots, table, lengths, 3, bounds, rows, workspace=model.workspace(3))
    kv = KVCache.allocate(CONFIG, 6, 16, model.dtype, "cpu")
    generator = torch.Generator().manual_seed(1)
    for layer in kv.layers:
        for pages in (layer.k_pages, layer.v_pages):
            pages.copy_(torch.randn(pages.shape, generator=generator))
    with torch.inference_mode():
        out: torch.Tensor = model.layers[0](hidden, batch, kv.layers[0], model.cos_sin)
    return out


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["bf16", "int4", "int8"])
def test_a_decode_step_is_six_launches_a_layer(
    model: LlamaForCausalLM, kind: str, checked: CheckedRun, force: Callable[[str], None]
) -> None:
    """One more reduces the splits of keys. The residual stream is the reference's, but for rounding."""
    if kind != "bf16":
        packing.quantize(model, kind, progress=False)
    hidden, found = torch.randn(3, 64).to(BF16), {}
    for backend in ("reference", "triton"):
        force(backend)
        found[backend] = step(model, hidden.clone())
    matmul = "matmul_dense_kernel" if kind == "bf16" else "matmul_quantized_kernel"
    launches = [matmul, "rope_and_write_kv_kernel", "attention_decode_kernel", *3 * [matmul]]
    assert [launch.kernel for launch in checked.launches] == launches
    assert error(found["triton"], found["reference"].double()) < 4 * torch.finfo(BF16).eps
