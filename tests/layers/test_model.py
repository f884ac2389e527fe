"""Logits against transformers' LlamaForCausalLM, through pages and in every mixture of prefill, chunks and decodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.layers.loading import load_weights
from fastllama.layers.model import LlamaForCausalLM
from tests.io.checkpoints import hf_state, random_llama
from tests.kernels.honest import assert_equal, assert_honest, error

torch.set_num_threads(1)  # these models are too small for two, and the tests may run in several processes

# 16 query heads
SHAPES: dict[str, dict[str, Any]] = {
    "MHA": {"kv_heads": 16},
    "GQA": {"kv_heads": 4},
    "MQA": {"kv_heads": 1},
    "tied": {"kv_heads": 4, "tied": True},
    "biases": {"kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"kv_heads": 8, "head_dim": 12},
}
# For each step, how many new tokens each sequence gets: single tokens at a start and in a middle, whole prompts, chunks
# of prompts before and after others, in one batch and alone.
STEPS: Sequence[Mapping[int, int]] = (
    {0: 1, 3: 1},
    {0: 1, 2: 9, 3: 12},
    {0: 1, 3: 1, 1: 7, 2: 7, 4: 5},
    {4: 6},
    {0: 1, 1: 1, 2: 1, 4: 1, 3: 16},
    {2: 1, 0: 1},
)
LENGTHS = {seq: sum(step.get(seq, 0) for step in STEPS) for seq in range(5)}
Forward = Callable[[Tensor, BatchMeta, KVCache], Tensor]


@functools.cache
def theirs(shape: str) -> transformers.LlamaForCausalLM:
    return random_llama(**SHAPES[shape])


def ours(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_hf(theirs(shape).config.to_dict()), dtype)
    load_weights(model, hf_state(theirs(shape)).items())
    return model


@functools.cache
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator) for length in LENGTHS.values()]


def transformers_logits(model: transformers.LlamaForCausalLM) -> list[Tensor]:
    """[L, V] of each prompt by itself."""
    with torch.inference_mode():
        return [model(prompt[None]).logits[0] for prompt in prompts()]


def batch_of(
    step: Mapping[int, int], done: Mapping[int, int], pages: Sequence[Sequence[int]], page_size: int
) -> BatchMeta:
    """The batch of a step over sequences of which `done` tokens are cached; logits of every token."""
    order = sorted(step, key=lambda seq: step[seq] > 1)  # single tokens first, otherwise as given
    chunks = [range(done[seq], done[seq] + step[seq]) for seq in order]
    slots = [
        pages[seq][position // page_size] * page_size + position % page_size
        for seq, chunk in zip(order, chunks, strict=True)
        for position in chunk
    ]
    tokens = sum(map(len, chunks))
    width = max(map(len, pages))
    longer = [len(chunk) for chunk in chunks if len(chunk) > 1]
    return BatchMeta(
        positions=torch.tensor([position for chunk in chunks for position in chunk]),
        slots=torch.tensor(slots),
        page_table=torch.tensor([[*pages[seq], *[0] * (width - len(pages[seq]))] for seq in order], dtype=torch.int32),
        seq_lens=torch.tensor([chunk.stop for chunk in chunks], dtype=torch.int32),
        num_decodes=len(chunks) - len(longer),
        cu_seqlens_q=torch.tensor([0, *longer]).cumsum(0).int(),
        logits_rows=torch.arange(tokens),
    )


def paged_logits(
    forward: Forward,
    config: LlamaConfig,
    dtype: torch.dtype,
    page_size: int,
    only_last: bool = False,
    steps: Sequence[Mapping[int, int]] = STEPS,
) -> list[Tensor]:
    """[L, V] of each prompt, step by step through one cache of shuffled pages that starts as NaN.

    only_last: of every chunk the last token alone.
    """
    counts = [-(-length // page_size) for length in LENGTHS.values()]
    shuffled = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(2)).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    kv = KVCache.allocate(config, sum(counts) + 1, page_size, dtype, "cpu")
    assert kv.layers[0].k_pages.isnan().all()
    logits: dict[int, list[Tensor]] = {seq: [] for seq in LENGTHS}
    done = dict.fromkeys(LENGTHS, 0)
    for step in steps:
        batch = batch_of(step, done, pages, page_size)
        order = sorted(step, key=lambda seq: step[seq] > 1)
        ids = torch.cat([prompts()[seq][done[seq] : done[seq] + step[seq]] for seq in order])
        if only_last:
            rows = torch.tensor([step[seq] for seq in order]).cumsum(0) - 1
            batch = BatchMeta(**{**vars(batch), "logits_rows": rows})
        with torch.inference_mode():
            found = forward(ids, batch, kv)
        sizes = [1 if only_last else step[seq] for seq in order]
        for seq, part in zip(order, found.split(sizes), strict=True):
            logits[seq].append(part)
            done[seq] += step[seq]
    return [torch.cat(parts) for parts in logits.values()]


@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: str, dtype: torch.dtype, page_size: int) -> None:
    """Against transformers in fp64 with the same rounded weights; bounded by transformers' error in the same dtype."""
    plain = copy.deepcopy(theirs(shape)).to(dtype)
    exact = transformers_logits(copy.deepcopy(plain).double())
    model = ours(shape, dtype)
    found = paged_logits(model, model.config, dtype, page_size)
    assert_honest(torch.cat(found), torch.cat(transformers_logits(plain)), torch.cat(exact))
    if dtype == torch.float32:
        assert error(torch.cat(found), torch.cat(exact)) <= 1e-4


