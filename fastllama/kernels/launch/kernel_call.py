"""Ops from functions that plan launches, and repeated calls with the same launches, without planning.

Planning, and Triton's lookup of the compiled kernel, take 10 to 30 us a launch on the host. A call like an
earlier one (`Likeness`) needs the same kernels with the same numbers: only addresses differ, and are filled in.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.dispatch.backends import Function
from fastllama.kernels.dispatch.fusion import Fusion
from fastllama.kernels.dispatch.isolation import full_precision

ALIGNMENT = 16  # bytes; a kernel compiled for aligned pointers makes 128-bit accesses, and must not get others


class KernelCall:
    """One launch: a jit function, the programs on each axis, its arguments and options (num_warps, ...) by name.

    A pointer `x_ptr` takes the op's argument `x`, or another argument of the op itself, or a part of its `workspace`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        self.kernel, self.grid, self.arguments = kernel, grid, arguments

    def launch(self) -> Any:
        """Launch; returns the compiled kernel, or None in the interpreter.

        `a * b + c` is rounded once, whatever TRITON_DEFAULT_FP_FUSION and Triton's default, which changes in 3.10.
        """
        return self.kernel[self.grid](**self.arguments, enable_fp_fusion=True)


class VendorMatmul:
    """out = x @ weight^T (+ bias) in torch, among launches: for many rows, where the vendor's library is the fastest.

    x: [M, K], weight: [N, K], bias: [N] or None, out: [M, N]; one dtype. Summed in fp32 without TF32, whatever the
    process allows: torch's default lets cuBLAS reduce splits of K in 16 bits.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self.x, self.weight, self.bias, self.out = x, weight, bias, out

    def launch(self) -> None:
        """Run it. Returns nothing to repeat: many rows hide the time of planning."""
        with full_precision(self.x.device.type):
            if self.bias is None:
                torch.mm(self.x, self.weight.T, out=self.out)
            else:
                torch.addmm(self.bias, self.x, self.weight.T, out=self.out)


Plan = Callable[..., Sequence[KernelCall | VendorMatmul]]


def launcher(plan: Plan) -> Function:
    """An op's implementation in out-form, from a function that plans its launches and takes one Fusion for its fields.

    What `plan` returns may depend only on the call's Likeness and on addresses modulo ALIGNMENT (not of pointers that a
    kernel does not specialise on). The implementation returns a function that runs calls like this one, or None in the
    interpreter and where a launch takes memory that is not the op's.
    """
    names = list(inspect.signature(plan).parameters)
    place = names.index("fusion") if "fusion" in names else None
    if place is not None:
        names[place : place + 1] = Fusion._fields

    @functools.wraps(plan)
    def run(*args: Any) -> Function | None:
        given = args
        if place is not None:
            end = place + len(Fusion._fields)
            given = *args[:place], Fusion(*args[place:end]), *args[end:]
        calls = plan(*given)
        kernels = [call.launch() for call in calls]
        steps = []
        for call, kernel in zip(calls, kernels, strict=True):
            if isinstance(call, VendorMatmul) or kernel is None:
                return None
            step = _step(call, kernel, names, args)
            if step is None:
                return None
            steps.append(step)
        return _repeat(run, steps)

    return run


def scratch(
    workspace: Tensor | None, size: int, dtype: torch.dtype, device: torch.device, given: str = "tensors"
) -> Tensor:
    """The workspace, allocated if None. Raises ValueError if it has fewer than `size` elements."""
    if workspace is None:
        return torch.empty(size, dtype=dtype, device=device)
    if workspace.numel() < size:
        raise ValueError(f"workspace has {workspace.numel()} elements; legal for these {given}: at least {size}")
    return workspace


@dataclass(frozen=True)
class _Step:
    """One launch of a compiled kernel.

    launch: takes the kernel's arguments in order. values: the arguments, None for pointers. pointers: the place of
    each, the op's argument that it points into, and the byte there. aligned: the op's arguments that must be aligned.
    """

    launch: Callable[..., None]
    values: list[Any]
    pointers: list[tuple[int, int, int]]
    aligned: set[int]


def _step(call: KernelCall, kernel: Any, names: Sequence[str], args: Sequence[Any]) -> _Step | None:
    values: list[Any] = []
    pointers = []
    aligned = set()
    for place, name in enumerate(call.kernel.arg_names):
        value = call.arguments[name]
        if isinstance(value, Tensor):
            source = _source(name, value, names, args)
            if source is None:
                return None
            if not call.kernel.params[place].do_not_specialize:
                if value.data_ptr() % ALIGNMENT or source[1] % ALIGNMENT:
                    return None
                aligned.add(source[0])
            pointers.append((place, *source))
            value = None
        values.append(value)
    return _Step(kernel[(*call.grid, 1, 1)[:3]], values, pointers, aligned)


def _repeat(run: Function, steps: Sequence[_Step]) -> Function:
    """A function that launches the steps with the op's arguments, or calls `run` if an address is misaligned."""
    aligned = sorted(set[int]().union(*(step.aligned for step in steps)))
    used = aligned + sorted({source for step in steps for _, source, _ in step.pointers}.difference(aligned))
    plain = [
        (step.launch, step.values, [(place, used.index(source), byte) for place, source, byte in step.pointers])
        for step in steps
    ]

    def again(*args: Any) -> None:
        addresses = [args[source].data_ptr() for source in used]
        for address in addresses[: len(aligned)]:
            if address % ALIGNMENT:
                run(*args)
                return
        for launch, values, pointers in plain:
            arguments = values.copy()  # another thread may run the same function
            for place, source, byte in pointers:
                arguments[place] = addresses[source] + byte
            launch(*arguments)

    return again


def _source(name: str, value: Tensor, names: Sequence[str], args: Sequence[Any]) -> tuple[int, int] | None:
    """The place of the op's argument that a kernel's pointer `name` points into, and the byte there; or None."""
    for place, arg in enumerate(args):
        if arg is value:
            return place, 0
    address = value.data_ptr()
    for own in (name.removesuffix("_ptr"), "workspace"):
        if own in names:
            place = names.index(own)
            arg = args[place]
            if arg is not None and 0 <= (distance := address - arg.data_ptr()) < max(arg.nbytes, 1):
                return place, distance
    return None
