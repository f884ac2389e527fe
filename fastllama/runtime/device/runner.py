"""Runs a scheduled step on the device: page copies, batch tensors, the forward pass."""

from __future__ import annotations

import logging
from collections import abc
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastllama import env
from fastllama.arithmetic import ceil_div
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.buffers import on_device
from fastllama.runtime.device.capture import Capture, GraphCapture, RecordingCapture
from fastllama.runtime.device.graphs import DecodeGraphs
from fastllama.runtime.device.host_cache import HostCache
from fastllama.runtime.device.sampler import PendingTokens, StepLogits
from fastllama.runtime.planning.block_pool import BlockPool, Transfer
from fastllama.runtime.planning.inputs import Inputs
from fastllama.runtime.planning.step import Step

logger = logging.getLogger("fastllama")

LEAST_ROWS = 16


class Runner:
    """A model with its KV cache and its captured decode steps.

    kv_dtype: of the pages. host_cache_tokens: size of `host`, which is None for 0. max_num_tokens: of a step.
    max_model_len: tokens of a sequence. deterministic: batch-invariant logits. adjustments: of the logits, shared with
    a draft model's runner. max_num_seqs: as in memory.sizes.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        num_pages: int,
        page_size: int,
        *,
        kv_dtype: torch.dtype,
        host_cache_tokens: int,
        max_num_tokens: int,
        max_model_len: int,
        deterministic: bool,
        adjustments: Adjustments,
        max_num_seqs: int,
    ) -> None:
        self.model = model
        # Whether the host prepares the next step while one runs.
        self.runs_ahead = env.AHEAD.read() == "1" and model.device.type == "cuda"
        self.page_size = page_size
        self.kv = KVCache.allocate(model.config, num_pages, page_size, kv_dtype, model.device)
        self.host = HostCache(self.kv, model.config, host_cache_tokens) if host_cache_tokens else None
        self._deterministic = deterministic
        # Rows of prompt logits per piece: half of what memory.sizes reserves, since the sampled rows' logits exist too.
        # Fewer than LEAST_ROWS read the head's weights too often for the memory saved (128256 logits in bf16: 4 MB).
        self._logits_piece = max(max_num_seqs // 2, LEAST_ROWS)
        workspace = model.workspace(max_num_tokens)
        # Not shared: with dynamic rope scaling it depends on the engine's max_model_len.
        self.cos_sin = model.rotary_cache(max_model_len)
        self._batch_of = partial(BatchMeta, workspace=workspace, cos_sin=self.cos_sin, deterministic=deterministic)
        self._capture: Capture = RecordingCapture(model.device)
        if model.device.type == "cuda":
            self._capture = GraphCapture(model.device, ceil_div(max_model_len, page_size))
        self.adjustments = adjustments
        self._graphs = DecodeGraphs(model, self.kv, self._capture, self._batch_of, adjustments)

    @property
    def replays(self) -> bool:
        """Whether decode steps are replayed, unless a module has hooks."""
        return self._graphs.replayable

    def drop_graphs(self) -> None:
        """Drop the captured decode steps, because tensors that they read have moved."""
        self._graphs.clear()

    def shape(self, num_seqs: int, num_queries: int) -> tuple[int, int]:
        """Returns a key of decode steps that run the same graph, given the same number of pages.

        num_queries: tokens of each sequence.
        """
        if self._deterministic:
            num_seqs, num_queries = num_seqs * num_queries, 1  # see Inputs.of
        return self._capture.shape(num_seqs, 1)[0], num_queries

    @torch.inference_mode()
    def run(self, step: Step, before: PendingTokens | None = None) -> StepLogits:
        """Compute the step; its keys and values are in the pages afterwards.

        before: tokens of the previous step, for the rows that are UNKNOWN here.
        """
        self.copy(step)
        inputs = Inputs.of(step, self.page_size, apart=self._deterministic)
        adjustments = self.adjustments if self.adjustments.follow(inputs.samples) else None
        if self._graphs.take(inputs):
            logits, sampled = self._graphs.run(inputs, before, adjusts=adjustments is not None)
            return StepLogits(logits, inputs.samples, adjustments, sampled=sampled)
        ids, batch = self._batch(inputs, before)
        places = {seq: row for row, seq in inputs.unknown}
        if inputs.prompts:
            step_logits = self._in_pieces(inputs, ids, batch)
        else:
            step_logits = StepLogits(self.model(ids, batch, self.kv), inputs.samples)
        return replace(step_logits, adjustments=adjustments, ids=ids, unknown=places)

    def _in_pieces(self, inputs: Inputs, ids: Tensor, batch: BatchMeta) -> StepLogits:
        """As `run`, for a step with prompt log-probabilities: computes the prompts' logits a few rows at a time.

        All at once, 8192 rows of 128256 logits in bf16 take 2.1 GB, and memory.sizes reserves max_num_seqs rows. A
        model with its own forward, or with a hook that sees all logits, computes them at once.
        """
        model, device = self.model, self.model.device
        splits = model.splits
        rows = (model.hidden_states if splits else model)(ids, batch, self.kv)

        def logits_of(places: abc.Sequence[int]) -> Tensor:
            chosen = rows[on_device(places, torch.int64, device)]
            return model.head(chosen, batch) if splits else chosen

        sampled = sorted({sample.row for sample in inputs.samples})
        place_of = {row: place for place, row in enumerate(sampled)}
        wanted = [row for _, shown, first in inputs.prompts for row in range(first, first + len(shown))]
        size = self._logits_piece
        return StepLogits(
            logits_of(sampled),
            [sample._replace(row=place_of[sample.row]) for sample in inputs.samples],
            prompts=[(seq, shown) for seq, shown, _ in inputs.prompts],
            prompt_logits=(logits_of(wanted[first : first + size]) for first in range(0, len(wanted), size)),
        )

    def transfer(self, transfers: abc.Sequence[Transfer], pool: BlockPool) -> None:
        """Copy pages between device and host. If a copy fails, the host cache is dropped: here and in the pool.

        The engine works without it, and a retry might fail for ever.
        """
        assert self.host is not None, "transfers without a host cache"
        try:
            self.host.transfer(transfers)
        except BaseException as error:
            pool.forget(transfers)
            if not isinstance(error, Exception):
                raise
            logger.warning("the host cache is disabled, because a copy failed: %r", error)
            pool.drop_host()
            self.host = None

    def copy(self, step: Step) -> None:
        """Copy the step's pages on the device, and run nothing else."""
        if step.copies:
            self.kv.copy_pages(step.copies)

    def _batch(self, inputs: Inputs, before: PendingTokens | None) -> tuple[Tensor, BatchMeta]:
        def tensor(values: abc.Sequence[object], dtype: torch.dtype) -> Tensor:
            return on_device(values, dtype, self.model.device)

        # As wide as in a graph: on a GPU, the page table's width determines the launch of attention.
        width = self._capture.shape(1, len(inputs.page_table[0]))[1]
        batch = self._batch_of(
            positions=tensor(inputs.positions, torch.int64),
            slots=tensor(inputs.slots, torch.int64),
            page_table=tensor([pages + [0] * (width - len(pages)) for pages in inputs.page_table], torch.int32),
            seq_lens=tensor(inputs.seq_lens, torch.int32),
            num_decodes=inputs.num_decodes,
            num_queries=inputs.num_queries,
            cu_seqlens_q=tensor(inputs.cu_seqlens_q, torch.int32),
            logits_rows=tensor(inputs.logits_rows, torch.int64),
        )
        ids = tensor(inputs.ids, torch.int64)
        if inputs.unknown:
            assert before is not None, "an UNKNOWN token without a previous step"
            at, sequences = zip(*inputs.unknown, strict=True)
            places = before.rows_of(sequences)
            ids[tensor(at, torch.int64)] = before.sampled.tokens[tensor(places, torch.int64)]
        return ids, batch
