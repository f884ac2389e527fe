"""Cases on another device than the CPU: a formula's inputs move with the case, and no host tensor is mixed in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastllama.kernels.dispatch.op import OPS
from fastllama.verify.case import FormulaCase
from fastllama.verify.cases import all_cases

CASES = list(all_cases(torch.float32))
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)  # takes indices of the host on any device


class Device(TorchFunctionMode):
    """Tracks which tensors are on a pretended device, and which on the host; `mixed`: calls that took both.

    What is computed of a device's tensors is there too, and so is what is made or moved where a device is named.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self._there: dict[int, Tensor] = {}  # kept, lest their memory is another's meanwhile
        for tensor in tensors:
            self._put(tensor)

    def _put(self, tensor: Tensor) -> None:
        self._there[tensor.untyped_storage().data_ptr()] = tensor

    def _holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._there

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        moves = "device" in kwargs or (func is Tensor.to and isinstance(args[1], (Tensor, torch.device)))
        there = {self._holds(tensor) for tensor in given if tensor.dim()}
        if len(there) == 2 and func not in INDEXING and not moves:
            self.mixed.append(func.__name__)
        if moves or any(map(self._holds, given)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._put(leaf)
        return result


def mixed(case: FormulaCase) -> list[str]:
    """The functions that took tensors of the host beside the case's own."""
    held = tree_leaves((case.given, case.options, case.known))
    with Device([leaf for leaf in held if isinstance(leaf, Tensor)]) as device:
        case.expected()
    return device.mixed


@pytest.mark.parametrize("op", OPS)
def test_a_formula_meets_no_tensor_of_the_host(op: str) -> None:
    for case in (case for case in CASES if case.op == op):
        assert mixed(case) == [], case.label


def test_such_a_meeting_is_seen() -> None:
    given, here = {"x": torch.ones(3)}, torch.ones(3)
    assert mixed(FormulaCase("an op", "", given, lambda x: (x * here,))) == ["mul"]
    assert mixed(FormulaCase("an op", "", given, lambda x, here: (x * here,), known={"here": here})) == []


@pytest.mark.parametrize("op", OPS)
def test_all_that_a_case_holds_moves_with_it(op: str) -> None:
    for case in (case for case in CASES if case.op == op):
        moved = case.to(torch.device("meta"))
        leaves = tree_leaves((moved.given, moved.options, moved.known))
        assert {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} == {"meta"}, case.label
