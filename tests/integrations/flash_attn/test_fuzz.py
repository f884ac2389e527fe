"""Random legal calls of flash-attn's three functions against explicit softmax in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllama.integrations import flash_attn
from tests.integrations.flash_attn.calls import Call, dense_call, kvcache_call, varlen_call
from tests.integrations.flash_attn.explicit import assert_near
from tests.rounds import exhaustive

EACH = 200  # calls of a case: ten cases are 2,000 of each function
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[int], Call]]] = {
    "flash_attn_func": (flash_attn.flash_attn_func, dense_call),
    "flash_attn_varlen_func": (flash_attn.flash_attn_varlen_func, varlen_call),
    "flash_attn_with_kvcache": (flash_attn.flash_attn_with_kvcache, kvcache_call),
}


@pytest.mark.parametrize("part", [0, *map(exhaustive, range(1, 10))])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_legal_calls_give_what_the_formula_gives(name: str, part: int) -> None:
    function, make = FUNCTIONS[name]
    for seed in range(part * EACH, (part + 1) * EACH):
        call = make(seed)
        try:
            check(call, function(**call.arguments))
        except Exception as error:
            shapes = {key: list(x.shape) if isinstance(x, torch.Tensor) else x for key, x in call.arguments.items()}
            raise AssertionError(f"call {seed}: {shapes}") from error


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_legal_calls_run_on_the_triton_kernels(name: str, force: Callable[[str], None]) -> None:
    force("triton")
    function, make = FUNCTIONS[name]
    calls = [call for call in map(make, range(12)) if call.arguments["q"].dtype != torch.float64]
    for call in calls:
        check(call, function(**call.arguments))


def check(call: Call, result: Any) -> None:
    """What was returned, and what the cache holds."""
    q = call.arguments["q"]
    out, lse = (result[0], result[1]) if call.lse else (result, None)
    if (asked := call.arguments.get("out")) is not None:
        assert out is asked
    assert out.dtype == q.dtype
    assert_near(out, call.out, q.dtype, 4.0)
    if lse is not None:
        assert len(result) == (3 if call.lse == "return_attn_probs" else 2)
        assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        assert_near(lse, call.expected_lse, torch.promote_types(q.dtype, torch.float32), 4.0)
    if call.cache is not None:
        for name, expected in zip(("k_cache", "v_cache"), call.cache, strict=True):
            assert_near(call.arguments[name], expected, q.dtype, 4.0)
