"""Contract: every call that creates a tensor names its dtype and device, as torch's defaults may change.

Under `torch.set_default_dtype(torch.bfloat16)` scratch memory without a dtype was half as long as its kernel took it to
be, which corrupted the heap; under `torch.set_default_device("meta")` it had address 0.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.rooms import module_name

PACKAGE = Path(__file__).parents[2] / "fastllama"
FACTORIES = {
    "arange",
    "asarray",
    "as_tensor",
    "bartlett_window",
    "blackman_window",
    "complex",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "hamming_window",
    "hann_window",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "sparse_coo_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}
WANTED = {"dtype", "device"}


def careless(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each call of a factory of torch that leaves out dtype or device.

    `functools.partial(torch.tensor, dtype=..., device=...)` is a call too, and `from torch import zeros` is refused.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ((node.lineno, ast.unparse(node)) for name in node.names if name.name in FACTORIES)
        if isinstance(node, ast.Call):
            given = {keyword.arg for keyword in node.keywords}
            for function in (node.func, *node.args[:1]):
                if _factory(function) and not given >= WANTED and "out" not in given:
                    yield node.lineno, ast.unparse(node)


def _factory(node: ast.expr) -> bool:
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return named and node.value.id == "torch" and node.attr in FACTORIES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_every_tensor_names_its_dtype_and_device(path: Path) -> None:
    assert list(careless(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(3)",
        "x = torch.zeros(3, dtype=torch.int64)",
        "torch.arange(3, device=x.device)",
        "functools.partial(torch.tensor, dtype=torch.int64)",
        "from torch import Tensor, ones",
    ],
)
def test_one_that_does_not_is_found(source: str) -> None:
    assert len(list(careless(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["torch.empty(3, dtype=d, device=x.device)", "x.new_empty(3)", "torch.empty_like(x)", "torch.arange(3, out=x)"],
)
def test_one_that_does_or_need_not_is_not(source: str) -> None:
    assert list(careless(source)) == []
