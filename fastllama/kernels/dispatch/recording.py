"""Ops called in a row, noted once and run again: what a CUDA graph is on a GPU, for implementations on the host.

A decode step calls two hundred ops whose arguments never change but for what the tensors hold. Running the noted
implementations saves all else between them: modules, views, allocations and checks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.errors import BackendError
from fastllama.kernels.dispatch.backends import Function
from fastllama.kernels.dispatch.op import OPS

_ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}
_LOCK = threading.Lock()  # each recording replaces what runs an op, and puts back what it found
T = TypeVar("T")


def record(run: Callable[[], T], device: torch.device, memory: list[Tensor]) -> tuple[T, Recording]:
    """What `run` returns, and the recording of it; recordings of several threads wait for each other."""
    recording = Recording(device, memory)
    with _LOCK:
        try:
            with recording:
                return run(), recording
        except BaseException:
            recording.close()  # Ctrl-C on the way out of a `with` skips its __exit__
            raise


class Recording(TorchDispatchMode):
    """Notes every op that this thread runs on `device` inside a `with`; `replay()` runs them again on the same tensors.

    memory: buffers, grown as needed, that the tensors allocated inside take theirs from; recordings that never run at
    the same time may share them. Only what ops compute is noted: `replayable` is False where anything but views and
    allocations ran between them.
    """

    def __init__(self, device: torch.device, memory: list[Tensor]) -> None:
        super().__init__()
        self.replayable = True
        self._device, self._memory = device, memory
        self._calls: list[tuple[Function, tuple[Any, ...]]] = []
        self._allocations = 0
        self._depth = 0  # of ops: what an implementation does itself is repeated by running it
        self._stack = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch: saying yes imports its compiler, 0.9 s at the first step of every process."""
        return False

    def __enter__(self) -> Recording:
        owner = threading.get_ident()
        with ExitStack() as stack:
            for op in OPS.values():
                with suppress(BackendError):  # an op that cannot run here says so when it is called
                    stack.enter_context(op.bound_to(self._device, self._noting(op.bound(self._device), owner)))
            super().__enter__()
            stack.push(super().__exit__)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Note no more. May be called twice."""
        self._stack.close()

    def replay(self) -> None:
        """Run the ops again, in order. Raises what they raise."""
        assert self.replayable
        for run, args in self._calls:
            run(*args)

    def _noting(self, run: Function, owner: int) -> Function:
        def note(*args: Any) -> None:
            if threading.get_ident() != owner or self._depth:  # an op within an op
                run(*args)
                return
            self._depth += 1
            try:
                run(*args)
            finally:
                self._depth -= 1
            self._calls.append((run, args))

        return note

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth or func.is_view:
            return result
        if func in _ALLOCATIONS:
            return self._placed(result)
        self.replayable = False
        return result

    def _placed(self, wanted: Tensor) -> Tensor:
        """A tensor like `wanted`, fresh and contiguous, in the next buffer."""
        place, self._allocations = self._allocations, self._allocations + 1
        if place == len(self._memory):
            self._memory.append(wanted.new_empty(0, dtype=torch.uint8))
        if self._memory[place].numel() < wanted.nbytes:
            self._memory[place] = wanted.new_empty(wanted.nbytes, dtype=torch.uint8)
        return self._memory[place][: wanted.nbytes].view(wanted.dtype).view(wanted.shape)
