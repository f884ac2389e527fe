"""Detects calls of plain tensors, which may bypass torch's dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C
_WITH_MEMORY = ("cpu", "cuda")
_DISABLED = _C._disabled_torch_function_impl  # of subclasses without their own behaviour: Parameter


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are nothing but memory, and no mode of torch intercepts calls.

    False under a TorchDispatchMode (FakeTensorMode, make_fx, flop counters), within torch.func's transforms and
    torch.jit.trace, and for subclasses with their own behaviour (DTensor, quantized weights), functional tensors,
    lazily negated tensors and devices whose memory has no address (meta, mps).
    """
    if _C._dispatch_tls_local_include_set().raw_repr() & ~_usual():
        return False
    return all(
        tensor.device.type in _WITH_MEMORY
        and (type(tensor) is Tensor or type(tensor).__torch_function__ is _DISABLED)
        and _C._dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.device.type)
        for tensor in tensors
    )


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether it is one of autograd's zero tensors, which have no memory."""
    return bool(_C._dispatch_keys(tensor).has(_C.DispatchKey.ZeroTensor))


def check_no_tangent(name: str, tensor: Tensor, op: str) -> None:
    """Raise RuntimeError for a tensor that carries a tangent of forward-mode differentiation."""
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{name} carries a tangent, and op {op} has no derivative: call it outside of forward-mode differentiation"
        )


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError for elements at address 0: of a wrapper, or in a storage that was freed."""
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(
            f"{name} has no memory for its {tensor.numel()} elements (a wrapper, or a storage that was freed); "
            "legal: a tensor with data"
        )


@lru_cache(None)
def _usual() -> int:
    """The dispatch keys that every thread includes."""
    keys = _C.DispatchKeySet(_C.DispatchKey.BackendSelect).add(_C.DispatchKey.ADInplaceOrView)
    return int(keys.raw_repr())


@lru_cache(None)
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of a plain tensor on a device, created in inference mode and outside of it."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_C._dispatch_keys(torch.empty(0, dtype=torch.float32, device=device)).raw_repr())
    return frozenset(found)