def test_logits_of_wanted_rows_only() -> None:
    """The last token of each chunk gives the logits that it gives among all rows."""
    model = ours("GQA", torch.float32)
    everything = paged_logits(model, model.config, torch.float32, 5)
    last = paged_logits(model, model.config, torch.float32, 5, only_last=True)
    for seq, found in enumerate(last):
        ends = torch.tensor([step[seq] for step in STEPS if seq in step]).cumsum(0) - 1
        torch.testing.assert_close(found, everything[seq][ends], rtol=1e-5, atol=1e-5)


def test_the_whole_model_compiles_without_a_graph_break() -> None:
    """Bit for bit as in eager: a step of decodes, one of a decode and prefills, and one of both and a chunk."""
    torch.compiler.reset()
    model = ours("GQA", torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, graphs = (paged_logits(run, model.config, torch.float32, 5, True, STEPS[:3]) for run in (model, compiled))
    for found, expected in zip(graphs, eager, strict=True):
        assert_equal(found, expected)


def test_tied_embeddings_are_one_tensor() -> None:
    model = ours("tied", torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_pages_can_be_copied_and_counted(dtype: torch.dtype) -> None:
    config = ours("GQA", torch.float32).config
    kv = KVCache.allocate(config, 4, 5, dtype, "cpu")
    for i, layer in enumerate(kv.layers):
        assert layer.k_pages.shape == layer.v_pages.shape == (4, 4, 5, 4)
        assert (layer.k_pages.dtype, layer.v_pages.dtype) == (dtype, dtype)
        assert [tensor.shape for tensor in layer.tensors()][2:] == ([(4, 4, 5)] * 2 if dtype.itemsize == 1 else [])
        for tensor in layer.tensors():
            tensor.copy_((torch.arange(4.0) + 10 * i).view(4, *[1] * (tensor.dim() - 1)))
    kv.copy_pages([(0, 3), (2, 1)])
    for i, layer in enumerate(kv.layers):
        for tensor in layer.tensors():
            assert (tensor.flatten(1)[:, 0].float() - 10 * i).tolist() == [0, 2, 2, 0]
    held = sum(tensor.nbytes for layer in kv.layers for tensor in layer.tensors())
    assert KVCache.bytes_per_token(config, dtype) * 4 * 5 == held
