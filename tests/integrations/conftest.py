"""Fixtures for every test of a stack: that stack's own warnings are no errors, and compiled functions are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastllama import env

OF_OTHERS = [
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # inductor's own
    "ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning",  # Dynamo's, under 4.57
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT's use of it
    "ignore:`output_attentions=True` is not supported with:UserWarning",  # of all but eager, under 4.57
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only for files below this folder: a whole run has others."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for text in OF_OTHERS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Dynamo counts how often a function was compiled, for all models of a process, and gives up after eight times."""
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _repaired() -> Iterator[None]:
    """Patches Triton's interpreter as our programs do: stock, it rounds bf16 wrongly."""
    if not env.triton_interpret():
        yield
        return
    from fastllama.testing.interpreter import repaired

    with repaired():
        yield
