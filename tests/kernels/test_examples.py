"""Every public function of fastllama.kernels ends its docstring in an example, and each example runs as printed."""

from __future__ import annotations

import doctest
import inspect
from types import FunctionType

import pytest
import torch

from fastllama import kernels

FUNCTIONS = [name for name in kernels.__all__ if isinstance(getattr(kernels, name), FunctionType)]
HEADING, LONGEST = "Example:\n", 7  # lines, expected output included


@pytest.mark.parametrize("name", FUNCTIONS)
def test_its_docstring_ends_in_an_example_that_runs(name: str) -> None:
    text, heading, example = (inspect.getdoc(getattr(kernels, name)) or "").partition(HEADING)
    assert heading, f"{name} has no section {HEADING.strip()!r}"
    assert len(example.splitlines()) <= LONGEST
    assert ">>>" not in text
    names = {"torch": torch, "kernels": kernels}
    test = doctest.DocTestParser().get_doctest(example, names, name, None, None)
    assert test.examples[-1].want, "its last line prints nothing"
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.attempted == len(test.examples) > 0
    assert not result.failed, "".join(report)
