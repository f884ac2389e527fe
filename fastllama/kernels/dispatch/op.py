"""An op: checks a call, runs the implementation bound to its device, and is opaque to torch.compile.

Every implementation writes into tensors its caller passes and allocates no result: so an op aliases nothing, needs no
fake beyond "no result", and can be captured in a CUDA graph. Eager calls go straight to it: the dispatcher costs 2 us a
call, and up to 35 us where `custom_op` registers instead of `torch.library.Library`, more than many of the kernels
themselves. A call like an earlier one is not checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastllama.errors import check_device
from fastllama.kernels.dispatch.backends import Backends, Function, Implementation, Table
from fastllama.kernels.dispatch.likeness import Likeness

_MOST_KNOWN = 64  # calls remembered of an op: a layer makes five kinds of one at most, each prompt length adds as many

_LIBRARY = torch.library.Library("fastllama", "FRAGMENT")  # kept alive: its ops die with it
OPS: dict[str, Op] = {}


class Op(Backends):
    """One op in its out-form.

    schema: torch's schema language, "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()". Outputs come
    last and are (a!) and (b!); inputs that are updated in place are (c!) and on. Scratch memory comes after them,
    `Tensor(c!)? workspace`: a launcher that needs some allocates it when None, and only then allocates anything.
    check: takes the arguments and raises for what is not legal; devices are checked here. Whether a call is legal must
    depend on nothing but its Likeness.
    reference: the function of the same name in kernels/reference; takes everything but the outputs and returns them.
    cpu, numba, triton: as for Backends, in out-form.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        reference: Callable[..., Any],
        cpu: Function | None = None,
        numba: Table | None = None,
        triton: Table | None = None,
    ) -> None:
        name, parameters = schema.removesuffix(") -> ()").split("(", 1)
        kinds, names = zip(*(parameter.rsplit(" ", 1) for parameter in parameters.split(", ")), strict=True)
        is_output = [kind.startswith(("Tensor(a!)", "Tensor(b!)")) for kind in kinds]
        self.num_outputs = sum(is_output)
        self._inputs = is_output.index(True) if self.num_outputs else len(kinds)
        self.names = names
        self._tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        super().__init__(name, reference=reference, cpu=cpu, numba=numba, triton=triton)
        self._check = check
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

    def workspace(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Tensor:
        """Zeros on a device: as many as the Triton kernels' `workspace_size(*args)` says.

        None where another implementation runs.
        """
        size = 0
        if self.implementation(device.type).backend == "triton":
            needed = self._triton_kernels(device.type).workspace_size
            assert needed is not None
            size = needed(*args)
        return torch.zeros(size, dtype=dtype, device=device)

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


def backend_of(device: torch.Tensor | torch.device | str) -> dict[str, Implementation]:
    """What runs each op for a tensor or a device, by op name."""
    if isinstance(device, torch.Tensor):
        device = device.device
    kind = torch.device(device).type
    return {name: op.implementation(kind) for name, op in sorted(OPS.items())}
