"""The implementations of one function, and the selection of one for a device."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastllama import env
from fastllama.errors import NOT_INSTALLED, BackendError, summary, why_unusable
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.dispatch.isolation import in_full_precision

logger = logging.getLogger("fastllama")
Function = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """An op's implementation on a device type: "triton", "numba", "cpu" or "reference", with the reason."""

    backend: str
    run: Function
    reason: str


@dataclass(frozen=True)
class Kernels:
    """One compiler's kernels for an op. All fields but `run` are for Triton's matmuls alone.

    run: takes the outputs as arguments. It may return a function, which replaces it for later calls of this Likeness.
    workspace_size: elements of scratch memory, from the arguments of the op's `..._workspace`.
    few_rows: the most rows of x that are batch-invariant, from x and the weight.
    fuses: the part of a Fusion that `run` computes itself, from the op's arguments before it and the Fusion.
    """

    run: Function
    workspace_size: Callable[..., int] | None = None
    few_rows: Callable[..., int] | None = None
    fuses: Callable[..., Fusion] | None = None


Table = Callable[[], Mapping[str, Kernels]]
_unusable: dict[Table, str] = {}  # tables of kernels that cannot be imported, with the reason


def _why_unusable(compiler: str, table: Table) -> str | None:
    """Why a compiler's kernels cannot be used: NOT_INSTALLED, or the error of importing them; None if they can.

    Tried and logged once. An installed Numba may be too old for NumPy, or lack a writable cache folder.
    """
    if table not in _unusable:
        why = why_unusable(compiler.lower())
        if why is None:
            try:
                table()
            except Exception as error:
                why = summary(error)
        if why is None or why == NOT_INSTALLED:
            return why
        _unusable[table] = f"cannot be used: {why}"
        logger.warning("%s %s; its kernels are replaced by others", compiler, _unusable[table])
    return _unusable[table]


class Backends:
    """A function with a reference and optional implementations in torch ops for CPUs, in Numba and in Triton.

    reference: the function of the same name in kernels/reference; its matmuls run in full precision.
    cpu: a faster one for CPU tensors. numba, triton: return a compiler's table of kernels by name; called on first use,
    so that both packages stay optional.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Function,
        cpu: Function | None = None,
        numba: Table | None = None,
        triton: Table | None = None,
    ) -> None:
        self.name = name
        self._reference = in_full_precision(reference)
        self._cpu, self._numba, self._triton = cpu, numba, triton

    @property
    def has_triton(self) -> bool:
        """Whether there is a Triton kernel."""
        return self._triton is not None

    def implementation(self, device: str) -> Implementation:
        """The implementation that FASTLLAMA_BACKEND and a device type ("cpu", "cuda", ...) select.

        Raises BackendError when the variable selects a Triton kernel that exists but cannot run here.
        """
        wanted = env.BACKEND.read()
        if wanted == "reference":
            return Implementation("reference", self._run_reference, "FASTLLAMA_BACKEND=reference")
        if wanted == "triton" and self.has_triton:
            return Implementation("triton", self.launcher(device), "FASTLLAMA_BACKEND=triton")
        chosen = self.implementations(device)[0]
        if wanted == "triton" and device != "cuda":  # on CUDA that is the reason already
            return replace(chosen, reason=f"no Triton kernel yet; {chosen.reason}")
        return chosen

    def implementations(self, device: str) -> list[Implementation]:
        """All implementations for a device type, in order of preference; the reference is last."""
        found = []
        missing = f"no kernels for {device}"
        if device == "cpu":
            why = NOT_INSTALLED if self._numba is None else _why_unusable("Numba", self._numba)
            broken = "" if why in (None, NOT_INSTALLED) else f"; Numba {why}"
            if self._numba is not None and why is None:
                run = self._whole(self._numba()[self.name])
                found.append(Implementation("numba", run, "tensors on cpu, Numba is installed"))
            if self._cpu is not None:
                found.append(Implementation("cpu", self._whole(Kernels(self._cpu)), f"tensors on cpu{broken}"))
            missing = f"tensors on cpu; the reference is the CPU backend{broken}"
        elif device == "cuda":
            if self.has_triton:
                found.append(Implementation("triton", self.launcher(device), "tensors on cuda"))
            missing = "no Triton kernel yet"
        return [*found, Implementation("reference", self._run_reference, missing)]

    def launcher(self, device: str) -> Function:
        """The function that launches the Triton kernels. Raises BackendError where they cannot run."""
        return self._whole(self._triton_kernels(device))

    def _triton_kernels(self, device: str) -> Kernels:
        assert self._triton is not None, f"op {self.name} has no Triton kernel"
        if importlib.util.find_spec("triton") is None:
            raise BackendError(
                f"op {self.name} needs Triton on {device}: pip install triton, or set FASTLLAMA_BACKEND=reference"
            )
        if device == "cpu" and not env.triton_interpret():
            raise BackendError(
                f"op {self.name}: Triton kernels run on CPU tensors only in the interpreter; set TRITON_INTERPRET=1"
            )
        why = _why_unusable("Triton", self._triton)
        if why is not None:
            raise BackendError(f"op {self.name}: Triton {why}; legal without it: FASTLLAMA_BACKEND=reference")
        return self._triton()[self.name]

    def _whole(self, kernels: Kernels) -> Function:
        """The function that runs a whole call by these kernels, which may compute only a part of it."""
        return kernels.run

    def _run_reference(self, *args: Any) -> Any:
        return self._reference(*args)
