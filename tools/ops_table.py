"""Writes the tables of docs/kernels/index.md, every public name of `fastllama.kernels`: `python -m tools.ops_table`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.maker import Maker
from fastllama.catalogue.table import CATALOGUE
from fastllama.kernels.dispatch.checks import CODES, KERNEL_FLOATS
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.numba.table import KERNELS as NUMBA
from tests.kernels.triton.launches import SHIPPED, SHORT
from tools.kernels_report import op_of

PAGE = Path(__file__).parents[1] / "docs" / "kernels" / "index.md"
MARK = "<!-- ops: written by `make docs` -->\n"  # from here on the page is generated
# What an op computes besides its own formula, by the argument that asks for it.
FUSED = {"bias": "bias", "norm": "RMSNorm prologue", "residual": "residual", "gated": "SwiGLU epilogue"}


def tables() -> str:
    """The generated part of the page."""
    ops = [name for name in kernels.__all__ if name in OPS]
    others = [name for name in kernels.__all__ if name not in OPS]
    heads = {
        "Ops": ("op", "computes", "fused", "dtypes", "backends", "report"),
        "Packing, quantization, workspaces": ("name", "is", "backends"),
    }
    bodies = {
        "Ops": [(f"`{op}`", _sentence(op), _fused(op), _dtypes(op), _backends(op), _report(op)) for op in ops],
        "Packing, quantization, workspaces": [
            (f"`{name}`", _sentence(name), "numba" if name in NUMBA else "-") for name in others
        ],
    }
    parts = []
    for title, head in heads.items():
        rule = "|" + "---|" * len(head)
        parts.append("\n".join([f"## {title}\n", _row(head), rule, *map(_row, bodies[title])]))
    return "\n\n".join(parts) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _sentence(name: str) -> str:
    """The first sentence of the docstring, for a cell."""
    doc = inspect.getdoc(getattr(kernels, name)) or ""
    first = re.split(r"(?<=\.) (?=[A-Z`])", " ".join(doc.split("\n\n")[0].split()))[0]
    return first.removesuffix(".").replace("|", "\\|")


def _fused(op: str) -> str:
    names = OPS[op].names
    return ", ".join(part for argument, part in FUSED.items() if {"x", argument} <= set(names)) or "-"


def _dtypes(op: str) -> str:
    """The floating dtypes that an op's check accepts, and the 8-bit and packed tensors of a call."""
    floats = []
    for dtype in KERNEL_FLOATS:
        try:
            OPS[op].check(positional(op, CATALOGUE[op].small(Maker(dtype))))
        except TypeError:
            continue
        floats.append(SHORT[dtype])
    parts = [", ".join(floats)]
    for name, value in CATALOGUE[op].small(Maker(torch.float32)).items():
        if name == "packed" or (isinstance(value, Tensor) and value.element_size() == 1):
            parts.append(f"`{name}` {SHORT.get(value.dtype) or str(value.dtype).removeprefix('torch.')}")
    if "k_pages" in OPS[op].names:
        parts.append(f"pages also {', '.join(map(SHORT.get, CODES))}")
    return "; ".join(parts)


def _backends(op: str) -> str:
    found = [each.backend for kind in ("cuda", "cpu") for each in OPS[op].implementations(kind)]
    return ", ".join(each for each in dict.fromkeys(found) if each != "reference") or "-"


def _report(op: str) -> str:
    """A link to the page of the family whose launches the op's are."""
    for family, launches in SHIPPED.items():
        if any(op_of(shipped) == op for shipped in launches):
            return f"[{family}](../reference/kernels/{family}.md)"
    return "-"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(MARK)] + MARK + "\n" + tables(), encoding="utf-8")
