"""Binds the implementations of one op, picks one by the tensors' device, and makes it opaque to torch.compile.

Every implementation writes into tensors its caller passes and allocates no result: so an op aliases nothing, needs no
fake beyond "no result", and can be captured in a CUDA graph. Eager calls go straight to it: the dispatcher costs 2 us a
call, and up to 35 us where `custom_op` registers instead of `torch.library.Library`, more than many of the kernels
themselves. A call like an earlier one is not checked again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastllama import env
from fastllama.errors import BackendError, check_device
from fastllama.kernels.dispatch.likeness import Likeness

Function = Callable[..., Any]

_MOST_KNOWN = 64  # calls remembered of an op: a layer makes five kinds of one at most, each prompt length adds as many

_LIBRARY = torch.library.Library("fastllama", "FRAGMENT")  # kept alive: its ops die with it
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Implementation:
    """What runs an op on one kind of device: "triton", "numba", "cpu" or "reference"; `reason` says why."""

    backend: str
    run: Function
    reason: str


class Op:
    """One op in its out-form.

    schema: torch's schema language, "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()". Outputs come
    last and are (a!) and (b!); inputs that are updated in place are (c!) and on. Scratch memory comes after them,
    `Tensor(c!)? workspace`: a launcher that needs some allocates it when None, and only then allocates anything.
    check: takes the arguments and raises for what is not legal; devices are checked here. Whether a call is legal must
    depend on nothing but its Likeness.
    reference: the function of the same name in kernels/reference; takes everything but the outputs and returns them.
    cpu: faster implementation for CPU tensors, in out-form; None when the reference is the CPU backend.
    numba: "module:launcher" under kernels/numba, in out-form, for CPU tensors where the extra [cpu] is installed.
    triton: "module:launcher" under kernels/triton, in out-form; imported when first needed, so Triton stays optional.
    around: makes an implementation of what `cpu` and `numba` name, where these do a part of the op.

    An implementation may return a function, which then runs the calls that are like this one in its place.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        reference: Callable[..., Any],
        cpu: Function | None = None,
        numba: str | None = None,
        triton: str | None = None,
        around: Callable[[Function], Function] | None = None,
    ) -> None:
        self.name, parameters = schema.removesuffix(") -> ()").split("(", 1)
        kinds, names = zip(*(parameter.rsplit(" ", 1) for parameter in parameters.split(", ")), strict=True)
        is_output = [kind.startswith(("Tensor(a!)", "Tensor(b!)")) for kind in kinds]
        self.num_outputs = sum(is_output)
        self._inputs = is_output.index(True) if self.num_outputs else len(kinds)
        self.names = names
        self._tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        self._check, self._reference = check, reference
        self._cpu, self._numba, self._triton = cpu, numba, triton
        self._around = functools.cache(around or _as_it_is)
        self._bound: dict[torch.device, Function] = {}
        self._second = self._tensors[1]
        self._known: dict[tuple[int, int], tuple[Likeness, Function]] = {}  # by the first two tensors' sizes
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self._dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastllama::{self.name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        self._opaque = getattr(torch.ops.fastllama, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> None:
        if is_compiling():
            self.check(args)
            self._opaque(*args)
            return
        sizes = args[0].numel(), args[self._second].numel()
        known = self._known.get(sizes)
        if known is None or not known[0](args) or (known[0].requires_grad and is_grad_enabled()):
            self._run_unknown(sizes, args)
        else:
            known[1](*args)

    def _run_unknown(self, sizes: tuple[int, int], args: tuple[Any, ...]) -> None:
        """Check a call, run it and remember what runs those like it."""
        known = self._known  # which `bound_to` replaces: what runs now is remembered there or nowhere
        self.check(args)
        run = self.bound(args[0].device)
        run = run(*args) or run
        like = Likeness(args, self._tensors)
        if like.plain:
            if len(known) == _MOST_KNOWN:
                known.clear()
            known[sizes] = like, run

    def check(self, args: tuple[Any, ...]) -> None:
        """Raise for what is not legal."""
        self._check(*args)
        device = args[0].device
        for i in self._tensors:
            if args[i] is not None and args[i].device != device:
                check_device(self.names[i], args[i], self.names[0], args[0])
        if is_grad_enabled():
            for i in self._tensors:
                if args[i] is not None and args[i].requires_grad:
                    raise RuntimeError(
                        f"{self.names[i]} requires grad, and op {self.name} has no backward: "
                        "call it under torch.inference_mode() or torch.no_grad()"
                    )

    def _dispatched(self, *args: Any) -> None:
        self.bound(args[0].device)(*args)

    def bound(self, device: torch.device) -> Function:
        """What runs the op on a device, in out-form: chosen once, at the first call. Raises BackendError."""
        if device not in self._bound:
            run = self.implementation(device.type).run
            if device.type == "cuda" and torch.cuda.device_count() > 1:
                run = _on(device.index, run)
            self._bound.setdefault(device, run)
        return self._bound[device]

    @contextmanager
    def bound_to(self, device: torch.device, run: Function) -> Iterator[None]:
        """Within, `run` runs the op on a device: for measurements, recordings and tests."""
        bound = self._bound
        self._bound, self._known = bound | {device: run}, {}
        try:
            yield
        finally:
            self._bound, self._known = bound, {}

    def alone(self, device: torch.device, *args: Any) -> int:
        """Rows up to which none changes a bit of another's result: what `few_rows(*args)` beside the launcher says.

        One where another implementation runs, or the launcher's kernel takes none.
        """
        if self.implementation(device.type).backend != "triton":
            return 1
        assert self._triton is not None
        return max(_load("triton", f"{self._triton.split(':')[0]}:few_rows")(*args), 1)

    def workspace(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Tensor:
        """Zeros on a device: as many as `workspace_size(*args)` beside the Triton launcher says.

        None where another implementation runs.
        """
        size = 0
        if self.implementation(device.type).backend == "triton":
            assert self._triton is not None
            size = _load("triton", f"{self._triton.split(':')[0]}:workspace_size")(*args)
        return torch.zeros(size, dtype=dtype, device=device)

    @property
    def has_triton(self) -> bool:
        """Whether there is a Triton kernel."""
        return self._triton is not None

    def implementation(self, device: str) -> Implementation:
        """The implementation that FASTLLAMA_BACKEND and a device type ("cpu", "cuda", ...) select.

        Raises BackendError when the variable asks for a Triton kernel that there is and that cannot run here.
        """
        wanted = env.BACKEND.read()
        if wanted == "reference":
            return Implementation("reference", self._run_reference, "FASTLLAMA_BACKEND=reference")
        if wanted == "triton" and self.has_triton:
            return Implementation("triton", self.launcher(device), "FASTLLAMA_BACKEND=triton")
        chosen = self.implementations(device)[0]
        if wanted == "triton" and device != "cuda":  # where that is the reason anyway
            return replace(chosen, reason=f"no Triton kernel yet; {chosen.reason}")
        return chosen

    def implementations(self, device: str) -> list[Implementation]:
        """Everything that runs the op on a device type, the preferred first and the reference last."""
        found = []
        missing = f"no kernels for {device}"
        if device == "cpu":
            if self._numba is not None and importlib.util.find_spec("numba") is not None:
                run = self._around(_load("numba", self._numba))
                found.append(Implementation("numba", run, "tensors on cpu, Numba is installed"))
            if self._cpu is not None:
                found.append(Implementation("cpu", self._around(self._cpu), "tensors on cpu"))
            missing = "tensors on cpu; the reference is the CPU backend"
        elif device == "cuda":
            if self._triton is not None:
                found.append(Implementation("triton", self.launcher(device), "tensors on cuda"))
            missing = "no Triton kernel yet"
        return [*found, Implementation("reference", self._run_reference, missing)]

    def launcher(self, device: str) -> Function:
        """The Triton launcher of an op that has one. Raises BackendError where it cannot run on `device`."""
        assert self._triton is not None, f"op {self.name} has no Triton kernel"
        if importlib.util.find_spec("triton") is None:
            raise BackendError(
                f"op {self.name} needs Triton on {device}: pip install triton, or set FASTLLAMA_BACKEND=reference"
            )
        if device == "cpu" and not env.triton_interpret():
            raise BackendError(
                f"op {self.name}: Triton kernels run on CPU tensors only in the interpreter; set TRITON_INTERPRET=1"
            )
        return _load("triton", self._triton)

    def _run_reference(self, *args: Any) -> None:
        outputs = args[self._inputs : self._inputs + self.num_outputs]
        results = self._reference(*args[: self._inputs])
        for output, result in zip(outputs, (results,) if len(outputs) == 1 else results or (), strict=True):
            if output is not None:
                output.copy_(result)


def _on(index: int, run: Function) -> Function:
    """`run` where GPU `index` is the current one: Triton launches there, wherever the tensors are."""

    def guarded(*args: Any) -> Function | None:
        if torch.cuda.current_device() == index:  # asked first: to switch and back costs more
            again = run(*args)
        else:
            with torch.cuda.device(index):
                again = run(*args)
        return again and _on(index, again)

    return guarded


def _as_it_is(run: Function) -> Function:
    return run


def _load(room: str, target: str) -> Function:
    module, function = target.split(":")
    launcher: Function = getattr(importlib.import_module(f"fastllama.kernels.{room}.{module}"), function)
    return launcher


def backend_of(device: torch.Tensor | torch.device | str) -> dict[str, Implementation]:
    """What runs each op for a tensor or a device, by op name."""
    if isinstance(device, torch.Tensor):
        device = device.device
    kind = torch.device(device).type
    return {name: op.implementation(kind) for name, op in sorted(OPS.items())}
