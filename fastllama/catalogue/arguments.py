"""The arguments of an op: outputs, order, and how a call is written."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.maker import Arguments
from fastllama.kernels.dispatch.op import OPS

SCRATCH = "workspace"


def outputs(op: str) -> tuple[str, ...]:
    """The names of an op's output arguments, which its public function allocates unless they are given."""
    names = [name for name in OPS[op].names if name != SCRATCH]
    return tuple(names[len(names) - OPS[op].num_outputs :])


def results(op: str, call: Arguments, returned: Any) -> tuple[Tensor, ...]:
    """A call's results: the returned tensors, or those updated in place where it returns nothing."""
    if returned is not None:
        return returned if isinstance(returned, tuple) else (returned,)
    schema = getattr(torch.ops.fastllama, op).default._schema
    updated = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return tuple(call[name] for name in updated if call[name] is not None)


def inputs(op: str, call: Arguments) -> Arguments:
    """A call without its outputs and its scratch memory."""
    return {name: value for name, value in call.items() if name not in (*outputs(op), SCRATCH)}


def positional(op: str, call: Arguments) -> tuple[Any, ...]:
    """The arguments in the order of the op and its launchers; None for those that the call lacks."""
    return tuple(call.get(name) for name in OPS[op].names)


def in_order(op: str, call: Arguments) -> Arguments:
    """The call in the order of the op's arguments. Raises ValueError for missing or unknown arguments."""
    optional = outputs(op)[1:]  # the log-sum-exp of attention
    names = [name for name in OPS[op].names if name in call or name not in optional]
    if set(names) != set(call):
        raise ValueError(f"a call of {op} has {sorted(call)}; legal: {names}")
    return {name: call[name] for name in names}


def as_written(op: str, call: Arguments) -> tuple[tuple[Any, ...], Arguments]:
    """Positional and keyword arguments for the public function, without those equal to the defaults."""
    parameters = inspect.signature(getattr(kernels, op)).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    named = {
        name: value
        for name, value in call.items()
        if name not in required and (isinstance(value, Tensor) or value != parameters[name].default)
    }
    return tuple(call[name] for name in required), named
