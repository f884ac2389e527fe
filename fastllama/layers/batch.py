"""The arguments of a forward pass: the batch, and the paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.arithmetic import power_of_2
from fastllama.kernels.dispatch.checks import CODES
from fastllama.layers.config import LlamaConfig


@dataclass(frozen=True)
class BatchMeta:
    """A ragged batch of the tokens of several sequences, without padding; decodes first, then prefills.

    positions: [T] int64, of each token in its sequence. slots: [T] int64, page * page_size + offset of its key.
    page_table: [B, max_pages] int32. seq_lens: [B] int32, tokens of each sequence including the new ones.
    num_decodes: how many of the B sequences decode, each with num_queries new tokens: one and its draft tokens.
    cu_seqlens_q: [B - num_decodes + 1] int32, bounds of the prefills' tokens, counted from the first of them.
    logits_rows: [R] int64, the tokens whose logits are computed, ascending and distinct.
    workspace: from LlamaForCausalLM.workspace, or None. cos_sin: from LlamaForCausalLM.rotary_cache; None uses the
    model's own. deterministic: whether all but attention is batch-invariant, bit for bit; attention is
    batch-invariant if all sequences decode.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    seq_lens: Tensor
    num_decodes: int
    cu_seqlens_q: Tensor
    logits_rows: Tensor
    num_queries: int = 1
    workspace: Tensor | None = None
    cos_sin: Tensor | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of one layer, each [num_pages, num_kv_heads, page_size, head_dim].

    8-bit pages have k_scales and v_scales [num_pages, num_kv_heads, page_size] fp32; otherwise these are None.
    """

    k_pages: Tensor
    v_pages: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are not None."""
        for tensor in (self.k_pages, self.v_pages, self.k_scales, self.v_scales):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True)
class KVCache:
    """The paged keys and values of all layers."""

    layers: tuple[LayerKV, ...]

    @classmethod
    def allocate(
        cls,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        pinned: bool = False,
    ) -> KVCache:
        """Uninitialised pages: a slot is read only after it was written. dtype: floating, or int8 or float8_e4m3fn.

        pinned: in one block of pinned host memory, of `pinned_bytes`, for asynchronous copies from and to a GPU.
        """
        shape = (num_pages, config.num_key_value_heads, page_size)
        kinds = [(dtype, (*shape, config.head_dim))] * 2 + [(torch.float32, shape)] * (2 if dtype in CODES else 0)
        wanted = kinds * config.num_hidden_layers
        if pinned:
            sizes = [math.prod(size) * of.itemsize for of, size in wanted]  # multiples of 16, as page_size is
            block = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=True)
            made = [part.view(of).view(size) for part, (of, size) in zip(block.split(sizes), wanted, strict=True)]
        else:
            made = [torch.empty(size, dtype=of, device=device) for of, size in wanted]
        return cls(tuple(LayerKV(*made[i : i + len(kinds)]) for i in range(0, len(made), len(kinds))))

    @staticmethod
    def pinned_bytes(config: LlamaConfig, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of pinned memory for pages of num_tokens tokens: torch rounds a block up to a power of two."""
        return power_of_2(num_tokens * KVCache.bytes_per_token(config, dtype))

    @staticmethod
    def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take in all layers, in pages of a dtype."""
        scale = torch.float32.itemsize if dtype in CODES else 0
        of_head = config.head_dim * dtype.itemsize + scale
        return 2 * config.num_hidden_layers * config.num_key_value_heads * of_head

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in every layer; no page is both."""
        sources, destinations = (list(ids) for ids in zip(*copies, strict=True))
        for layer in self.layers:
            for tensor in layer.tensors():
                held = tensor.view(torch.int8) if tensor.itemsize == 1 else tensor  # torch cannot index float8
                held[destinations] = held[sources]
