"""Addresses tokens in a cache of flash-attn's shape, for appending new ones and for attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.integrations.flash_attn.conventions import with_their_names
from fastllama.kernels import write_kv


@dataclass(frozen=True)
class Tokens:
    """Rows of new queries or keys. owner: [T] int64, the sequence of each. offset: [T], its index among that
    sequence's rows, or 0 for one row each. counts: rows per sequence, one number or [B]. used: [T], False for rows past
    the last sequence, or None. length: rows per sequence, where all are equal.
    """

    owner: Tensor
    offset: Tensor | int
    counts: Tensor | int
    used: Tensor | None
    length: int | None

    @classmethod
    def of(cls, x: Tensor, bounds: Tensor | None) -> Tokens:
        """The rows of x: [B, S, H, D], or [T, H, D] with bounds [B + 1]."""
        if bounds is None:
            num_seqs, length = x.shape[:2]
            token = torch.arange(num_seqs * length, dtype=torch.int64, device=x.device)
            if length == 1:
                return cls(token, 0, 1, None, 1)
            return cls(token // length, token % length, length, None, length)
        token = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
        owner = torch.bucketize(token, bounds[1:-1], right=True)
        return cls(owner, token - bounds[owner], bounds.diff(), token < bounds[-1], None)

    def positions(self, start: Tensor, advancing: bool = True) -> Tensor:
        """[T]: `start` [B] of each row's sequence, plus the row's offset if `advancing`."""
        if isinstance(self.offset, int):
            return start
        return start[self.owner] + self.offset if advancing else start[self.owner]


@dataclass(frozen=True)
class Cache:
    """Keys and values [P, page_size, Hkv, D] with a page table [B, n]; a contiguous cache row counts as a page."""

    k: Tensor
    v: Tensor
    table: Tensor

    @property
    def room(self) -> int:
        """Capacity of a sequence's pages, in tokens."""
        return int(self.table.shape[1] * self.k.shape[1])

    def append(self, k: Tensor, v: Tensor, tokens: Tokens, lens: Tensor) -> None:
        """Write k, v [T, Hkv, D] after the first `lens` [B] tokens of their sequences, where there is room."""
        slots = self._slots(tokens.owner, tokens.positions(lens), self.k.shape[1])
        if tokens.used is not None:
            slots = slots.where(tokens.used, -1)
        with_their_names(write_kv, k, v, slots, self.k.transpose(1, 2), self.v.transpose(1, 2))

    def pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """k and v as [P, Hkv, page_size, D], and the table."""
        return self.k.transpose(1, 2), self.v.transpose(1, 2), self.table

    def without_first(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`pages` that skip the first `hidden` [B] tokens of each sequence: pages of one token each.

        Longer pages could begin at any token, too, but the last one would reach past the end of the memory.
        """
        pitch = token_pitch(self.k)
        owner = torch.arange(hidden.shape[0], dtype=torch.int64, device=hidden.device)[:, None]
        ahead = torch.arange(self.room, dtype=torch.int64, device=hidden.device)
        table = self._slots(owner, hidden[:, None] + ahead, pitch)
        return self._one_token_pages(self.k, pitch), self._one_token_pages(self.v, pitch), table

    def _one_token_pages(self, x: Tensor, pitch: int) -> Tensor:
        num_pages, page_size, num_heads, head_dim = x.shape
        tokens = (num_pages - 1) * pitch + page_size
        return x.as_strided((tokens, num_heads, 1, head_dim), (x.stride(1), x.stride(2), x.stride(1), x.stride(3)))

    def _slots(self, owner: Tensor, positions: Tensor, pitch: int) -> Tensor:
        """Slots of tokens at `positions` in their sequences, page * pitch + offset; -1 where there is no room.

        owner: the sequence of each; broadcasts against positions.
        """
        num_pages, page_size = self.k.shape[:2]
        if not self.table.shape[1]:
            return torch.full_like(positions, -1)
        inside = (positions >= 0) & (positions < self.room)
        positions = positions.long().where(inside, 0)
        page = self.table[owner, positions // page_size].long()
        return (page * pitch + positions % page_size).where(inside & (page >= 0) & (page < num_pages), -1)


def token_pitch(x: Tensor) -> int:
    """The distance between pages of [P, page_size, Hkv, D], in tokens; 0 where it is not a whole number."""
    if x.shape[0] == 1:
        return int(x.shape[1])
    between_pages, between_tokens = x.stride()[:2]
    if not between_tokens or between_pages % between_tokens:
        return 0
    return between_pages // between_tokens  # not divmod, which torch.compile lacks for symbolic sizes
