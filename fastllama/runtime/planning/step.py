"""The scheduler's output: the chunks of sequences that one forward pass computes, as immutable values."""

from __future__ import annotations

from dataclasses import dataclass

from fastllama.runtime.planning.block_pool import Transfer
from fastllama.runtime.planning.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence. The next tokens of `samples` are sampled from its last row of
    logits.

    samples: () while a prompt is unfinished, then (seq,); all n sequences at the end of a prompt with n > 1.
    drafts: draft tokens after the sequence's own tokens, at the end of the chunk; a token is sampled in each of their
    rows.
    """

    seq: Sequence
    start: int
    length: int
    samples: tuple[Sequence, ...]
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: its chunks, the `num_decodes` decodes first, which all have the same length: 1 plus drafts.

    transfers: page copies between device and host, executed once, in order, before anything else; see BlockPool.
    copies: (source page, destination page), executed before the forward pass in any order: no page is in both roles.
    """

    chunks: tuple[Chunk, ...]
    num_decodes: int
    copies: tuple[tuple[int, int], ...]
    transfers: tuple[Transfer, ...] = ()
