"""What transformers and torch warn of by themselves, stock or patched, is no error here."""

from __future__ import annotations

from pathlib import Path

import pytest

OF_OTHERS = [
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # inductor's own
    "ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning",  # Dynamo's, under 4.57
    "ignore:`output_attentions=True` is not supported with:UserWarning",  # of every implementation but eager, under 4.57
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a whole run, to which other folders belong too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for text in OF_OTHERS:
                item.add_marker(pytest.mark.filterwarnings(text))
