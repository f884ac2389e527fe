"""A replayed decode step allocates nothing, copies nothing and reads nothing back except, once, its tokens.

Only the runtime's own work counts: an op's implementation on a CPU may allocate inside, and is not watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllama import LLM, SamplingParams
from fastllama.errors import BackendError
from fastllama.kernels.dispatch.op import OPS
from fastllama.runtime.device.graphs import DecodeGraphs
from fastllama.runtime.engine import Engine
from tests.runtime.models import ours, running

CPU = torch.device("cpu")
# On a CPU a tensor's memory is the host's: no dispatcher sees all of these, nor what makes tensors of its numbers.
MADE = {"tensor", "as_tensor"}
READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
PROMPTS = [[5, 3, 8], list(range(20)), [7] * 14]
LENGTHS = [40, 20, 33]


@dataclass
class Seen:
    """The calls outside of ops' implementations, by name, and the number of implementations that ran."""

    allocations: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    num_ops: int = 0


class Watch(TorchDispatchMode):
    """Records allocations, copies and reads to the host inside a `with`; over_ops() leaves out implementations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.inside = 0  # of implementations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and _memory(leaf) not in given:
                    self.seen.allocations.append(str(func))
                elif isinstance(leaf, (int, float)):
                    self.seen.reads.append(str(func))
            if "copy" in str(func):
                self.seen.copies.append(str(func))
        return result

    @contextmanager
    def over_ops(self) -> Iterator[None]:
        """Counts inside a `with` the runs of every bound or recorded op's implementation."""

        def counting(run: Callable[..., Any]) -> Callable[..., None]:
            def counted(*args: Any) -> None:
                self.seen.num_ops += 1
                self.inside += 1
                try:
                    run(*args)
                finally:
                    self.inside -= 1

            return counted

        with ExitStack() as stack:
            for op in OPS.values():
                with suppress(BackendError):  # an op that cannot run here raises when it is called
                    stack.enter_context(op.bound_to(CPU, counting(op.bound(CPU))))
            yield


class Methods(TorchFunctionMode):
    """Records in a Watch's `seen` the functions that read a tensor or make one of the host's numbers."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if not self._watch.inside:
            self._watch.seen.reads.extend({name} & READS)
            self._watch.seen.allocations.extend({name} & MADE)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def answer(llm: LLM) -> list[tuple[int, ...]]:
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in LENGTHS]
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


def seen_of(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The records of each call of a method while requests are answered by decode steps that were captured before."""
    watch, found, call, from_numpy = Watch(), [], getattr(owner, name), torch.from_numpy

    def watching(*args: Any, **kwargs: Any) -> Any:
        watch.seen = Seen()
        with Methods(watch), watch:
            result = call(*args, **kwargs)
        found.append(watch.seen)
        watch.seen = Seen()
        return result

    def making(array: Any) -> Tensor:  # which no mode sees
        if not watch.inside:
            watch.seen.allocations.append("from_numpy")
        return from_numpy(array)

    with watch.over_ops(), running(ours(dtype=torch.float32)) as llm:
        expected, graphs = answer(llm), llm.engine._runner._graphs
        answer(llm)  # with prompts out of the cache, so that one more shape may occur
        before = dict(graphs._graphs)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, watching)
            patch.setattr(torch, "from_numpy", making)
            assert answer(llm) == expected
        assert graphs._graphs == before, "a step was captured, not replayed"
    return found


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_replayed_step_allocates_copies_and_reads_nothing(
    runs_ahead: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Steps launched ahead too, whose ids the step before samples: for the same sequences, and where one has ended."""
    if runs_ahead:
        request.getfixturevalue("ahead")
    found = seen_of(DecodeGraphs, "run", monkeypatch)
    assert len(found) >= max(LENGTHS) - 1
    for seen in found:
        assert seen.num_ops > 10, "no op of the model was replayed"
        assert (seen.allocations, seen.copies, seen.reads) == ([], [], [])


def test_a_step_waits_for_its_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen_of(Engine, "step", monkeypatch)
    assert len(found) == max(LENGTHS)
    for seen in found:
        assert len(seen.reads) <= 1, "the host waited twice"
    assert any(seen.reads for seen in found)
