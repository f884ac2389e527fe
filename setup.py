"""The build's entry. Metadata stands in pyproject.toml, what is computed here. Nothing asks for torch or hardware."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, read from the package's text: nothing of it need be importable while it is built."""
    text = (ROOT / "fastllama" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('fastllama/__init__.py has no line like __version__ = "0.1.0"')
    return found[1]


setup(
    version=version(),
    packages=find_packages(include=["fastllama", "fastllama.*"]),
    package_data={"fastllama": ["py.typed", "assets/**/*", "kernels/configs/**/*.json", "serve/page/*"]},
    include_package_data=False,  # exactly the data named above, whatever else lies in the tree
)
