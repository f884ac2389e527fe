"""Table lookups with bounds checks."""

from __future__ import annotations

import math

from torch import Tensor


def lookup(table: Tensor, rows: Tensor) -> Tensor:
    """table [N, H] at integer rows [T]: [T, H]; NaN for a row outside of the table."""
    num_rows = table.shape[0]
    if not num_rows:
        return table.new_full((rows.shape[0], table.shape[1]), math.nan)
    exists = (rows >= 0) & (rows < num_rows)
    return table.index_select(0, rows.clamp(0, num_rows - 1)).masked_fill(~exists[:, None], math.nan)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows weight[ids] of [V, H]; NaN for an id outside of the table."""
    return lookup(weight, ids)
