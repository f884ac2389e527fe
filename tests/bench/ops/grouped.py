"""Small matmuls with a 4-bit weight of two groups of scales, for the tests of quantized peers."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from fastllama import kernels
from fastllama.bench.ops.formulas import Function
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.sizes import TOY

GROUPED = dataclasses.replace(TOY, name="grouped", hidden=256)  # two groups of 128


class StandIn(Protocol):
    """Stands for a library that needs a GPU. packed: the weights given to it so far."""

    packed: int


def matmul_arguments(
    group: int = 128, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int] = (192, 256)
) -> Arguments:
    """Three random rows x and a random 4-bit weight of this shape."""
    codes = torch.randint(16, shape, dtype=torch.uint8)
    scales = torch.randn(shape[0], shape[1] // group).to(dtype)
    return {"x": torch.randn(3, shape[1]).to(dtype), "packed": kernels.pack_int4(codes), "scales": scales}


def assert_prepared_once(run: Function, library: StandIn) -> None:
    """Assert that a weight is prepared at its first matmul only, and never mistaken for another."""
    sets = [matmul_arguments(), matmul_arguments()]
    first = [run(inputs) for inputs in sets]
    again = [run(inputs) for inputs in sets]
    assert library.packed == 2
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, again))
    del sets, first, again
    for number in range(3, 8):  # memory that was given back would soon be another weight's
        run(matmul_arguments())
        assert library.packed == number
