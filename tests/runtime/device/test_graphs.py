"""Recorded decode steps give the same logits bit for bit, run modules once per shape, and never replay a wrong step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from fastllama import LLM, LlamaForCausalLM, SamplingParams
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.dispatch.recording import Recording
from fastllama.layers.batch import BatchMeta
from fastllama.layers.block import LlamaMLP
from fastllama.runtime.device import capture, graphs, runner
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.planning.inputs import Inputs
from fastllama.runtime.planning.step import Step
from tests.runtime.models import ours, running

PROMPTS = [[5, 3, 8], list(range(20)), [7] * 14]
LENGTHS = [60, 20, 33]  # a page has 16 tokens, so tables grow from two pages to four while requests end


def params(length: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def logits_of_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every step of three requests of different lengths."""
    found, run = [], Runner.run

    def spying(self: Runner, step: Step, *before: Any) -> Any:
        result = run(self, step, *before)
        found.append(result.logits.clone())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", spying)
        llm.generate(PROMPTS, [params(length) for length in LENGTHS])
    return found


def nothing(*args: Any) -> None:
    """A hook without effect but that steps run as written."""


class Counting:
    """Counts the runs of the first MLP."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM) -> None:
        self.runs = 0
        first, forward = model.layers[0].mlp, LlamaMLP.forward

        def counting(mlp: LlamaMLP, *args: Any) -> Tensor:
            self.runs += mlp is first
            return forward(mlp, *args)

        monkeypatch.setattr(LlamaMLP, "forward", counting)


class StandIn:
    """Stands for torch.cuda's graphs on a CPU: nothing is computed while it captures."""

    def __init__(self, failing: int | None = None) -> None:
        """failing: the number of the capture that cannot be ended."""
        self.memory: list[UntypedStorage] = []  # which all graphs share
        self.captured: list[int] = []  # ops of each
        self.replays = 0
        self.failing = failing
        self.abandoned: list[str] = []  # what was called to take a failed capture back

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in = self

        class CUDAGraph:
            recording: Recording
            ended = False

            def pool(self) -> str:
                if not self.ended:
                    raise RuntimeError("no capture has ended")
                return "pool"

            def replay(self) -> None:
                stand_in.replays += 1
                self.recording.replay()

        @contextmanager
        def capturing(graph: CUDAGraph, pool: str, capture_error_mode: str) -> Iterator[None]:
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            try:
                with Noting(torch.device("cpu"), stand_in.memory) as graph.recording:
                    yield
            finally:
                if len(stand_in.captured) == stand_in.failing:
                    raise RuntimeError("a previous error during capture")
                graph.ended = True
            assert graph.recording.replayable, "something computed that is no op"
            stand_in.captured.append(len(graph.recording._calls))
            for buffer in stand_in.memory:
                buffer.fill_(0xFF)  # NaN

        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", capturing)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", [Numbers(stand_in)])
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):

            def calling(device: int, pool: str, name: str = name) -> None:
                assert (device, pool) == (0, "pool")
                stand_in.abandoned.append(name)

            monkeypatch.setattr(torch._C, name, calling, raising=False)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, nullcontext)
        monkeypatch.setattr(
            runner, "RecordingCapture", lambda device: capture.GraphCapture(device, max_pages=16)
        )  # 256 tokens


class Numbers:
    """A device's generator, whose state a capture that did not end has spoilt."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def clone_state(self) -> str:
        return "as it was"

    def graphsafe_set_state(self, state: str) -> None:
        self._stand_in.abandoned.append(f"random numbers {state}")


class Noting(Recording):
    """Runs no op that it notes."""

    def _note(self, op: Op, args: tuple[Any, ...]) -> None:
        self._calls.append((op.bound(torch.device("cpu")), args))


def test_a_gpus_graphs_are_of_padded_batches_and_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-identical to eager steps: matmuls reduce in one order whatever the number of rows."""
    stand_in = StandIn()
    with running(ours("biases", dtype=torch.float32), deterministic=True) as llm:
        llm.engine.model.layers[0].register_forward_hook(nothing)
        written = logits_of_steps(llm, monkeypatch)
    with monkeypatch.context() as patch:
        stand_in.install(patch)
        with running(ours("biases", dtype=torch.float32), deterministic=True) as llm:
            pages = [layer.k_pages for layer in llm.engine._runner.kv.layers]
            for held in pages:
                held.fill_(1e30)  # what padding must not read
            replayed = logits_of_steps(llm, patch)
    assert len(stand_in.captured) == 3  # of 1, 2 and 4 rows; the first while warming up
    assert stand_in.replays == max(LENGTHS) - 1 - 2  # without the prompts' step, and two that were captured
    for ours_, theirs in zip(replayed, written, strict=True):
        assert torch.equal(ours_, theirs)


