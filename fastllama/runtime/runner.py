"""Runs a scheduler's step on the device: page copies, tensors of the batch, the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.scheduler import Chunk, Step
from fastllama.runtime.sequence import Sequence


@dataclass(frozen=True)
class StepLogits:
    """Logits [R, V] of one step and whose they are.

    samples: (sequence, row) for each token to draw; samples of one prompt share a row.
    prompts: (chunk, first row, rows) where prompt log-probabilities are wanted; row i predicts token start + i + 1.
    """

    logits: Tensor
    samples: list[tuple[Sequence, int]]
    prompts: list[tuple[Chunk, int, int]]


class Runner:
    """A model and its pages."""

    def __init__(self, model: LlamaForCausalLM, num_pages: int, page_size: int) -> None:
        self.model = model
        self.page_size = page_size
        self.kv = KVCache.allocate(model.config, num_pages, page_size, model.dtype, model.device)

    @torch.inference_mode()
    def run(self, step: Step) -> StepLogits:
        """Compute the step; its keys and values are in the pages afterwards."""
        if step.copies:
            self.kv.copy_pages(step.copies)
        ids, batch, samples, prompts = self._prepare(step)
        return StepLogits(self.model(ids, batch, self.kv), samples, prompts)

    def _prepare(
        self, step: Step
    ) -> tuple[Tensor, BatchMeta, list[tuple[Sequence, int]], list[tuple[Chunk, int, int]]]:
        size = self.page_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        bounds = [0]
        samples: list[tuple[Sequence, int]] = []
        prompts: list[tuple[Chunk, int, int]] = []
        for index, chunk in enumerate(step.chunks):
            seq, start, end = chunk.seq, chunk.start, chunk.start + chunk.length
            first, pages = len(ids), seq.page_ids
            ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
            slots.extend(pages[p // size] * size + p % size for p in range(start, end))
            if index >= step.num_decodes:
                bounds.append(bounds[-1] + chunk.length)
            known = min(end, seq.num_prompt_tokens - 1) - start  # rows that predict a token of the prompt
            if known > 0 and seq.request.params.prompt_logprobs is not None:
                prompts.append((chunk, len(rows), known))
                rows.extend(range(first, first + known))
            if chunk.samples:
                samples.extend((sample, len(rows)) for sample in chunk.samples)
                rows.append(len(ids) - 1)
        width = max(len(chunk.seq.page_ids) for chunk in step.chunks)
        table = [chunk.seq.page_ids + [0] * (width - len(chunk.seq.page_ids)) for chunk in step.chunks]
        lengths = [chunk.start + chunk.length for chunk in step.chunks]
        batch = BatchMeta(
            positions=self._tensor(positions, torch.int64),
            slots=self._tensor(slots, torch.int64),
            page_table=self._tensor(table, torch.int32),
            seq_lens=self._tensor(lengths, torch.int32),
            num_decodes=step.num_decodes,
            cu_seqlens_q=self._tensor(bounds, torch.int32),
            logits_rows=self._tensor(rows, torch.int64),
        )
        return self._tensor(ids, torch.int64), batch, samples, prompts

    def _tensor(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.model.device)
