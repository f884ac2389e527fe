"""torch.compile for contenders: each compiled independently, with any torch from 2.7 on."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any], backend: str, fullgraph: bool = False) -> Callable[..., Any]:
    """`function` compiled for each shape.

    It gets a new code object, by which torch counts recompilations, eight at most: the ninth shape of an op would fail,
    or without `fullgraph` be timed uncompiled. Later torches have `isolate_recompiles` for this; 2.11 does not.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=fullgraph, backend=backend)
