"""Records a sequence of op calls and replays it: the counterpart of a CUDA graph for implementations on the host.

A decode step calls two hundred ops whose arguments never change, except for the values of the tensors. Replaying the
implementations skips everything between them: modules, views, allocations and checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fastllama.kernels.dispatch.backends import Function
from fastllama.kernels.dispatch.isolation import without_autocast
from fastllama.kernels.dispatch.op import OPS, Op

_ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}
T = TypeVar("T")


def record(run: Callable[[], T], device: torch.device, memory: list[UntypedStorage]) -> tuple[T, Recording]:
    """Record `run()`. Returns its result and the recording."""
    recording = Recording(device, memory)
    try:
        with recording:
            recording.result = result = run()
        return result, recording
    except BaseException:
        recording.close()
        raise


class Recording(TorchDispatchMode):
    """Records the ops that this thread runs on `device` inside a `with`; `replay()` repeats them on these tensors.

    memory: a pool of buffers for the tensors that are allocated inside. Recordings that never run at the same time may
    share it: buffers grow in place, so that all recordings together take the memory of the largest.
    Only the ops themselves are recorded, not what their implementations call: `replayable` is False if anything but
    views and allocations ran between them.
    """

    def __init__(self, device: torch.device, memory: list[UntypedStorage]) -> None:
        super().__init__()
        self.replayable = True
        self.result: Any = None  # of the recorded function; see `record`
        self._device, self._memory = device, memory
        self._calls: list[tuple[Function, tuple[Any, ...]]] = []
        self._allocations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """A hook of torch: True would import its compiler, 0.9 s at the first step of every process."""
        return False

    def close(self) -> None:
        """Stop recording, if Ctrl-C at the end of the `with` skipped `__exit__`."""
        if self in _get_current_dispatch_mode_stack():
            super().__exit__(None, None, None)

    def replay(self) -> Any:
        """Run the ops again, in order, on the same tensors, and return the recorded result. Raises as the ops do."""
        assert self.replayable
        without_autocast(self._run)()
        return self.result

    def _run(self) -> None:
        for run, args in self._calls:
            run(*args)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "fastllama" and args[0].device == self._device:
            self._note(OPS[func._opname], args)
            return None
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            return self._placed(result)
        if not func.is_view:
            self.replayable = False
        return result

    def _note(self, op: Op, args: tuple[Any, ...]) -> None:
        op.run_apart(args)
        self._calls.append((op.bound(self._device), args))

    def _placed(self, wanted: Tensor) -> Tensor:
        """A tensor like `wanted`, which is newly allocated and contiguous, in the next buffer."""
        place, self._allocations = self._allocations, self._allocations + 1
        if place == len(self._memory):
            self._memory.append(wanted.new_empty(0).untyped_storage())
        storage = self._memory[place]
        if storage.nbytes() < wanted.nbytes:
            storage.resize_(wanted.nbytes)  # in place: the tensors of other recordings follow
        return wanted.new_empty(0).set_(storage, 0, wanted.shape, wanted.stride())
