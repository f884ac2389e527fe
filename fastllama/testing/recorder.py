"""Records the kernels that launchers would compile and launch on a GPU that need not be present.

The launchers themselves determine the specialisation: which pointers and integers are multiples of 16, which arguments
are constants, the warps and the stages. Nothing is compiled and nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastllama import env
from fastllama.testing.drivers import FakeDriver, active
from fastllama.testing.targets import Target
from fastllama.testing.triton_api import quiet


@dataclass(frozen=True)
class Launch:
    """One launch of a jit function: its source with specialisation, and the compile options."""

    kernel: str
    target: Target
    source: Any  # triton's ASTSource
    options: Mapping[str, Any]  # of triton.compile: num_warps, num_stages, ...

    def __str__(self) -> str:
        """The kernel with its specialised arguments: `add(x_ptr: *bf16 % 16, n: i32, BLOCK=64)`.

        For tuples, only the elements' types are shown.
        """
        constants = {path[0]: value for path, value in self.source.constants.items() if len(path) == 1}
        hinted = {path[0] for path, hints in self.source.attrs.items() if ["tt.divisibility", 16] in hints}
        arguments = [
            f"{name}={getattr(constants[i], 'value', constants[i])}"
            if i in constants
            else f"{name}: {kind}{' % 16' if i in hinted else ''}"
            for i, (name, kind) in enumerate(self.source.signature.items())
        ]
        return f"{self.kernel}({', '.join(arguments)})"


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Inside the block, a launch of a jit function is appended to the list, and returns None, instead of running.

    Tensors may be on the CPU, on the meta device or fake: only the dtype, the address modulo 16 (for a tensor without
    memory, its offset in its storage) and, for AMD, whether the storage is under 2 GiB, are read. A kernel under
    `triton.autotune` is recorded once for each configuration that its pruning keeps.
    Raises RuntimeError where TRITON_INTERPRET is set: an interpreted kernel cannot be compiled.
    """
    if env.triton_interpret():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted; record launches without it")
    launches: list[Launch] = []
    stock_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        del warmup
        args = tuple(_addressed(value) for value in args)
        kwargs = {name: _addressed(value) for name, value in kwargs.items()}
        self.device_caches[driver.active.get_current_device()]  # creates self.compile, which the next line replaces
        with mock.patch.object(self, "compile", _capture):
            try:
                stock_run(self, *args, grid=grid, warmup=True, **kwargs)
            except _CapturedError as captured:
                launches.append(Launch(self.__name__, target, captured.source, captured.options))

    def run_every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))  # read by pruning
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    with (
        active(FakeDriver(target)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_every_configuration),
        quiet(),
    ):
        yield launches


class _CapturedError(Exception):
    """Leaves Triton's launcher where it would start to compile."""

    def __init__(self, source: Any, options: Mapping[str, Any]) -> None:
        self.source, self.options = source, dict(options)


def _capture(source: Any, target: Any, options: Mapping[str, Any], **unused: Any) -> None:
    raise _CapturedError(source, options)


class _Addressed:
    """A tensor without memory, at the address its storage would have if that began at 0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        """Triton's AMD backend uses this to check whether 32 bits can address the whole storage."""
        return self._bytes


def _addressed(value: Any) -> Any:
    """Wrap tensors without memory: fake tensors raise on data_ptr()."""
    return _Addressed(value) if isinstance(value, FakeTensor) else value
