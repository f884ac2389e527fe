"""Decode steps recorded once for each shape and run again over the same buffers, without the modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels.recording import Recording
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.model import LlamaForCausalLM
from fastllama.runtime.inputs import Inputs

LIMIT = 32  # graphs kept, of some hundred small Python objects each; all share their tensors' memory


class DecodeGraphs:
    """Runs decode steps of a model on a CPU: the first of each shape while it is recorded, the others by replaying it.

    A shape is a number of sequences and the power of two of pages that holds the longest one's. Every step runs as it
    is written where the model has a forward of its own, a module has hooks, or something between ops computes. Other
    Python inside the modules runs only while a step is recorded, and parameters are those of that moment.
    """

    def __init__(
        self, model: LlamaForCausalLM, kv: KVCache, workspace: Tensor | None = None, deterministic: bool = False
    ) -> None:
        self._model, self._kv = model, kv
        self._workspace, self._deterministic = workspace, deterministic
        self._modules = list(model.modules())
        self._memory: list[Tensor] = []
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._replayable = type(model) is LlamaForCausalLM and model.device.type == "cpu"

    def take(self, inputs: Inputs) -> bool:
        """Whether `run` computes this step: nothing but decodes, with a token to draw for each."""
        return (
            self._replayable
            and "forward" not in vars(self._model)
            and inputs.num_decodes == len(inputs.seq_lens) == len(inputs.logits_rows)
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        )

    def run(self, inputs: Inputs) -> Tensor:
        """Logits [B, V] of a decode step, to be read before the next step."""
        shape = (inputs.num_decodes, 1 << (len(inputs.page_table[0]) - 1).bit_length())
        graph = self._graphs.get(shape)
        if graph is not None:
            return graph.replay(inputs)
        graph = _Graph(*shape, self._workspace, self._deterministic)
        logits = graph.record(inputs, self._model, self._kv, self._memory)
        if graph.recording.replayable:
            if len(self._graphs) == LIMIT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[shape] = graph
        else:
            self._replayable = False
        return logits


class _Graph:
    """The step of one shape: its inputs' buffers, its ops, its logits."""

    def __init__(self, num_seqs: int, num_pages: int, workspace: Tensor | None, deterministic: bool) -> None:
        self._ids = torch.zeros(num_seqs, dtype=torch.int64)
        self._batch = BatchMeta(
            positions=torch.zeros(num_seqs, dtype=torch.int64),
            slots=torch.zeros(num_seqs, dtype=torch.int64),
            page_table=torch.zeros(num_seqs, num_pages, dtype=torch.int32),
            seq_lens=torch.zeros(num_seqs, dtype=torch.int32),
            num_decodes=num_seqs,
            cu_seqlens_q=torch.zeros(1, dtype=torch.int32),
            logits_rows=torch.arange(num_seqs),
            workspace=workspace,
            deterministic=deterministic,
        )

    def record(self, inputs: Inputs, model: LlamaForCausalLM, kv: KVCache, memory: list[Tensor]) -> Tensor:
        self._load(inputs)
        with Recording(self._ids.device, memory) as self.recording:
            self._logits = model(self._ids, self._batch, kv)
        return self._logits

    def replay(self, inputs: Inputs) -> Tensor:
        self._load(inputs)
        self.recording.replay()
        return self._logits

    def _load(self, inputs: Inputs) -> None:
        batch, width = self._batch, len(inputs.page_table[0])
        for buffer, values in (
            (self._ids, inputs.ids),
            (batch.positions, inputs.positions),
            (batch.slots, inputs.slots),
            (batch.seq_lens, inputs.seq_lens),
            (batch.page_table[:, :width], inputs.page_table),
        ):
            buffer.copy_(torch.tensor(values))
