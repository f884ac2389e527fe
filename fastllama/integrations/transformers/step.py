"""What the layers of one forward share: the rotation's angles, the page table, the matmuls' scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastllama.integrations.transformers.masks import is_key_list, width_of


@dataclass(frozen=True)
class PageTable:
    """Which pages of a token each sequence attends to, and which its new tokens, S of each, are written to."""

    pages: Tensor  # [B, W] int32
    lengths: Tensor  # [B] int32
    bounds: Tensor  # [B + 1] int32: the rows of each sequence's queries
    slots: Tensor  # [B * S] int32

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, tokens: int, keys: int, row: int, device: torch.device) -> PageTable:
        """mask: a key list, or None for all keys; row: pages from a sequence's first to the next one's."""
        first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * row
        if mask is None:
            slots = torch.arange(width_of(keys), dtype=torch.int32, device=device)
            lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
        else:
            slots, lengths = mask[:, 0, 0, 1:], mask[:, 0, 0, 0].contiguous()
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        new = torch.arange(keys - tokens, keys, dtype=torch.int32, device=device)
        return cls(first + slots, lengths, bounds, (first + new).view(-1))


class Step:
    """One forward of [B, S] tokens. The first layer makes it; it is kept on the cosines, which all layers get."""

    def __init__(self, cos: Tensor, sin: Tensor, batch: int, tokens: int) -> None:
        self.batch, self.tokens, self.device = batch, tokens, cos.device
        half = cos.shape[-1] // 2
        angles = torch.cat((cos[..., :half], sin[..., :half]), -1).float()
        self.angles = angles.expand(batch, tokens, 2 * half).reshape(batch * tokens, 2 * half)  # [B * S, D]
        self.positions = torch.arange(batch * tokens, dtype=torch.int32, device=cos.device)  # a token's row of angles
        self.workspace: Tensor | None = None
        self._table: tuple[Tensor | None, int, int, PageTable] | None = None

    @classmethod
    def of(cls, embeddings: tuple[Any, Tensor], batch: int, tokens: int) -> Step:
        """embeddings: cosines and sines, each [B or 1, S, D], of any of transformers' kinds of rope."""
        cos, sin = embeddings
        if is_compiling():  # where equal parts of a graph are computed once anyway
            return cls(cos, sin, batch, tokens)
        step: Step | None = getattr(cos, "_fastllama_step", None)
        if step is None or (step.batch, step.tokens) != (batch, tokens):
            step = cls(cos, sin, batch, tokens)
            cos._fastllama_step = step
        return step

    def table(self, mask: Tensor | None, keys: int, row: int) -> PageTable:
        """The page table for so many keys; mask and row: as in PageTable, but any mask that is no key list is None."""
        known = self._table
        if known is not None and known[0] is mask and known[1:3] == (keys, row):
            return known[3]
        listed = mask if is_key_list(mask) else None
        table = PageTable.of(listed, self.batch, self.tokens, keys, row, self.device)
        self._table = mask, keys, row, table
        return table
