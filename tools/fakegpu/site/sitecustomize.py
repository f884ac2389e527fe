"""Lets programs on the fake GPU continue past comparisons of values, and logs the kernels that they compile.

Python imports this at startup if its folder is on PYTHONPATH, in child processes too; `python -m tools.fakegpu run`
sets it. Shapes, dtypes and devices are compared as usual.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def patch_torch(torch: ModuleType) -> None:
    """Comparisons of device values succeed; a device tensor that is read as a bool is True."""
    equal, close, reduced = torch.equal, torch.testing.assert_close, torch.Tensor.all

    def on_device(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_cuda

    def alike(first: Any, second: Any) -> bool:
        return bool(first.shape == second.shape and first.dtype == second.dtype and first.device == second.device)

    def all_equal(first: Any, second: Any) -> bool:
        return alike(first, second) if on_device(first) or on_device(second) else equal(first, second)

    def all_close(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
        if not (on_device(actual) and on_device(expected)):
            close(actual, expected, *args, **options)
        elif not alike(actual, expected):
            raise AssertionError(f"{actual.shape} {actual.dtype} is not like {expected.shape} {expected.dtype}")

    def all_true(self: Any, *args: Any, **options: Any) -> Any:
        result = reduced(self, *args, **options)
        return torch.ones(result.shape, dtype=torch.bool) if self.is_cuda and not result.dim() else result

    torch.equal, torch.testing.assert_close, torch.Tensor.all = all_equal, all_close, all_true
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans with a library that is empty here


def patch_answers(answers: ModuleType) -> None:
    """Answers count as correct if their number and lengths are."""
    compared = answers.compared

    def as_long(found: Any, expected: Any) -> Any:
        right = all(list(map(len, own)) == list(map(len, expected[kind])) for kind, own in found.items())
        return compared({kind: expected[kind] for kind in found}, expected) | {"right": right}

    answers.compared = as_long


def note_compilations(jit: ModuleType) -> None:
    """Log a line for each specialisation of this project's kernels that a process needs."""
    runtime = ctypes.CDLL("libcudart.so.13")
    compile_kernel = jit.JITFunction._do_compile

    def noted(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, *rest: Any
    ) -> Any:
        if self.fn.__module__.startswith("fastllama."):
            usual = vars(self.device_caches[device][3].parse_options({}))
            chosen = {name: value for name, value in vars(options).items() if value != usual[name]}
            known = (self.fn.__module__, self.fn.__qualname__, signature, constants, attrs, chosen)
            runtime.fakegpu_note(f"compile {known!r}".encode())
        return compile_kernel(self, key, signature, device, constants, options, attrs, *rest)

    jit.JITFunction._do_compile = noted


def watch_steps(graphs: ModuleType) -> None:
    """Log a violation if a replayed step allocates memory or waits.

    torch counts over all threads: with several, only calls that reach the device are checked.
    """
    import torch

    runtime = ctypes.CDLL("libcudart.so.13")
    run = graphs.DecodeGraphs._run

    def watched(self: Any, inputs: Any, before: Any, adjusts: bool) -> Any:
        if (*self._shape(inputs), adjusts) not in self._graphs or not torch.cuda.is_initialized():
            return run(self, inputs, before, adjusts)
        alone = {thread.name for thread in threading.enumerate()} <= {threading.current_thread().name, "tqdm_monitor"}
        held = torch.cuda.memory_stats()["allocation.all.allocated"]
        runtime.fakegpu_step(1)
        try:
            return run(self, inputs, before, adjusts)
        finally:
            runtime.fakegpu_step(0)
            if alone and torch.cuda.memory_stats()["allocation.all.allocated"] != held:
                runtime.fakegpu_violation(b"an allocation in a replayed step")

    graphs.DecodeGraphs._run = watched


AFTER_IMPORT = {
    "torch": patch_torch,
    "triton.runtime.jit": note_compilations,
    "fastllama.runtime.device.graphs": watch_steps,
    "benchmarks.gpu.answers": patch_answers,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Import hook that applies the patches of AFTER_IMPORT after a module has loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, AFTER_IMPORT[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)


sys.meta_path.insert(0, _Finder())
