"""Contract: in every test, uninitialised memory is poisoned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]
ALLOCATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda like: torch.empty(3, dtype=like.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided((3,), (1,), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(3),
}


@pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_memory_is_poisoned(dtype: torch.dtype, allocate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    fresh = allocate(torch.zeros(3, dtype=dtype))
    assert fresh.dtype == dtype
    if dtype.is_floating_point:
        assert fresh.float().isnan().all()
    else:
        assert (fresh == torch.iinfo(dtype).max).all()


def test_torch_compile_keeps_the_values() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) + x.new_empty(3).copy_(x)

    assert torch.compile(double, fullgraph=True, backend="eager")(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
