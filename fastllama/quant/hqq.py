"""placeholder"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.quant.weight import QuantizedWeight


def hqq(weight: Tensor, group_size: int | None, dtype: torch.dtype) -> QuantizedWeight:
    """Placeholder."""
    raise NotImplementedError