def test_prompts_are_not_captured_whose_every_row_has_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length would be a graph of its own, captured while its request waits."""
    stand_in = StandIn()
    stand_in.install(monkeypatch)
    with running(ours("biases", dtype=torch.float32), deterministic=True) as llm:
        llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, prompt_logprobs=0))
    assert len(stand_in.captured) == 1  # of one row, while warming up


def test_page_tables_are_of_one_width_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is launched by it, in a graph and out of one."""
    widths, forward = set(), LlamaForCausalLM.forward

    def watching(self: LlamaForCausalLM, ids: Tensor, batch: BatchMeta, *args: Any) -> Tensor:
        widths.add(batch.page_table.shape[1])
        return forward(self, ids, batch, *args)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watching)
    StandIn().install(monkeypatch)
    with running(ours("biases", dtype=torch.float32)) as llm:
        llm.generate(PROMPTS, [params(length) for length in LENGTHS])
    assert widths == {16}


@pytest.mark.parametrize(
    ("num_seqs", "rows"), [(1, 1), (2, 2), (3, 4), (8, 8), (33, 64), (64, 64), (65, 128), (128, 128), (129, 192)]
)
def test_buckets(num_seqs: int, rows: int) -> None:
    assert capture.bucket(num_seqs) == rows


def test_a_row_that_a_batch_leaves_is_padding_again() -> None:
    """No owned slot is written to, and none is read."""
    graph = graphs._Graph(4, 2, 1, torch.device("cpu"), BatchMeta, None)

    def load(num_seqs: int) -> BatchMeta:
        numbers = list(range(1, num_seqs + 1))
        tables = [[1, 1]] * num_seqs
        graph.load(
            Inputs(
                ids=numbers,
                positions=numbers,
                slots=numbers,
                page_table=tables,
                seq_lens=numbers,
                num_decodes=num_seqs,
                num_queries=1,
                cu_seqlens_q=[0],
                logits_rows=numbers,
                unknown=[],
                samples=[],
                prompts=[],
            ),
            None,
        )
        return graph._batch

    assert (load(3).slots.tolist(), load(3).seq_lens.tolist()) == ([1, 2, 3, -1], [1, 2, 3, 0])
    assert (load(4).slots.tolist(), load(4).seq_lens.tolist()) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert (load(1).slots.tolist(), load(1).seq_lens.tolist()) == ([1, -1, -1, -1], [1, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["mha", "gqa tied", "biases"])
def test_replayed_logits_are_those_of_the_modules(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ours(shape, dtype=dtype)) as llm:
        replayed = logits_of_steps(llm, monkeypatch)
    with running(ours(shape, dtype=dtype)) as llm:
        llm.engine.model.layers[0].register_forward_hook(nothing)
        written = logits_of_steps(llm, monkeypatch)
    assert len(replayed) == len(written) == max(LENGTHS)
    for ours_, theirs in zip(replayed, written, strict=True):
        assert torch.equal(ours_, theirs)


def test_the_modules_run_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    counting = Counting(monkeypatch, model)
    with running(model) as llm:
        counting.runs = 0
        logits_of_steps(llm, monkeypatch)
        # the prompts; then sequences and pages: 3 of 2 and of 4, 2 of 4, 1 of 4
        assert counting.runs == 1 + 4
        logits_of_steps(llm, monkeypatch)
        assert counting.runs == 1 + 4 + 1


def test_a_hook_sees_every_step_whenever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ours()) as llm:
        llm.generate([1, 2], params(5))
        seen = []
        handle = llm.engine.model.lm_head.register_forward_hook(lambda *args: seen.append(None))
        llm.generate([1, 2], params(5))
        assert len(seen) == 5
        handle.remove()
        llm.generate([1, 2], params(5))
        assert len(seen) == 5


