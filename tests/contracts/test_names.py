"""Contract: names of kernels and classes are unique, as traces, tracebacks and imports show them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastllama

PACKAGE = Path(fastllama.__file__).parent


def defined(folder: Path, kind: type[ast.AST]) -> Iterator[tuple[str, str]]:
    """Top-level names of the modules below a folder, and where they are defined."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind):
                yield node.name, str(path.relative_to(PACKAGE))


def several(names: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that are defined in more than one place."""
    places = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    assert places
    return {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("compiler", ["triton", "numba"])
def test_a_kernel_is_the_only_one_of_its_name(compiler: str) -> None:
    """A trace adds up kernels of the same name."""
    functions = defined(PACKAGE / "kernels" / compiler, ast.FunctionDef)
    assert several((name, place) for name, place in functions if name.endswith("_kernel")) == {}


def test_a_class_is_the_only_one_of_its_name() -> None:
    classes = defined(PACKAGE, ast.ClassDef)
    assert several((name, place) for name, place in classes if not name.startswith("_")) == {}
