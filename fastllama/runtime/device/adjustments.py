"""Tables of logit biases and token counts of the running requests, read by kernels.adjust_logits.

A sequence with biases, bans or penalties has a row in each table. Its tokens are counted once, as they come, so that a
step's cost does not grow with the context. A token sampled on the device and not yet on the host is passed to the
kernel beside the counts, so that the next step need not wait for it.
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

DTYPES = {  # of the per-row arguments
    "starts": torch.int64,
    "ends": torch.int64,
    "slots": torch.int64,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}
BYTES = 8  # of a row, per token of the vocabulary
NONE = -1  # slot of a row without adjustments
IN_PROMPT, GENERATED = 1, 2  # added to a count for each occurrence


@dataclass
class _Slot:
    """A sequence's row in the tables, its number of counted tokens, and whether its end tokens are banned there."""

    index: int
    num_counted: int
    bans_ends: bool


class Adjustments:
    """The tables for num_slots sequences; rows of the oldest that a step does not use are evicted, and rebuilt later.

    eos_token_ids: banned by min_tokens, with a request's own stop tokens. Allocated at the first request that needs
    them: 8 bytes per sequence and token of the vocabulary.
    """

    def __init__(self, num_slots: int, vocab_size: int, eos_token_ids: abc.Sequence[int], device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self._eos_token_ids = eos_token_ids
        self._slots: dict[Sequence, _Slot] = {}
        self._free = list(range(num_slots))
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Biases [S, V] fp32 and counts [S, V] int32, at fixed addresses."""
        if self._tables is None:
            self._tables = (
                torch.zeros(self._shape, dtype=torch.float32, device=self._device),
                torch.zeros(self._shape, dtype=torch.int32, device=self._device),
            )
        return self._tables

    def forget(self, sequences: abc.Iterable[Sequence]) -> None:
        """Release the rows of sequences that have ended."""
        for seq in sequences:
            slot = self._slots.pop(seq, None)
            if slot is not None:
                self._free.append(slot.index)

    def clear(self) -> None:
        """Release all rows."""
        self.forget(list(self._slots))

    @torch.inference_mode()
    def follow(self, samples: abc.Sequence[SamplingRow]) -> bool:
        """Update the rows of these sequences with the tokens on the host. Returns False if none needs a row."""
        wanted: dict[Sequence, int] = {}  # number of drafts after it
        for sample in samples:
            if sample.seq.request.params.adjusts:
                wanted[sample.seq] = max(wanted.get(sample.seq, 0), len(sample.ahead))
        if not wanted:
            return False
        biases, counts = (table.view(-1) for table in self.tables)
        counted: list[int] = []  # indices into the table of counts
        changed: dict[int, float] = {}  # index into the table of biases -> value
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
        except BaseException:  # Ctrl-C or out of memory: the rows are undefined, and rebuilt
            self.forget(wanted)
            raise
        return True

    def banned(self, sample: SamplingRow) -> abc.Collection[int]:
        """Returns the tokens banned for this sample beyond the tables, because host tokens or drafts decide."""
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
        """Arguments of kernels.adjust_logits for each row; unknown: index in `tokens` of those not on the host."""
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
        """Returns the adjusted logits [R, V] of these samples as a new tensor: fp32 (fp64 stays).

        ids: of the step, in which `unknown` are the tokens not on the host; there are none if samples follow drafts.
        """
        arguments = self.arguments(samples, unknown)
        if not unknown:
            drafts: list[int] = []
            for row, sample in enumerate(samples):
                arguments["starts"][row] = len(drafts)
                drafts.extend(sample.ahead)
                arguments["ends"][row] = len(drafts)
            ids = self._on_device(drafts)
        assert ids is not None, "unknown tokens without the step's ids"
        biases, counts = self.tables
        sent = {name: on_device(values, DTYPES[name], self._device) for name, values in arguments.items()}
        return kernels.adjust_logits(logits, ids, bias=biases, counts=counts, **sent)

    def _begin(self, seq: Sequence, wanted: abc.Container[Sequence]) -> _Slot:
        """Allocate a sequence's row and fill in its request's biases and its prompt's tokens."""
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
        """Collect the updates that a sequence's row lacks."""
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
    """Returns the tokens that end a sample, which min_tokens bans."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def _bias(request: Request, token_id: int) -> float:
    """Returns the bias of a token in a request."""
    params, words = request.params, request.bad_words
    if (params.allowed is not None and token_id not in params.allowed) or (words and token_id in words.single):
        return -math.inf
    return (params.logit_bias or {}).get(token_id, 0.0)