def test_a_module_that_computes_is_run_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched forward that computes would be missing from a replay."""
    model, forward = ours(), LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, *args: forward(mlp, *args) * 1.5)
    counting = Counting(monkeypatch, model)
    with running(model) as llm:
        counting.runs = 0
        llm.generate([1, 2], params(5))
    assert counting.runs == 5


def test_a_model_with_its_own_forward_is_run_each_time() -> None:
    class Own(LlamaForCausalLM):
        runs = 0

        def forward(self, *args: Any) -> Tensor:
            self.runs += 1
            return super().forward(*args)

    model = ours(kind=Own)
    assert isinstance(model, Own)
    with running(model) as llm:
        model.runs = 0
        llm.generate([1, 2], params(5))
    assert model.runs == 5


def test_a_step_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is run again in halves, and no replay ends where it did."""
    forward, runs, fails = LlamaMLP.forward, [0], len(ours().layers) + 2  # in the first decode

    def failing(mlp: LlamaMLP, *args: Any) -> Tensor:
        runs[0] += 1
        if runs[0] == fails:
            raise MemoryError
        return forward(mlp, *args)

    with running(ours()) as llm:
        expected = llm.generate(PROMPTS, params(5))
    with running(ours()) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", failing)
            found = [llm.generate(PROMPTS, params(5))]
        assert runs[0] > fails
        found.append(llm.generate(PROMPTS, params(5)))
        graphs = llm.engine._runner._graphs._graphs
        assert len(graphs) > 1
        assert all(hasattr(graph, "replay") for graph in graphs.values()), "or such a step would fail each time"
    for outputs in found:
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture.RecordingCapture, "limit", 2)
    with running(ours()) as llm:
        expected = logits_of_steps(llm, monkeypatch)
        again = logits_of_steps(llm, monkeypatch)
        assert len(llm.engine._runner._graphs._graphs) == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_the_graph_that_was_used_longest_ago_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture.RecordingCapture, "limit", 2)
    with running(ours()) as llm:
        held = llm.engine._runner._graphs._graphs
        for num_seqs in (2, 1, 3):  # one was captured while warming up
            llm.generate([[1, 2]] * num_seqs, params(3))
        assert [shape[0] for shape in held] == [1, 3]


def held(llm: LLM) -> int:
    """Bytes of all that recorded steps write to but for pages and their own inputs."""
    runner = llm.engine._runner
    assert isinstance(runner._capture, capture.RecordingCapture)
    memory, graphs = runner._capture._memory, runner._graphs._graphs.values()
    others = [*llm.engine.model.parameters(), llm.engine._runner.cos_sin]
    others += [tensor for layer in runner.kv.layers for tensor in layer.tensors()]
    others += [tensor for graph in graphs for tensor in (*graph._buffers.device.values(), graph._batch.logits_rows)]
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    recordings = [each for each in gc.get_objects() if issubclass(type(each), Recording) and each._memory is memory]
    assert len(recordings) == len(graphs) > 1
    tensors = [arg for each in recordings for _, args in each._calls for arg in args if isinstance(arg, Tensor)]
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in found.items() if place not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recordings_take_the_memory_of_the_largest_whatever_the_order(dtype: torch.dtype) -> None:
    """Each still computes its own result after a larger one was made: in place, the shared memory has moved."""
    taken, answers = [], []
    for sizes in (list(range(1, 17)), list(range(16, 0, -1)), [7, 16, 2, 11, 1, 16]):
        with running(ours(dtype=dtype)) as llm:
            for size in sizes:
                llm.generate([[3, 5 + i] for i in range(size)], params(3))
            taken.append(held(llm))
            answers.append([o.outputs for i in (1, 4, 16, 2) for o in llm.generate([[3, 5 + i]] * i, params(3))])
            assert held(llm) == taken[-1], "a step that was recorded takes no more"
    with running(ours(dtype=dtype)) as llm:
        llm.generate([[3, 5 + i] for i in range(16)], params(3))
        most = held(llm)
        llm.engine.model.layers[0].register_forward_hook(nothing)
        written = [o.outputs for i in (1, 4, 16, 2) for o in llm.generate([[3, 5 + i]] * i, params(3))]
    assert answers == [written] * 3
    assert len(set(taken)) == 1
    assert most <= taken[0] <= 1.1 * most, "what 16 sequences alone take"


def test_modules_are_those_of_the_layers() -> None:
    """The hooks looked for are those of nn.Module: a new kind there would have to be looked for too."""
    kinds = {name for name in vars(nn.Module()) if "forward" in name and name.endswith("hooks")}
    assert kinds == {"_forward_hooks", "_forward_pre_hooks"}
