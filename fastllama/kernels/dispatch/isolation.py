"""Runs code as if torch's process-wide and thread-wide settings were at their defaults, whoever called it.

Autocast intercepts torch's matmuls and casts their operands and results: w8a8's, of exact sums, were 2e-3 off. After
`torch.set_float32_matmul_precision("medium")` torch multiplies fp32 in bf16 where the CPU has instructions for it, and
an fp32 matmul is as far off.
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
    """Within, autocast intercepts nothing in the calling thread: 0.5 us.

    Its dispatch keys are excluded. `torch.autocast(enabled=False)` takes 23 us, and on the way out of the outermost
    empties autocast's cache of weights.
    """
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)
    return guard


def without_autocast(run: Function) -> Function:
    """`run` within `no_autocast`, for a caller that finds `autocast_enabled`."""

    @functools.wraps(run)
    def isolated(*args: Any) -> Any:
        with no_autocast():
            return run(*args)

    return isolated


# torch 2.9 has a precision for each backend and operator; before, there is the one of set_float32_matmul_precision.
_BACKENDS = ("mkldnn", "cuda") if hasattr(torch._C, "_get_fp32_precision_getter") else ()
_FULL = ("ieee", "none")  # "none": by default, which is IEEE for matmuls
# Of cuBLAS's 16-bit matmuls. On a CPU-only build they read and write as elsewhere.
_REDUCTIONS = [
    (getattr(torch._C, f"_get_cublas_allow_{name}"), getattr(torch._C, f"_set_cublas_allow_{name}"))
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation")
    if hasattr(torch._C, f"_get_cublas_allow_{name}")
]


# The precision of the CPU's matmuls, and what it may be: without a Python frame, as every call of them reads it.
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
    """Whether sums may be rounded to 16 bits; a pair, from torch 2.10 on, also says whether K may be split."""
    return value[0] if isinstance(value, tuple) else value


def _set_full() -> Function:
    """Set all settings to full precision. Returns what puts back those that were not."""
    undo: list[Function] = []
    try:
        general = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # where it contradicts a backend's, which counts alone
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
    """What a backend's matmuls are set to: "none" where they inherit, or have what they would."""
    precision: str = torch._C._get_fp32_precision_getter(backend, "matmul")
    return "none" if precision == torch._C._get_fp32_precision_getter(backend, "all") else precision


class _FullPrecision:
    """Within, the settings of the process are at full precision: the first thread in sets, the last one out puts back.

    What another thread sets meanwhile is lost. A child that was forked meanwhile puts back what its parent had.
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
        """Whether matmuls of the calling thread, on a CPU, have to be inside: 0.15 us."""
        turn = self._turn  # that it stays even says that what is read is not set by a thread that leaves
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
        """Of the threads inside, the one that forked is there alone."""
        thread = threading.get_ident()
        self._inside = {thread: self._inside[thread]} if thread in self._inside else {}
        self._put_back()
        self._lock.release()


_FULL_PRECISION = _FullPrecision()
_NOTHING = nullcontext()


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """Within, torch's matmuls on a device type have fp32's precision, whatever the process has set: 0.3 us if nothing.

    That is `torch.set_float32_matmul_precision`, `torch.backends.*.fp32_precision` and `torch.backends.cuda.matmul`'s
    permission for cuBLAS to round 16-bit matmuls' sums on the way, which is given by default: then 4 us. To be put
    around every matmul of fp32 operands, by `mm`, `mv`, `bmm`, `einsum` or scaled_dot_product_attention, and on a GPU
    around every one of 16 bits. The settings are the process's and no thread's: matmuls of other threads have full
    precision meanwhile.
    """
    needed = _FULL_PRECISION.needed_on_gpu() if device_type == "cuda" else _FULL_PRECISION.needed()
    return _FULL_PRECISION if needed else _NOTHING


def in_full_precision(run: Function) -> Function:
    """`run`, of tensors on a CPU, within `full_precision`: 0.3 us a call if nothing is set."""

    @functools.wraps(run)
    def isolated(*args: Any, **kwargs: Any) -> Any:
        if not _FULL_PRECISION.needed():
            return run(*args, **kwargs)
        with _FULL_PRECISION:
            return run(*args, **kwargs)

    return isolated


def _run_on_one_thread() -> None:
    """In a forked child: torch's OpenMP threads do not come along, and its first parallel loop would wait for them.

    As torch's own DataLoader does in its workers. `torch.set_num_threads` in the child brings our kernels' own threads
    back, which start anew; ops that torch computes would hang, as torch does.
    """
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_on_one_thread)
