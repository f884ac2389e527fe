"""Decode steps, sampling included, captured once per shape and replayed on the same buffers.

On a GPU this is a CUDA graph: one launch per step, where single launches would take the host longer than the device.
Kernels read lengths and page tables from the device, so one graph serves every length; there is one per `bucket` of
batch sizes, and rows beyond the batch are padding, for which no kernel writes. On a CPU it is a recording of the ops
(kernels/dispatch/recording.py) for the exact batch size.
A step writes its sampled tokens where the next step of the same shape reads its ids: while the same sequences continue,
nothing is copied between two steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastllama import env, kernels
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.device.adjustments import DTYPES as ADJUSTMENTS
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.buffers import Buffers
from fastllama.runtime.device.capture import Capture
from fastllama.runtime.device.sampler import DTYPES, PendingTokens, SampleBuffers
from fastllama.runtime.planning.inputs import Inputs, parameters

PADDING = -1  # the slot of a row without a sequence
_Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class DecodeGraphs:
    """Runs decode steps of a model: captures the first of each shape, and replays it for the others.

    Every step runs eagerly if the model has its own forward, a module has hooks, an op between the recorded ones cannot
    be recorded, a capture has failed, or FASTLLAMA_GRAPHS is 0. Other Python in modules runs only during the
    capture, and parameters are those of that moment.
    batch_of: BatchMeta with the constant fields filled in.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        kv: KVCache,
        capture: Capture,
        batch_of: Callable[..., BatchMeta],
        adjustments: Adjustments,
    ) -> None:
        self._model, self._kv, self._capture, self._batch_of = model, kv, capture, batch_of
        self._adjustments = adjustments
        self._modules = list(model.modules())
        self._graphs: dict[tuple[int, int, int, bool], _Graph] = {}  # least recently used first
        self.replayable = env.GRAPHS.read() == "1" and type(model) is LlamaForCausalLM

    def clear(self) -> None:
        """Drop all captured steps."""
        self._graphs.clear()

    def take(self, inputs: Inputs) -> bool:
        """Whether `run` can compute this step: only decodes, with logits and at most one sample for each token."""
        return (
            self.replayable
            and "forward" not in vars(self._model)
            and inputs.num_decodes == len(inputs.seq_lens)
            and len(inputs.logits_rows) == len(inputs.ids)
            and not inputs.prompts
            and len({sample.row for sample in inputs.samples}) == len(inputs.samples)
            and not (inputs.unknown and any(sample.seq.request.params.host_bound for sample in inputs.samples))
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        )

    def _shape(self, inputs: Inputs) -> tuple[int, int, int]:
        return *self._capture.shape(inputs.num_decodes, len(inputs.page_table[0])), inputs.num_queries

    def run(
        self, inputs: Inputs, before: PendingTokens | None, *, adjusts: bool
    ) -> tuple[Tensor, SampleBuffers | None]:
        """Returns the logits [R, V] of a decode step, and the tokens sampled in each row, as `samples` specify.

        Valid until the next step. Rows without a sample have undefined tokens. before: tokens of the previous step, for
        rows that are UNKNOWN here. adjusts: whether any logits are adjusted; with drafts, adjusting and sampling are
        not part of the captured step, and None is returned.
        """
        drafted = any(sample.ahead for sample in inputs.samples)
        logits, sampled = self._run(inputs, before, adjusts and not drafted)
        return logits, None if adjusts and drafted else sampled

    def _run(self, inputs: Inputs, before: PendingTokens | None, adjusts: bool) -> tuple[Tensor, SampleBuffers]:
        shape = *self._shape(inputs), adjusts
        graph = self._graphs.get(shape)
        if graph is None:
            adjustments = self._adjustments if adjusts else None
            graph = _Graph(*self._shape(inputs), self._model.device, self._batch_of, adjustments)
            graph.load(inputs, before)
            logits, replay = self._capture.capture(graph.step(self._model, self._kv))
            if replay is None:
                self.replayable = False
                self._graphs.clear()
                return logits[: len(inputs.ids)], graph.sampled
            if len(self._graphs) == self._capture.limit:
                del self._graphs[next(iter(self._graphs))]
            graph.replay, self._graphs[shape] = replay, graph
        else:
            self._graphs[shape] = self._graphs.pop(shape)
            graph.load(inputs, before)
            logits = graph.replay()
        return logits[: len(inputs.ids)], graph.sampled


def _argument(name: str) -> str:
    """Returns the buffer name of an argument of kernels.adjust_logits."""
    return f"adjust {name}"


