"""Decode steps, draws included, captured once for each shape and run again over the same buffers, without the modules.

On a GPU that is a CUDA graph: one launch for a step, where one by one the host would need longer for them than the
device. Kernels read lengths and page tables from the device, so a graph serves every length; of batches there is one
for each `bucket`, and the rows beyond a batch are padding, which no kernel writes for. On a CPU it is a record of what
the ops ran (kernels/recording.py), of exactly the sequences there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.arithmetic import ceil_div, power_of_2
from fastllama.kernels.recording import record
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.buffers import Buffers
from fastllama.runtime.inputs import Inputs, parameters
from fastllama.runtime.sampler import DTYPES

LIMIT = 64  # recordings kept, of some hundred small Python objects each; all share their tensors' memory
PADDING = -1  # the slot of a row that is nobody's
T = TypeVar("T")


class Capture(Protocol):
    """How steps are captured on a kind of device."""

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        """Rows, and pages of each, of the graph for so many sequences, whose longest has so many pages."""

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], object] | None]:
        """What `run` returns, computed now, and what computes it again in its place; None where nothing can."""


class RecordingCapture:
    """On a CPU: rows as they are, and the power of two of pages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[Tensor] = []

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return num_seqs, power_of_2(num_pages)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], object] | None]:
        result, recording = record(run, self._device, self._memory)
        return result, recording.replay if recording.replayable else None


class GraphCapture:
    """On a GPU: rows of a bucket, all pages that a sequence may have. Graphs share the memory of what is in between."""

    def __init__(self, device: torch.device, max_pages: int) -> None:
        self._device, self._max_pages = device, max_pages
        self._pool: Any = None

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return bucket(num_seqs), self._max_pages

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], object] | None]:
        graph = torch.cuda.CUDAGraph()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        with torch.cuda.device(self._device):
            run()  # what compiles at a first call must not do so while capturing
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
        self._pool = graph.pool()
        replay()  # capturing computes nothing
        return result, replay


def bucket(num_seqs: int) -> int:
    """The power of two up to 64, beyond that the multiple of 64: products' kernels take so many rows in any case."""
    return power_of_2(num_seqs) if num_seqs <= 64 else ceil_div(num_seqs, 64) * 64


class DecodeGraphs:
    """Runs decode steps of a model: the first of each shape while it is captured, the others by replaying it.

    Every step runs as it is written where the model has a forward of its own, a module has hooks, or something between
    ops computes that cannot be recorded. Other Python inside the modules runs only while a step is captured, and
    parameters are those of that moment. batch_of: BatchMeta, but for what is the same in every step.
    """

    def __init__(
        self, model: LlamaForCausalLM, kv: KVCache, capture: Capture, batch_of: Callable[..., BatchMeta]
    ) -> None:
        self._model, self._kv, self._capture, self._batch_of = model, kv, capture, batch_of
        self._modules = list(model.modules())
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._replayable = type(model) is LlamaForCausalLM

    def take(self, inputs: Inputs) -> bool:
        """Whether `run` computes this step: nothing but decodes, with logits for each token and at most one draw."""
        return (
            self._replayable
            and "forward" not in vars(self._model)
            and inputs.num_decodes == len(inputs.seq_lens)
            and len(inputs.logits_rows) == len(inputs.ids)
            and len({sample.row for sample in inputs.samples}) == len(inputs.samples)
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        )

    def run(self, inputs: Inputs, fill: Callable[[Tensor], None]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [R, V] of a decode step, and tokens and log-probabilities [R] drawn from them as `samples` say.

        To be read before the next step. What no sample is drawn from has a token that means nothing. fill: puts the ids
        in place that only the device knows.
        """
        shape = *self._capture.shape(inputs.num_decodes, len(inputs.page_table[0])), inputs.num_queries
        graph = self._graphs.get(shape)
        if graph is None:
            graph = _Graph(*shape, self._model.device, self._batch_of)
            graph.load(inputs, fill)
            self._replayable = graph.capture(self._capture, self._model, self._kv)
            if self._replayable:
                if len(self._graphs) == LIMIT:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[shape] = graph
        else:
            graph.load(inputs, fill)
            graph.replay()
        rows = len(inputs.ids)
        return graph.logits[:rows], graph.tokens[:rows], graph.logprobs[:rows]


class _Graph:
    """The step of one shape: its inputs' buffers, what computes it, its logits, and the tokens drawn from them."""

    logits: Tensor
    tokens: Tensor
    logprobs: Tensor
    replay: Callable[[], object]

    def __init__(
        self, num_seqs: int, num_pages: int, num_queries: int, device: torch.device, batch_of: Callable[..., BatchMeta]
    ) -> None:
        rows, wide, narrow = num_seqs * num_queries, torch.int64, torch.int32
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "ids": ((rows,), wide),
            "positions": ((rows,), wide),
            "slots": ((rows,), wide),
            "seq_lens": ((num_seqs,), narrow),
            "page_table": ((num_seqs, num_pages), narrow),
        }
        self._buffers = Buffers(wanted | {name: ((rows,), dtype) for name, dtype in DTYPES.items()}, device)
        self._num_seqs = num_seqs  # that the buffers hold numbers of
        given = dict(self._buffers.device)
        self._ids = given.pop("ids")
        self._parameters = {name: given.pop(name) for name in DTYPES}
        self._batch = batch_of(
            **given,
            num_decodes=num_seqs,
            num_queries=num_queries,
            cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=device),
            logits_rows=torch.arange(rows, device=device),
        )

    def capture(self, capture: Capture, model: LlamaForCausalLM, kv: KVCache) -> bool:
        """Compute the loaded step, and whether it can be replayed."""

        def run() -> tuple[Tensor, Tensor, Tensor]:
            logits = model(self._ids, self._batch, kv)
            tokens, logprobs = kernels.sample(logits, **self._parameters)
            return logits, tokens, logprobs

        (self.logits, self.tokens, self.logprobs), replay = capture.capture(run)
        if replay is not None:
            self.replay = replay
        return replay is not None

    def load(self, inputs: Inputs, fill: Callable[[Tensor], None]) -> None:
        """Send a step's numbers to the device."""
        host, num_seqs, width = self._buffers.host, inputs.num_decodes, len(inputs.page_table[0])
        rows = len(inputs.ids)
        for name in ("ids", "positions", "slots"):
            host[name][:rows] = getattr(inputs, name)
        host["seq_lens"][:num_seqs] = inputs.seq_lens
        host["page_table"][:num_seqs, :width] = inputs.page_table
        drawn = [sample.row for sample in inputs.samples]
        where = slice(rows) if drawn == list(range(rows)) else drawn  # by places, 64 rows take 15 us longer
        for name, values in parameters(inputs.samples).items():
            host[name][where] = values
        if num_seqs < self._num_seqs:
            host["slots"][rows:] = PADDING
            host["seq_lens"][num_seqs:] = 0
        self._num_seqs = num_seqs
        self._buffers.send()
        fill(self._ids)
