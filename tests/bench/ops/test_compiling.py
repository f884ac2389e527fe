"""Every compiled contender is compiled, however many shapes others had before it, under old and new torch."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllama.bench.ops import compiling
from fastllama.bench.ops.compiling import compiled
from fastllama.bench.ops.formulas import EAGER

ROOT = Path(compiling.__file__).parents[3]
OLDEST = {"model", "fullgraph", "dynamic", "backend", "mode", "options", "disable"}  # torch.compile's, in 2.7


def double(x: Tensor, *, factor: float = 2.0) -> Tensor:
    return x * factor


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_shapes_of_one_contender_are_not_counted_against_the_next(fullgraph: bool) -> None:
    """Three contenders of one function, each at another shape, where two shapes of one would be too many."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        made.append(len(inputs[0]))
        return graph.forward

    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (3, 4, 5):
            x = torch.ones(size)
            assert torch.equal(compiled(double, backend, fullgraph)(x), 2 * x)  # type: ignore[arg-type]
    assert made == [3, 4, 5]


def test_the_peers_by_formula_can_be_compiled_so() -> None:
    assert all(inspect.isfunction(function) for function in EAGER.values())


def test_torch_compile_is_given_what_the_oldest_torch_takes() -> None:
    given = {
        keyword.arg
        for folder in ("benchmarks", "fastllama")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile"
        for keyword in node.keywords
    }
    assert given
    assert given <= OLDEST
