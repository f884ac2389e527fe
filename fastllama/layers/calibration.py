"""Runs a calibration text through a model, block by block, and collects the inputs of each block's linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.arithmetic import ceil_div
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.block import LlamaBlock
from fastllama.layers.model import LlamaForCausalLM
from fastllama.quant.activations import Activations

BATCH_TOKENS = 2048  # of a batch of whole documents, unless one document is longer
PAGE_SIZE = 64


class Calibration:
    """The residual stream of a text, which `run` passes through one block after another.

    documents: token ids, each with at least one. device: where blocks run, and where the stream is kept, in the model's
    dtype, with the keys and values of one block for one batch.
    """

    def __init__(self, model: LlamaForCausalLM, documents: Sequence[Sequence[int]], device: torch.device) -> None:
        groups = list(_grouped(documents))
        self.num_tokens = sum(map(len, documents))
        self._cos_sin = model.rotary_cache(max(map(len, documents))).to(device)
        self._batches = [_batch(group, device) for group in groups]
        num_pages = max(sum(map(_pages, group)) for group in groups)
        one_layer = replace(model.config, num_hidden_layers=1)
        (self._kv,) = KVCache.allocate(one_layer, num_pages, PAGE_SIZE, model.dtype, device).layers
        self._streams = [_embedded(model, group).to(device) for group in groups]

    @torch.no_grad()
    def run(self, block: LlamaBlock, seen: Mapping[str, Activations]) -> None:
        """Run the model's next block on its device, and add the inputs of the layers that `seen` names to it."""
        with ExitStack() as hooks:
            for name, activations in seen.items():
                hook = block.get_submodule(name).register_forward_pre_hook(partial(_add, activations), with_kwargs=True)
                hooks.callback(hook.remove)
            for stream, batch in zip(self._streams, self._batches, strict=True):
                block(stream, batch, self._kv, self._cos_sin)


def _add(activations: Activations, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    x, norm = args[0], kwargs.get("norm")
    activations.add(x if norm is None else kernels.rms_norm(x, norm.weight, norm.eps))


def _embedded(model: LlamaForCausalLM, documents: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.tensor([each for ids in documents for each in ids], dtype=torch.int64, device=model.device)
    return model.embed_tokens(ids)


def _grouped(documents: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The documents in order, in lists of at most BATCH_TOKENS tokens, or of one document."""
    group: list[Sequence[int]] = []
    for ids in documents:
        if group and sum(map(len, group)) + len(ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    yield group


def _pages(ids: Sequence[int]) -> int:
    return ceil_div(len(ids), PAGE_SIZE)


def _batch(documents: Sequence[Sequence[int]], device: torch.device) -> BatchMeta:
    """Whole documents as prefills of one step, in consecutive pages, without logits."""
    lengths = torch.tensor([len(ids) for ids in documents], dtype=torch.int32, device="cpu")
    counts = [_pages(ids) for ids in documents]
    firsts = [sum(counts[:row]) for row in range(len(counts))]
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cpu")
    for row, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        table[row, :count] = torch.arange(first, first + count, dtype=torch.int32, device="cpu")
    positions = [torch.arange(len(ids), dtype=torch.int64, device="cpu") for ids in documents]
    slots = [first * PAGE_SIZE + own for first, own in zip(firsts, positions, strict=True)]
    bounds = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device="cpu")
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    return BatchMeta(
        positions=torch.cat(positions).to(device),
        slots=torch.cat(slots).to(device),
        page_table=table.to(device),
        seq_lens=lengths.to(device),
        num_decodes=0,
        cu_seqlens_q=bounds.to(device),
        logits_rows=empty.to(device),
    )
