"""FlashInfer's silu_and_mul on our op."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.calls import CALLS, NoHostRead, half_unit
from tests.integrations.flashinfer.conftest import Library

FP32 = 1e-6  # relative, of exp, a division and two multiplications in fp32


def exact(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def assert_rounded_once(found: Tensor, expected: Tensor) -> None:
    legal = (half_unit(found.dtype) + FP32) * expected.abs() + torch.finfo(found.dtype).smallest_normal
    assert bool(((found.double() - expected).abs() <= legal).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_silu_and_mul_is_exact_and_rounded_once(library: Library, dtype: torch.dtype) -> None:
    x = torch.randn(5, 64, dtype=dtype, device=library.device)
    out = torch.empty(5, 32, dtype=dtype, device=library.device)
    assert_rounded_once(library.module.silu_and_mul(x), exact(x))
    library.module.silu_and_mul(x, out=out, enable_pdl=False)
    assert torch.equal(out, library.module.silu_and_mul(x))


@CALLS
def test_random_legal_calls_are_exact_and_rounded_once(calls: int) -> None:
    rng = random.Random(3)
    for _ in range(calls):
        dtype, size = rng.choice((torch.bfloat16, torch.float16, torch.float32)), rng.randint(1, 40)
        leading = [rng.randint(0, 4) for _ in range(rng.randint(0, 2))]
        x = torch.randn(*leading, 2 * size + 4, dtype=dtype)[..., rng.randint(0, 4) :][..., : 2 * size] * 3
        out = rng.choice((None, torch.empty(*leading, size, dtype=dtype)))
        found = flashinfer.silu_and_mul(x, out, rng.choice((None, True)))
        assert out is None or found is out
        assert_rounded_once(found, exact(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 5),), ValueError, r"input has shape \[3, 5\]; legal: \[..., 2I\]"),
        ((torch.ones(()),), ValueError, r"input has shape \[\]; legal"),
        ((torch.ones(3, 4, dtype=torch.float64),), TypeError, "input has dtype torch.float64; legal"),
        ((torch.ones(4, 3).mT,), ValueError, "input has strides"),
        ((torch.ones(3, 4), torch.ones(3, 4)), ValueError, r"out has shape \[3, 4\]; legal: \[3, 2\]"),
        ((torch.ones(3, 4), torch.ones(3, 2).half()), TypeError, "out has dtype torch.float16; legal"),
    ],
)
def test_what_is_illegal_is_refused_by_name_and_nothing_is_written(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flashinfer.silu_and_mul(*arguments)
    assert all(bool((each == 1).all()) for each in arguments)


def test_it_compiles_whole_and_reads_nothing_on_the_host() -> None:
    x = torch.randn(3, 16)
    expected = flashinfer.silu_and_mul(x)
    with NoHostRead():
        assert flashinfer.silu_and_mul(x).shape == (3, 8)
    compiled = torch.compile(flashinfer.silu_and_mul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
