"""The result of a parity check: one row per claim, with its error, its bound and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastllama.errors import counted

FORMULAS = "formulas in fp64"
COARSE = "small misreadings of the configuration are below the rounding of {}: --dtype float32 detects more"
Kind = Literal["op", "weights", "layer", "logits", "tokens"]


@dataclass(frozen=True)
class Row:
    """One claim. error, bound: relative to the largest value of the row of the tensor where they occur.

    backend: of the op; empty for other claims.
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
        """The error as a share of the bound, by which the worst case is chosen."""
        if not self.ok:
            return math.inf
        return self.error / self.bound if self.bound else 0.0


@dataclass(frozen=True)
class Report:
    """All rows of one check, and its conditions. seconds: duration, loading included.

    reference: of layers, logits and tokens: FORMULAS, or transformers and its version; ops are always compared with
    formulas.
    """

    model: str
    dtype: str
    device: str
    seconds: float
    rows: tuple[Row, ...]
    reference: str = FORMULAS

    @property
    def ok(self) -> bool:
        """Whether every row is ok."""
        return all(row.ok for row in self.rows)

    @property
    def _against(self) -> str:
        """ ", against REFERENCE" unless it is the formulas."""
        return "" if self.reference == FORMULAS else f", against {self.reference}"

    def summary(self) -> str:
        """One line: the counts, or the disagreements."""
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

        In 16 bits against transformers, one more line on what the rounding may hide.
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
        """The report as JSON values; an error that is not a number is null."""
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

    A row is a vector along the last dimension (a token's hidden state): a Llama's few values a thousand times larger
    than the others must not hide errors in the tokens that lack them. Equal infinities have error 0.
    """
    if exact.numel() == 0:
        return 0.0
    found, exact = found.detach().double(), exact.detach().double()
    difference = (found - exact).abs().masked_fill(found == exact, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    size = exact.abs().masked_fill(exact.isinf(), 0.0).amax(-1)
    return float((difference.amax(-1) / size.where(size > 0, 1.0)).max())


def bound_of(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of plain torch in the same dtype, plus one rounding of `dtype`; 0 where plain torch is exact."""
    error = error_of(plain, exact)
    return 2 * error + torch.finfo(dtype).eps if error else 0.0
