"""The catalogue's table: small calls whose sizes all differ, and the shapes of every entry."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue import table
from fastllama.catalogue.arguments import outputs
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.sizes import LLAMA_2
from fastllama.catalogue.table import CATALOGUE, Shape, small_call
from fastllama.kernels.dispatch.op import OPS


def test_small_sizes_are_unlike() -> None:
    sizes = (table.T, table.HQ, table.HKV, table.D, table.P, table.SMALL_PAGE, table.POSITIONS, table.VOCAB)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("op", OPS)
def test_a_small_call_has_every_tensor_but_the_log_sum_exp_and_the_scales_of_pages(op: str) -> None:
    call = small_call(op)
    assert list(call) == [name for name in OPS[op].names if name in call or name != "lse_out"]
    absent = {name for name, value in call.items() if value is None}
    assert absent <= {"k_scales", "v_scales", "k_scale", "v_scale", "workspace"}
    assert {value.device.type for value in call.values() if isinstance(value, Tensor)} == {"cpu"}


def test_a_small_weight_in_12_bits_has_two_outliers() -> None:
    """As many outliers as features could be mistaken for the features."""
    call = small_call("matmul_bf12")
    weight = kernels.unpack_bf12(call["codes"], call["outliers"], call["exponent"])
    assert call["outliers"][:, :2].tolist() == [[2, 7], [5, 63]]
    assert (weight[2, 7], weight[5, 63]) == (2.0**40, 2.0**-40)


@pytest.mark.parametrize("op", OPS)
def test_outputs_are_poisoned(op: str) -> None:
    for name, value in small_call(op).items():
        if name in outputs(op):
            poison = value.isnan() if value.dtype.is_floating_point else value == torch.iinfo(value.dtype).max
            assert poison.all(), name


@pytest.mark.parametrize("op", OPS)
def test_small_calls_are_generated_anew(op: str) -> None:
    """By torch's default generator, so that a test that seeds it gets the same calls again."""
    first, second = small_call(op), small_call(op)
    torch.manual_seed(0)
    third = small_call(op)
    torch.manual_seed(0)
    fourth = small_call(op)
    assert not same(first, second)
    assert same(third, fourth)


def same(first: Arguments, second: Arguments) -> bool:
    pairs = [(value, second[name]) for name, value in first.items() if isinstance(value, Tensor)]
    return all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in pairs)


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].has_triton])
def test_calls_without_values_have_the_shapes_of_those_with(op: str) -> None:
    shape = Shape(3, 70 if op == "attention_decode" else 0)
    makers = (Maker(torch.bfloat16, torch.device(kind)) for kind in ("meta", "cpu"))
    without, with_values = (CATALOGUE[op].llama(maker, LLAMA_2[0], shape) for maker in makers)
    assert without.keys() == with_values.keys()
    for name, value in with_values.items():
        if isinstance(value, Tensor):
            assert without[name].device.type == "meta"
            assert (value.shape, value.dtype) == (without[name].shape, without[name].dtype), name
            assert value.stride() == without[name].stride(), name
        else:
            assert without[name] == value, name


@pytest.mark.parametrize("op", CATALOGUE)
def test_shapes_are_measured_once(op: str) -> None:
    assert CATALOGUE[op].shapes
    assert all(a != b for a, b in combinations(CATALOGUE[op].shapes, 2))
