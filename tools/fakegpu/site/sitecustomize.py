"""Has programs on the fake GPU go on where a value would decide: what was computed is not there to be compared.

Python imports this at its start where its folder is on PYTHONPATH (`python -m tools.fakegpu run` sees to it), in every
child too. Shapes, dtypes and devices are compared as ever.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def patch_torch(torch: ModuleType) -> None:
    """Comparisons of values on the device hold; what reduces to a truth on the host is true."""
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


def watch_steps(graphs: ModuleType) -> None:
    """A replayed step that asks torch or the device for memory, or waits, is a violation."""
    import torch

    runtime = ctypes.CDLL("libcudart.so.13")
    run = graphs.DecodeGraphs.run

    def watched(self: Any, *args: Any) -> Any:
        captured = len(self._graphs)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        result = run(self, *args)
        if len(self._graphs) == captured and torch.cuda.memory_stats()["allocation.all.allocated"] != before:
            runtime.fakegpu_violation(b"an allocation in a replayed step")
        return result

    graphs.DecodeGraphs.run = watched


AFTER_IMPORT = {"torch": patch_torch}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds as Python does, and patches what AFTER_IMPORT names once it has been loaded."""

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