class _Graph:
    """The captured step of one shape: its input buffers, its replay function, and the sampled tokens.

    sampled: its tokens are the step's ids, until sampling overwrites them. replay: computes the loaded step and returns
    its logits. adjustments: applied before sampling; None if no sequence has any.
    """

    replay: Callable[[], Tensor]

    def __init__(
        self,
        num_seqs: int,
        num_pages: int,
        num_queries: int,
        device: torch.device,
        batch_of: Callable[..., BatchMeta],
        adjustments: Adjustments | None,
    ) -> None:
        rows, wide, narrow = num_seqs * num_queries, torch.int64, torch.int32
        inputs: _Parts = {
            "positions": ((rows,), wide),
            "slots": ((rows,), wide),
            "seq_lens": ((num_seqs,), narrow),
            "page_table": ((num_seqs, num_pages), narrow),
        }
        sampling: _Parts = {name: ((rows,), dtype) for name, dtype in DTYPES.items()}
        self._adjustments = adjustments
        of_adjusting = {} if adjustments is None else ADJUSTMENTS
        adjusting: _Parts = {_argument(name): ((rows,), dtype) for name, dtype in of_adjusting.items()}
        # For ids that are partly unknown to the host: the known ones, a mask, and rows in the previous step's tokens.
        passed_on: _Parts = {"known": ((rows,), wide), "unknown": ((rows,), torch.bool), "places": ((rows,), wide)}
        sampled: _Parts = {"tokens": ((rows,), wide), "logprobs": ((rows,), torch.float32)}
        self._buffers = Buffers(inputs | sampling | adjusting | passed_on | sampled, device)
        given = self._buffers.device
        self.sampled = SampleBuffers(self._buffers.span("tokens", "logprobs"), given["tokens"], given["logprobs"])
        self._passed_on = [given[name] for name in passed_on]
        self._taken = torch.empty_like(given["tokens"])
        self._parameters = {name: given[name] for name in sampling}
        self._adjusting = {name: given[_argument(name)] for name in of_adjusting}
        self._num_seqs = num_seqs  # with data in the buffers
        self._batch = batch_of(
            **{name: given[name] for name in inputs},
            num_decodes=num_seqs,
            num_queries=num_queries,
            cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=device),
            logits_rows=torch.arange(rows, dtype=torch.int64, device=device),
        )

    def step(self, model: LlamaForCausalLM, kv: KVCache) -> Callable[[], Tensor]:
        """Returns a function that computes the loaded step and returns its logits."""
        tokens, logprobs = self.sampled.tokens, self.sampled.logprobs

        def run() -> Tensor:
            logits = changed = model(tokens, self._batch, kv)
            if self._adjustments is not None:
                bias, counts = self._adjustments.tables
                changed = kernels.adjust_logits(logits, tokens, bias=bias, counts=counts, **self._adjusting)
            kernels.sample(changed, **self._parameters, tokens=tokens, logprobs=logprobs)
            return logits

        return run

    def load(self, inputs: Inputs, before: PendingTokens | None) -> None:
        """Copy a step's inputs to the device, and place the ids that only the device has."""
        host, num_seqs, width = self._buffers.host, inputs.num_decodes, len(inputs.page_table[0])
        rows = len(inputs.ids)
        for name in ("positions", "slots"):
            host[name][:rows] = getattr(inputs, name)
        host["seq_lens"][:num_seqs] = inputs.seq_lens
        host["page_table"][:num_seqs, :width] = inputs.page_table
        sampled = [sample.row for sample in inputs.samples]
        where = slice(rows) if sampled == list(range(rows)) else sampled  # by a list of rows, 64 rows take 15 us longer
        for name, values in parameters(inputs.samples).items():
            host[name][where] = values
        if self._adjustments is not None:
            lacking = {seq: row for row, seq in inputs.unknown}
            for name, values in self._adjustments.arguments(inputs.samples, lacking).items():
                host[_argument(name)][where] = values
        if num_seqs < self._num_seqs:
            host["slots"][rows:] = PADDING
            host["seq_lens"][num_seqs:] = 0
        self._num_seqs = num_seqs
        if not inputs.unknown:
            host["tokens"][:rows] = inputs.ids
            self._buffers.send()
            return
        assert before is not None, "an UNKNOWN token without a previous step"
        at, sequences = map(list, zip(*inputs.unknown, strict=True))
        places = before.rows_of(sequences)
        if before.sampled is self.sampled and at == places == list(range(rows)):  # the same sequences once more
            self._buffers.send(before="tokens")
            return
        host["known"][:rows] = inputs.ids
        host["places"][:rows] = 0
        host["places"][at] = places
        host["unknown"][:rows] = False
        host["unknown"][at] = True
        self._buffers.send(before="tokens")
        known, unknown, place = (each[:rows] for each in self._passed_on)
        torch.index_select(before.sampled.tokens, 0, place, out=self._taken[:rows])
        torch.where(unknown, self._taken[:rows], known, out=self.sampled.tokens[:rows])
