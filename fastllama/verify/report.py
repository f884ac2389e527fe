"""What a parity check found: one row for each claim, with its error, its bound and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastllama.errors import counted

FORMULAS = "formulas in fp64"
COARSE = "small misreadings of the configuration hide within the rounding of {}: --dtype float32 compares more finely"
Kind = Literal["op", "weights", "layer", "logits", "tokens"]


@dataclass(frozen=True)
class Row:
    """One claim. error, bound: relative to the largest value of the row of the tensor where they occur.

    backend: what runs the op; empty for what is no op.
    """

    kind: Kind
    name: str
    case: str
    error: float
    bound: float
    backend: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; NaN never is."""
        return self.error <= self.bound

    @property
    def strain(self) -> float:
        """The error as a share of the bound: what the worst of several cases is the worst by."""
        if not self.ok:
            return math.inf
        return self.error / self.bound if self.bound else 0.0


@dataclass(frozen=True)
class Report:
    """All rows of one check, and the conditions they hold under. seconds: what the check took, loading included.

    reference: what layers, logits and tokens were compared with, FORMULAS or transformers and its version; ops are
    always compared with formulas.
    """

    model: str
    dtype: str
    device: str
    seconds: float
    rows: tuple[Row, ...]
    reference: str = FORMULAS

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def _against(self) -> str:
        """The reference where it is another than the formulas."""
        return "" if self.reference == FORMULAS else f", against {self.reference}"

    def summary(self) -> str:
        """One line: what agrees, or what does not."""
        conditions = f"{self.dtype}, {self.device}"
        failed = [f"{row.name} ({row.case})" for row in self.rows if not row.ok]
        if failed:
            return f"parity: FAILED in {', '.join(failed)}{self._against} ({conditions})"
        count = {kind: sum(row.kind == kind for row in self.rows) for kind in ("op", "layer")}
        tokens = next(row.case for row in self.rows if row.kind == "tokens")
        ops, rest = counted(count["op"], "op"), f"{counted(count['layer'], 'layer')}, logits and {tokens}"
        if not self._against:
            return f"parity: {ops}, {rest} agree with the reference ({conditions})"
        return f"parity: {ops} agree with {FORMULAS}; with {self.reference}: {rest} ({conditions})"

    def table(self) -> str:
        """Every row, aligned, with a line on the conditions above and the summary below.

        In 16 bits against transformers, one more line: what these may hide.
        """
        cells = [("what", "runs on", "worst case", "error", "bound", "verdict")]
        for row in self.rows:
            verdict = "ok" if row.ok else "FAILED"
            cells.append((row.name, row.backend, row.case, f"{row.error:.1e}", f"{row.bound:.1e}", verdict))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        head = f"model {self.model}, {self.dtype} on {self.device}{self._against}, {self.seconds:.1f} s"
        notes = [COARSE.format(self.dtype)] if self._against and self.dtype != "float32" else []
        return "\n".join([head, "", *map(str.rstrip, lines), "", self.summary(), *notes])

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values; an error that is no number is null."""
        conditions = {name: getattr(self, name) for name in ("model", "dtype", "device", "reference", "seconds")}
        rows = [
            {
                "kind": row.kind,
                "name": row.name,
                "backend": row.backend,
                "case": row.case,
                "error": row.error if math.isfinite(row.error) else None,
                "bound": row.bound,
                "ok": row.ok,
            }
            for row in self.rows
        ]
        return {"ok": self.ok, "summary": self.summary(), **conditions, "rows": rows}


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest |found - exact| of any row, relative to the largest |exact| of that row; inf where one is NaN.

    A row is a vector along the last dimension (a token's hidden state): the few values of a Llama that are a thousand
    times the others must not hide errors in the tokens that lack them. Equal infinities differ by nothing.
    """
    if exact.numel() == 0:
        return 0.0
    found, exact = found.detach().double(), exact.detach().double()
    difference = (found - exact).abs().masked_fill(found == exact, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    size = exact.abs().masked_fill(exact.isinf(), 0.0).amax(-1)
    return float((difference.amax(-1) / size.where(size > 0, 1.0)).max())


def bound_of(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of plain torch in the same dtype, and one rounding of `dtype`; 0 where plain torch is exact."""
    error = error_of(plain, exact)
    return 2 * error + torch.finfo(dtype).eps if error else 0.0
