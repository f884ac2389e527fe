"""Triton drivers without a GPU: they record launches instead of executing them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver

from fastllama.testing.targets import Target
from fastllama.testing.triton_api import quiet

_DRIVERS = itertools.count()


class FakeDriver:
    """Reports the target GPU's properties. Raises RuntimeError for every other request."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._name = f"{type(self).__name__} {target.name}"
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    def _properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": self._target.shared_per_block,
            "max_num_regs": 4 * self._target.registers,
            "multiprocessor_count": self._target.multiprocessors,
            "warpSize": self._target.warp_size,
        }

    def get_current_target(self) -> Any:
        """The compile target."""
        return self._target.triton

    def get_current_device(self) -> str:
        """The key of Triton's caches per kernel; a distinct name leaves those of real devices untouched."""
        return self._name

    def get_current_stream(self, device: Any = None) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The device of tensors that launchers allocate."""
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the launcher needs {name!r} of the driver, and there is no GPU")


class DryDriver(FakeDriver):
    """Also loads compiled kernels, and calls `launch` instead of running them.

    launch: called with the grid's three sizes, the stream, the machine code, four internal values of Triton, and then
    the kernel's arguments in order.
    """

    def __init__(self, target: Target, launch: Callable[..., None]) -> None:
        super().__init__(target)
        self._name += f", {next(_DRIVERS)}"  # a loaded kernel is launched by the driver that loaded it
        self._launch = launch
        self.utils.load_binary = self._load
        self.utils.unload_module = lambda module: None

    def _load(self, name: str, binary: bytes, *unused: Any) -> tuple[Any, ...]:
        return name, binary, 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launch function of a kernel."""
        return self._launch


@dataclass(frozen=True)
class DryLaunch:
    """One launch as a GPU would receive it: machine code, grid, arguments in order, tensors as addresses."""

    binary: bytes
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@contextmanager
def active(fake: FakeDriver) -> Iterator[None]:
    """Makes this Triton's active driver inside the block."""
    before = driver._active
    driver.set_active(fake)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def dry_run(target: Target) -> Iterator[list[DryLaunch]]:
    """Inside the block, kernels are compiled for a target, and launches are appended to the list, not executed.

    Unlike with `record`, all of Triton's host side runs, so that it can be timed, and custom launchers of compiled
    kernels can be compared with Triton's. Tensors are on the CPU.
    """
    launches: list[DryLaunch] = []

    def note(x: int, y: int, z: int, stream: int, binary: bytes, *arguments: Any) -> None:
        plain = tuple(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments[4:])
        launches.append(DryLaunch(binary, (x, y, z), plain))

    with active(DryDriver(target, note)), quiet():
        yield launches
