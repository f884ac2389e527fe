"""State shared by the layers of one forward: rotary angles, page table, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastllama import kernels
from fastllama.integrations.transformers.masks import is_key_list, keys_of, width_of


@dataclass(frozen=True)
class PageTable:
    """The one-token pages that each sequence attends to, and the slots of its S new tokens."""

    pages: Tensor  # [B, W] int32
    lengths: Tensor  # [B] int32
    bounds: Tensor  # [B + 1] int32: the rows of each sequence's queries
    slots: Tensor  # [B * S] int32

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, tokens: int, keys: int, row: int, device: torch.device) -> PageTable:
        """mask: a key list, or None for all keys; row: number of pages between sequences."""
        first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * row
        if mask is None:
            slots = torch.arange(width_of(keys), dtype=torch.int32, device=device)
            lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
        else:
            slots, lengths = mask[:, 0, 0, 1:], mask[:, 0, 0, 0].contiguous()
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        new = torch.arange(keys - tokens, keys, dtype=torch.int32, device=device)
        return cls(first + slots, lengths, bounds, (first + new).view(-1))


class Shared:
    """One forward of [B, S] tokens. The first layer makes it, and stores it on the cosines, which all layers get."""

    def __init__(self, cos: Tensor, sin: Tensor, batch: int, tokens: int) -> None:
        self.batch, self.tokens, self.device, self._sin = batch, tokens, cos.device, sin
        half = cos.shape[-1] // 2
        angles = torch.cat((cos[..., :half], sin[..., :half]), -1).float()
        self.angles = angles.expand(batch, tokens, 2 * half).reshape(batch * tokens, 2 * half)  # [B * S, D]
        self.positions = torch.arange(batch * tokens, dtype=torch.int32, device=cos.device)  # a token's row of angles
        # Scratch memory, from the first layer that needs some: without it, an op prepares its launches again.
        self._workspace: Tensor | None = None
        self._attention_workspace: Tensor | None = None
        self._table: tuple[Tensor | None, int, int, PageTable] | None = None

    @classmethod
    def of(cls, embeddings: tuple[Any, Tensor], batch: int, tokens: int, first: bool) -> Shared:
        """embeddings: cosines and sines, each [B or 1, S, D], of any of transformers' kinds of rope.

        first: whether this is the forward's first layer, so that state stored on these tensors is stale.
        """
        cos, sin = embeddings
        if is_compiling():  # the compiler removes common subexpressions anyway
            return cls(cos, sin, batch, tokens)
        shared: Shared | None = None if first else getattr(cos, "_fastllama_shared", None)
        if shared is None or (shared.batch, shared.tokens) != (batch, tokens) or shared._sin is not sin:
            shared = cls(cos, sin, batch, tokens)
            cos._fastllama_shared = shared
        return shared

    def workspace(self, size: int) -> Tensor | None:
        """Zeros for the matmuls, at least `size` elements; None where none are needed."""
        if size and (self._workspace is None or self._workspace.numel() < size):
            self._workspace = torch.zeros(size, dtype=torch.float32, device=self.device)
        return self._workspace

    def attention_workspace(self, q: Tensor, k_pages: Tensor, table: PageTable) -> Tensor | None:
        """Scratch memory for attention with one query per sequence; None where none is needed."""
        if self.tokens == 1 and self._attention_workspace is None and not is_compiling():
            self._attention_workspace = kernels.attention_workspace(q, k_pages, table.pages)
        space = self._attention_workspace
        return None if space is None or not space.numel() else space

    def table(self, mask: Tensor | None, keys: int, row: int) -> PageTable:
        """The page table for `keys` keys; mask and row: as in PageTable; a mask that is not a key list is ignored."""
        known = self._table
        if known is not None and known[0] is mask and known[1:3] == (keys, row):
            return known[3]
        listed = mask if is_key_list(mask) else None
        if listed is not None and (expected := keys_of(listed)) is not None and expected != keys:
            raise ValueError(
                f"the mask was made for {expected} keys, but a layer's cache has {keys}: are layers numbered from 0?"
            )
        table = PageTable.of(listed, self.batch, self.tokens, keys, row, self.device)
        self._table = mask, keys, row, table
        return table
