"""What Triton asks of a GPU's driver, answered without one: to find what it would launch, and to launch nothing."""

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
    """Says what the GPU is. Raises RuntimeError for every other question."""

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
        """What is compiled for."""
        return self._target.triton

    def get_current_device(self) -> str:
        """Triton keeps what it knows of a kernel by this: a name of its own leaves that of real devices alone."""
        return self._name

    def get_current_stream(self, device: Any = None) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where launch code makes its tensors."""
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"launch code asks the driver for {name!r}, and there is no GPU")


class DryDriver(FakeDriver):
    """Also loads compiled kernels, and calls `launch` where a GPU would run one.

    launch: takes the programs on three axes, the stream, the machine code, four things of Triton's own, and then the
    kernel's arguments in order.
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
        """What launches a kernel."""
        return self._launch


@dataclass(frozen=True)
class DryLaunch:
    """One launch as the GPU would get it: the machine code, the programs on each axis, the arguments in order.

    Tensors among the arguments are addresses.
    """

    binary: bytes
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@contextmanager
def active(fake: FakeDriver) -> Iterator[None]:
    """Inside, Triton asks this driver."""
    before = driver._active
    driver.set_active(fake)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def dry_run(target: Target) -> Iterator[list[DryLaunch]]:
    """Inside, kernels are compiled for a target, and launches are appended to the list instead of reaching a GPU.

    Unlike with `record`, all of Triton's host code runs, so it can be timed, and code that launches compiled kernels
    itself can be compared with what Triton does. Tensors are on the CPU.
    """
    launches: list[DryLaunch] = []

    def note(x: int, y: int, z: int, stream: int, binary: bytes, *arguments: Any) -> None:
        plain = tuple(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments[4:])
        launches.append(DryLaunch(binary, (x, y, z), plain))

    with active(DryDriver(target, note)), quiet():
        yield launches
