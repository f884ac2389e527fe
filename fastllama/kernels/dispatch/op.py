"""An op: checks a call, runs the implementation bound to its device, and is opaque to torch.compile.

Every implementation writes into tensors that its caller passes and allocates no result: so an op aliases nothing, its
fake implementation does nothing, and it can be captured in a CUDA graph. Eager calls of plain tensors bypass torch's
dispatcher, which costs 2 us a call (up to 35 us with `custom_op` in place of `torch.library.Library`), more than many
kernels. All other tensors (plainness.py) go through the dispatcher. A call like an earlier one is not checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _increment_version, _len_torch_dispatch_stack
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastllama import env
from fastllama.errors import check_device
from fastllama.kernels.dispatch.aliasing import Aliasing, InPlace
from fastllama.kernels.dispatch.backends import Backends, Function, Implementation, Table
from fastllama.kernels.dispatch.isolation import autocast_enabled, without_autocast
from fastllama.kernels.dispatch.likeness import Likeness, picker
from fastllama.kernels.dispatch.plainness import check_memory, check_no_tangent, is_plain, is_zero_tensor

_MOST_KNOWN = 64  # cached calls of an op: a layer makes at most five kinds, for each prompt length
_MOST_PLACES = 256  # addresses cached for each: some dozen layers, and what is allocated between them

_LIBRARY = torch.library.Library("fastllama", "FRAGMENT")  # kept alive: its ops are removed with it
OPS: dict[str, Op] = {}
_NUMBERS: dict[str, tuple[type, ...]] = {
    "float": (Real, torch.SymFloat, torch.SymInt),
    "float?": (Real, torch.SymFloat, torch.SymInt, type(None)),
    "int": (Integral, torch.SymInt),
    "bool": (bool, Integral, torch.SymBool),
}
_address = Tensor.data_ptr


@dataclass(frozen=True)
class _Known:
    """How to run calls like one that has been checked.

    match, requires_grad: of its Likeness. written: picks the written tensors whose versions autograd counts, if any.
    near: pairs of the tensors that `match` returns, one of them written, with the distances in bytes at which they
    overlap. places: tuples of addresses that have been checked for missing and shared memory, so that buffers which are
    kept, or which an allocator reuses, are checked once.
    """

    match: Callable[[tuple[Any, ...]], tuple[Tensor, ...] | None]
    requires_grad: bool
    run: Function
    written: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] | None
    near: list[tuple[int, int, int, int]]
    places: set[tuple[int, ...]] = field(default_factory=set)


class Op(Backends):
    """One op in its out-form.

    schema: torch's schema language, "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()". Outputs come
    last and are (a!) and (b!); inputs that are updated in place are (c!) and on. Scratch memory comes after them,
    `Tensor(c!)? workspace`: a launcher that needs some allocates it when None, and allocates nothing else.
    check: takes the arguments and raises for an illegal one; devices are checked here. Whether a call is legal must
    depend on its Likeness alone.
    reference: the function of the same name in kernels/reference; takes all arguments but the outputs, returns these.
    values: takes the arguments and raises ValueError for illegal values in tensors; called with FASTLLAMA_CHECK=1.
    in_place, kept_apart: which outputs may overwrite which inputs, and which tensors may share a buffer, as for
    Aliasing; no other tensors may share memory.
    cpu, numba, triton: as for Backends, with the outputs as arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        reference: Callable[..., Any],
        values: Callable[..., None] | None = None,
        in_place: InPlace | None = None,
        kept_apart: Collection[tuple[str, str]] = (),
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
        self._kinds = kinds
        self._tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        self._written = tuple(i for i, kind in enumerate(kinds) if "!" in kind)
        self._aliasing = Aliasing(names, self._written, in_place or {}, kept_apart)
        super().__init__(name, reference=reference, cpu=cpu, numba=numba, triton=triton)
        self._check, self._values = check, values
        self._bound: dict[torch.device, Function] = {}
        self._second = next(place for place in self._tensors[1:] if not kinds[place].endswith("?"))
        self._known: dict[tuple[int, int], _Known] = {}  # by the sizes of the first two required tensors
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Without disable_dynamo, torch.compile would also trace the Python that the ops of its graphs run.
        run = _disable_dynamo(lambda *args: self.run_apart(args))
        _LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastllama::{self.name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        self._opaque = getattr(torch.ops.fastllama, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> None:
        if is_compiling():
            self.check(args)
            self._opaque(*args)
            return
        try:
            known = self._known.get((args[0].numel(), args[self._second].numel()))
        except (AttributeError, TypeError):  # not a tensor, or symbolic sizes
            known = None
        watched = _len_torch_dispatch_stack() or forward_ad._current_level >= 0  # not part of a Likeness
        tensors = None if known is None or watched else known.match(args)
        if known is None or tensors is None or (known.requires_grad and is_grad_enabled()):
            self._run_unknown(args)
            return
        addresses = tuple(map(_address, tensors))
        if addresses not in known.places:
            self._place(known, args, addresses)
        if known.written is not None:
            _increment_version(known.written(args))
        known.run(*args)

    def _place(self, known: _Known, args: tuple[Any, ...], addresses: tuple[int, ...]) -> None:
        """Check for missing and shared memory, and cache the addresses."""
        if 0 in addresses:
            self._check_addresses(args)
        for one, other, low, high in known.near:
            if low < addresses[one] - addresses[other] < high:
                self._check_aliasing(args)
                break
        if len(known.places) == _MOST_PLACES:
            known.places.clear()
        known.places.add(addresses)

    def _run_unknown(self, args: tuple[Any, ...]) -> None:
        """Check a call, run it, and cache how calls like it are run."""
        known = self._known  # `bound_to` replaces it: this call belongs to the present one
        self.check(args)
        given = self._given(args)
        if not is_plain(given):
            if any(map(is_zero_tensor, given)):  # torch's fallback for these drops what an op writes
                self._check_addresses(args)
            self._opaque(*args)
            return
        self._check_memory(args)
        counted = [place for place in self._written if args[place] is not None and not args[place].is_inference()]
        written = picker(counted) if counted else None
        if written is not None:
            _increment_version(written(args))
        run = self._isolated(args[0].device)
        run = run(*args) or run
        like = Likeness(args, self._tensors)
        if like.plain:
            if len(known) == _MOST_KNOWN:
                known.clear()
            near = self._aliasing.near(like.places, args)
            known[args[0].numel(), args[self._second].numel()] = _Known(
                like.match, like.requires_grad, run, written, near
            )

    def check(self, args: tuple[Any, ...]) -> None:
        """Raise for an illegal call, except for missing or shared memory."""
        for name, kind, value in zip(self.names, self._kinds, args, strict=True):
            _check_kind(name, kind, value)
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
        if is_compiling():
            return
        if forward_ad._current_level >= 0:
            for i in self._tensors:
                if args[i] is not None:
                    check_no_tangent(self.names[i], args[i], self.name)
        if not torch.is_inference_mode_enabled():
            for i in self._written:
                if args[i] is not None and args[i].is_inference():
                    raise RuntimeError(
                        f"{self.names[i]} is an inference tensor, which must not be written outside of inference "
                        f"mode: call op {self.name} under torch.inference_mode()"
                    )

    def check_all(self, args: tuple[Any, ...]) -> None:
        """Raise for an illegal call, including missing or shared memory."""
        self.check(args)
        if is_plain(self._given(args)):
            self._check_memory(args)

    def _given(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[place] for place in self._tensors if args[place] is not None]

    def _check_memory(self, args: Sequence[Any]) -> None:
        self._check_addresses(args)
        self._check_aliasing(args)

    def _check_aliasing(self, args: Sequence[Any]) -> None:
        """Raise ValueError for a written tensor that illegally shares memory."""
        for place, other in self._aliasing.overlaps(args):
            raise ValueError(self._aliasing.refusal(place, other))

    def _check_addresses(self, args: Sequence[Any]) -> None:
        for place in self._tensors:
            if args[place] is not None:
                check_memory(self.names[place], args[place])

    def run_apart(self, args: Sequence[Any]) -> None:
        """Run the op for torch's dispatcher: an input that overlaps an output is copied first.

        torch.compile creates such calls from programs without overlap: it removes the clone in
        `y = x.clone(); matmul(y, w, out=x)`.
        """
        given = [*args]
        device = args[0].device
        if device.type in ("cpu", "cuda"):
            self._check_addresses(args)
            for place, other in self._aliasing.overlaps(args):
                if other in self._written:
                    raise ValueError(self._aliasing.refusal(place, other))
                given[other] = args[other].clone()
        _increment_version([args[place] for place in self._written if args[place] is not None])
        self._isolated(device)(*given)

    def _isolated(self, device: torch.device) -> Function:
        """The function that runs the op on a device, with autocast disabled."""
        run = self.bound(device)
        return without_autocast(run) if autocast_enabled(device.type) else run

    def bound(self, device: torch.device) -> Function:
        """The function that runs the op on a device, selected at the first call. Raises BackendError."""
        if device not in self._bound:
            run = self.implementation(device.type).run
            if self._values is not None and env.CHECK.read() == "1":
                run = _after(self._values, run)
            if device.type == "cuda" and torch.cuda.device_count() > 1:
                run = _on(device.index, run)
            self._bound.setdefault(device, run)
        return self._bound[device]

    @contextmanager
    def bound_to(self, device: torch.device, run: Function) -> Iterator[None]:
        """A context in which `run` runs the op on a device, for measurements and tests."""
        bound = self._bound
        self._bound, self._known = bound | {device: run}, {}
        try:
            yield
        finally:
            self._bound, self._known = bound, {}

    def workspace(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Tensor:
        """Scratch memory of zeros: `workspace_size(*args)` elements of the Triton kernels; empty for other backends."""
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


def _after(check: Function, run: Function) -> Function:
    """`run`, after a check of its arguments."""

    def checked(*args: Any) -> Function | None:
        check(*args)
        again = run(*args)
        return again and _after(check, again)

    return checked


def _check_kind(name: str, kind: str, value: Any) -> None:
    """Raise TypeError unless a value has the schema's type: a strided tensor, or a number that is not a tensor."""
    if kind.startswith("Tensor"):
        if not isinstance(value, Tensor) and not (value is None and kind.endswith("?")):
            raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; legal: a tensor")
        if value is not None and value.layout is not torch.strided:
            raise TypeError(f"{name} has layout {value.layout}; legal: {torch.strided}")
    elif not isinstance(value, _NUMBERS[kind]):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; legal: a number ({kind})")


def _on(index: int, run: Function) -> Function:
    """`run` with GPU `index` as the current device, on which Triton launches wherever the tensors are."""

    def guarded(*args: Any) -> Function | None:
        if torch.cuda.current_device() == index:  # checked first: switching and back costs more
            again = run(*args)
        else:
            with torch.cuda.device(index):
                again = run(*args)
        return again and _on(index, again)

    return guarded


def backend_of(device: torch.Tensor | torch.device | str) -> dict[str, Implementation]:
    """The implementation that each op runs for a tensor or a device, by op name.

    Example:
        >>> kernels.backend_of("cpu")["embedding"].backend
        'reference'
    """
    if isinstance(device, torch.Tensor):
        device = device.device
    kind = torch.device(device).type
    return {name: op.implementation(kind) for name, op in sorted(OPS.items())}
