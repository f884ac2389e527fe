"""What one forward pass computes: chunks of sequences. Values, made by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from fastllama.runtime.planning.block_pool import Transfer
from fastllama.runtime.planning.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence. `samples` draw their next token from the logits of its last row.

    samples: () while a prompt is unfinished, then (seq,); all n sequences where a prompt with n > 1 ends.
    drafts: tokens that may come after the sequence's own, of which the chunk's last ones are; each of their rows draws.
    """

    seq: Sequence
    start: int
    length: int
    samples: tuple[Sequence, ...]
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: chunks, the decodes first (`num_decodes` of them), which are of one length: 1 but for drafts.

    transfers: between device and host, executed once, in their order and first of all; see BlockPool.
    copies: (source page, destination page), executed before the forward pass in any order, for no page is both.
    """

    chunks: tuple[Chunk, ...]
    num_decodes: int
    copies: tuple[tuple[int, int], ...]
    transfers: tuple[Transfer, ...] = ()
