"""What requests add to their logits, and counts of their tokens, in tables that kernels.adjust_logits reads.

A sequence with biases, bans or penalties has a row of each table. What it has seen is counted once, token by token, so
that a step's cost does not grow with its context. A token that was drawn on the device, and that the host does not know
yet, is given to the kernel beside the counts, so that the next step need not wait for it.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.runtime.device.buffers import on_device
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.inputs import SamplingRow
from fastllama.runtime.planning.sequence import UNKNOWN, Request, Sequence

DTYPES = {  # of a row's arguments
    "starts": torch.int64,
    "ends": torch.int64,
    "slots": torch.int64,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}
BYTES = 8  # of a row, for each token of the vocabulary
NONE = -1  # the slot of a row that is left as it is
IN_PROMPT, GENERATED = 1, 2  # what an occurrence adds to a count


@dataclass
class _Slot:
    """A sequence's place in the tables, how many of its tokens are counted, and whether its ends are banned there."""

    index: int
    num_counted: int
    bans_ends: bool


class Adjustments:
    """The tables, for so many sequences at once; the oldest that a step does not want give way, and are counted anew.

    eos_token_ids: which min_tokens bans, beside a request's own. They take 8 bytes for each sequence and token of the
    vocabulary, from the first request that wants them on.
    """

    def __init__(self, num_slots: int, vocab_size: int, eos_token_ids: abc.Sequence[int], device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self._eos_token_ids = eos_token_ids
        self._slots: dict[Sequence, _Slot] = {}
        self._free = list(range(num_slots))
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Biases [S, V] fp32 and counts [S, V] int32, whose memory never changes."""
        if self._tables is None:
            self._tables = (
                torch.zeros(self._shape, dtype=torch.float32, device=self._device),
                torch.zeros(self._shape, dtype=torch.int32, device=self._device),
            )
        return self._tables

    def forget(self, sequences: abc.Iterable[Sequence]) -> None:
        """Sequences that have ended leave their rows to others."""
        for seq in sequences:
            slot = self._slots.pop(seq, None)
            if slot is not None:
                self._free.append(slot.index)

    def clear(self) -> None:
        """Forget all sequences."""
        self.forget(list(self._slots))

    @torch.inference_mode()
    def follow(self, samples: abc.Sequence[SamplingRow]) -> bool:
        """Bring the rows of these sequences up to date with the tokens that the host knows. False if none has one."""
        wanted: dict[Sequence, int] = {}  # drafts behind it
        for sample in samples:
            if sample.seq.request.params.adjusts:
                wanted[sample.seq] = max(wanted.get(sample.seq, 0), len(sample.ahead))
        if not wanted:
            return False
        biases, counts = (table.view(-1) for table in self.tables)
        counted: list[int] = []  # places in the table of counts
        changed: dict[int, float] = {}  # places in that of biases
        try:
            for seq, num_drafts in wanted.items():
                slot = self._slots.get(seq) or self._begin(seq, wanted)
                self._catch_up(seq, slot, num_drafts, counted, changed)
            if counted:
                more = torch.full((len(counted),), GENERATED, dtype=torch.int32, device=self._device)
                counts.scatter_add_(0, self._on_device(counted), more)
            if changed:
                values = on_device(list(changed.values()), torch.float32, self._device)
                biases.scatter_(0, self._on_device(list(changed)), values)
        except BaseException:  # Ctrl-C, or no memory: what is in the rows is unknown, and they are begun anew
            self.forget(wanted)
            raise
        return True

    def banned(self, sample: SamplingRow) -> abc.Collection[int]:
        """Tokens that must not be sampled there and that no table bans, for the host or a draft decides on them."""
        seq, params = sample.seq, sample.seq.request.params
        found: set[int] = set()
        words = seq.request.bad_words
        if words is not None:
            first = max(seq.num_prompt_tokens, len(seq.token_ids) - words.num_before)
            found |= words.completing([*seq.token_ids[first:], *sample.ahead])
        if params.min_tokens and not self._slots[seq].bans_ends:
            num_generated = len(seq.token_ids) - seq.num_prompt_tokens + len(sample.ahead)
            if num_generated < params.min_tokens:
                found |= ends_of(params, self._eos_token_ids)
        return found

    def arguments(
        self, samples: abc.Sequence[SamplingRow], unknown: abc.Mapping[Sequence, int]
    ) -> dict[str, list[Any]]:
        """Arguments of kernels.adjust_logits for each row; unknown: where `tokens` has those that the host lacks."""
        params = [sample.seq.request.params for sample in samples]
        slots = [self._slots[s.seq].index if p.adjusts else NONE for s, p in zip(samples, params, strict=True)]
        starts = [unknown.get(sample.seq, 0) for sample in samples]
        return {
            "starts": starts,
            "ends": [start + (sample.seq in unknown) for start, sample in zip(starts, samples, strict=True)],
            "slots": slots,
            "repetition_penalty": [p.repetition_penalty for p in params],
            "presence_penalty": [p.presence_penalty for p in params],
            "frequency_penalty": [p.frequency_penalty for p in params],
        }

    def adjusted(
        self,
        logits: Tensor,
        samples: abc.Sequence[SamplingRow],
        ids: Tensor | None,
        unknown: abc.Mapping[Sequence, int],
    ) -> Tensor:
        """The logits [R, V] of these samples, adjusted: fp32 (fp64 stays), in memory of its own.

        ids: of the step, in which `unknown` are the tokens that the host does not know; none are where samples are
        behind drafts.
        """
        arguments = self.arguments(samples, unknown)
        if not unknown:
            drafts: list[int] = []
            for row, sample in enumerate(samples):
                arguments["starts"][row] = len(drafts)
                drafts.extend(sample.ahead)
                arguments["ends"][row] = len(drafts)
            ids = self._on_device(drafts)
        assert ids is not None, "tokens that nobody knows"
        biases, counts = self.tables
        sent = {name: on_device(values, DTYPES[name], self._device) for name, values in arguments.items()}
        return kernels.adjust_logits(logits, ids, bias=biases, counts=counts, **sent)

    def _begin(self, seq: Sequence, wanted: abc.Container[Sequence]) -> _Slot:
        """Give a sequence a row that says what its request asks for, and what its prompt holds."""
        if not self._free:
            self.forget([next(other for other in self._slots if other not in wanted)])
        params = seq.request.params
        slot = self._slots[seq] = _Slot(self._free.pop(), seq.num_prompt_tokens, False)
        bias, count = (table[slot.index] for table in self.tables)
        bias.zero_()
        if params.allowed_token_ids is not None:
            bias.fill_(-math.inf)[self._on_device(list(params.allowed_token_ids))] = 0
        own = {*(params.logit_bias or ()), *(seq.request.bad_words.single if seq.request.bad_words else ())}
        if own:
            values = [_bias(seq.request, token_id) for token_id in own]
            bias[self._on_device(list(own))] = on_device(values, torch.float32, self._device)
        count.zero_()
        if params.penalizes:
            count[self._on_device(list({*seq.request.prompt_token_ids}))] = IN_PROMPT
        return slot

    def _catch_up(
        self, seq: Sequence, slot: _Slot, num_drafts: int, counted: list[int], changed: dict[int, float]
    ) -> None:
        """Note what a sequence's row lacks."""
        params, first = seq.request.params, slot.index * self._shape[1]
        known = len(seq.token_ids) - (seq.token_ids[-1] == UNKNOWN)
        if params.penalizes:
            counted.extend(first + token_id for token_id in seq.token_ids[slot.num_counted : known])
        slot.num_counted = known
        bans_ends = len(seq.token_ids) - seq.num_prompt_tokens + num_drafts < params.min_tokens
        if bans_ends is not slot.bans_ends:
            slot.bans_ends = bans_ends
            for token_id in ends_of(params, self._eos_token_ids):
                changed[first + token_id] = -math.inf if bans_ends else _bias(seq.request, token_id)

    def _on_device(self, places: list[int]) -> Tensor:
        return on_device(places, torch.int64, self._device)


def ends_of(params: SamplingParams, eos_token_ids: abc.Iterable[int]) -> set[int]:
    """The tokens that end a sample, which min_tokens bans."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def _bias(request: Request, token_id: int) -> float:
    """What a request adds to the logit of a token."""
    params, words = request.params, request.bad_words
    if (params.allowed is not None and token_id not in params.allowed) or (words and token_id in words.single):
        return -math.inf
    return (params.logit_bias or {}).get(token_id, 0.0)
