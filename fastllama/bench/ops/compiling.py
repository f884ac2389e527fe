"""torch.compile for contenders: each compiled for itself, by any torch from 2.7 on."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any], backend: str, fullgraph: bool = False) -> Callable[..., Any]:
    """`function` compiled for each shape that it meets.

    It gets a code object of its own. By that object torch counts recompilations, eight at most: the ninth shape that
    an op is measured at would fail, or without `fullgraph` run uncompiled and be timed so. Later torches have
    `isolate_recompiles` for this; 2.11 has not.
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
