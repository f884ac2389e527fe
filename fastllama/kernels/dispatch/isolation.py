"""Runs functions as if torch's autocast and matmul precision were at their defaults, whatever the caller has set.

Autocast casts the operands and results of torch's matmuls: the exact sums of w8a8 were 2e-3 off. After
`torch.set_float32_matmul_precision("medium")` torch multiplies fp32 in bf16 on CPUs with instructions for it, with an
error as large.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Function = Callable[..., Any]

_DEVICES = ("CPU", "CUDA", "XPU", "MPS", "HPU", "IPU", "PrivateUse1", "PrivateUse2")


def _autocast_keys() -> Any:
    keys = [getattr(torch._C.DispatchKey, f"Autocast{device}", None) for device in _DEVICES]
    return functools.reduce(lambda a, b: a | b, [torch._C.DispatchKeySet(key) for key in keys if key is not None])


_AUTOCAST_KEYS = _autocast_keys()


def autocast_enabled(device_type: str) -> bool:
    """Whether the calling thread is inside torch.autocast for a device type: 0.1 us."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast() -> AbstractContextManager[None]:
    """A context without autocast in the calling thread: 0.5 us.

    It excludes autocast's dispatch keys. `torch.autocast(enabled=False)` takes 23 us, and the outermost one clears
    autocast's cache of weights on exit.
    """
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)
    return guard


def without_autocast(run: Function) -> Function:
    """`run` within `no_autocast`, for callers that have checked `autocast_enabled`."""

    @functools.wraps(run)
    def isolated(*args: Any) -> Any:
        with no_autocast():
            return run(*args)

    return isolated


# torch 2.9 has a precision for each backend and operator; older versions have set_float32_matmul_precision alone.
_BACKENDS = ("mkldnn", "cuda") if hasattr(torch._C, "_get_fp32_precision_getter") else ()
_FULL = ("ieee", "none")  # "none": the default, IEEE for matmuls
# Settings of cuBLAS's 16-bit matmuls; also readable and writable in CPU-only builds.
_REDUCTIONS = [
    (getattr(torch._C, f"_get_cublas_allow_{name}"), getattr(torch._C, f"_set_cublas_allow_{name}"))
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation")
    if hasattr(torch._C, f"_get_cublas_allow_{name}")
]


# The precision of the CPU's matmuls, and its legal values. No Python frame, as every matmul reads it.
_read: Callable[[], str] = torch._C._get_float32_matmul_precision
_full_here: tuple[str, ...] = ("highest",)
if _BACKENDS:
    _read, _full_here = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul"), _FULL


def _is_full_on_gpu() -> bool:
    if _BACKENDS:
        return torch._C._get_fp32_precision_getter("cuda", "matmul") in _FULL and _sums_in_full()
    return _read() in _full_here and _sums_in_full()


def _sums_in_full() -> bool:
    return not any(_reduces(read()) for read, _ in _REDUCTIONS)


def _reduces(value: bool | tuple[bool, bool]) -> bool:
    """Whether sums may be rounded to 16 bits. From torch 2.10 on a pair: the second is whether split-K is allowed."""
    return value[0] if isinstance(value, tuple) else value


def _set_full() -> Function:
    """Set all settings to full precision. Returns a function that restores those that were changed."""
    undo: list[Function] = []
    try:
        general = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # it contradicts a backend's setting, which takes precedence
        general = "highest"
    own = {backend: _own_precision(backend) for backend in _BACKENDS}
    if general != "highest":
        torch._C._set_float32_matmul_precision("highest")  # sets the backends' too
        undo.append(lambda: torch._C._set_float32_matmul_precision(general))
    for backend, precision in own.items():
        if general != "highest" or torch._C._get_fp32_precision_getter(backend, "matmul") not in _FULL:
            torch._C._set_fp32_precision_setter(backend, "matmul", "ieee")
            undo.append(functools.partial(torch._C._set_fp32_precision_setter, backend, "matmul", precision))
    for read, write in _REDUCTIONS:
        value = read()
        if _reduces(value):
            off, on = ((False, True), value) if isinstance(value, tuple) else ((False,), (value,))
            write(*off)
            undo.append(functools.partial(write, *on))
    return lambda: [each() for each in undo]


def _own_precision(backend: str) -> str:
    """The precision that a backend's matmuls are set to; "none" if inherited, or equal to what they would inherit."""
    precision: str = torch._C._get_fp32_precision_getter(backend, "matmul")
    return "none" if precision == torch._C._get_fp32_precision_getter(backend, "all") else precision


class _FullPrecision:
    """A context at full precision for the process: the first thread to enter sets it, the last to leave restores.

    Settings that another thread changes meanwhile are lost. A child forked meanwhile restores its parent's settings.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside: dict[int, int] = {}  # entries by thread
        self._turn = 0  # odd while any thread is inside
        self._undo: Function | None = None
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._after_in_child
            )

    def needed(self) -> bool:
        """Whether CPU matmuls of the calling thread need the context: 0.15 us."""
        turn = self._turn  # stays even: no thread was restoring while the setting was read
        return turn & 1 != 0 or _read() not in _full_here or self._turn != turn

    def needed_on_gpu(self) -> bool:
        turn = self._turn
        return turn & 1 != 0 or not _is_full_on_gpu() or self._turn != turn

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._turn += 1
                self._undo = _set_full()
            thread = threading.get_ident()
            self._inside[thread] = self._inside.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            thread = threading.get_ident()
            self._inside[thread] -= 1
            if not self._inside[thread]:
                del self._inside[thread]
            self._put_back()

    def _put_back(self) -> None:
        if not self._inside and self._undo is not None:
            self._undo()
            self._undo = None
            self._turn += 1

    def _after_in_child(self) -> None:
        """In a forked child, only the thread that forked is still inside."""
        thread = threading.get_ident()
        self._inside = {thread: self._inside[thread]} if thread in self._inside else {}
        self._put_back()
        self._lock.release()


_FULL_PRECISION = _FullPrecision()
_NOTHING = nullcontext()


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """A context in which torch's matmuls on a device type have full fp32 precision: 0.3 us if nothing must be changed.

    It overrides `torch.set_float32_matmul_precision`, `torch.backends.*.fp32_precision` and, at 4 us, the permission of
    `torch.backends.cuda.matmul` for cuBLAS to round the sums of 16-bit matmuls, which is on by default. Required for
    every matmul of fp32 operands by `mm`, `mv`, `bmm`, `einsum` or scaled_dot_product_attention, and on a GPU for
    every 16-bit matmul. The settings belong to the process: matmuls of other threads have full precision meanwhile.
    """
    needed = _FULL_PRECISION.needed_on_gpu() if device_type == "cuda" else _FULL_PRECISION.needed()
    return _FULL_PRECISION if needed else _NOTHING


def in_full_precision(run: Function) -> Function:
    """`run`, of CPU tensors, within `full_precision`: 0.3 us a call if nothing must be changed."""

    @functools.wraps(run)
    def isolated(*args: Any, **kwargs: Any) -> Any:
        if not _FULL_PRECISION.needed():
            return run(*args, **kwargs)
        with _FULL_PRECISION:
            return run(*args, **kwargs)

    return isolated


def _run_on_one_thread() -> None:
    """In a forked child, torch's OpenMP threads do not exist, and its first parallel loop would wait for them.

    torch's DataLoader does the same in its workers. `torch.set_num_threads` in the child restarts the threads of our
    own kernels; ops that torch computes would then hang, as torch itself does.
    """
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_on_one_thread)
