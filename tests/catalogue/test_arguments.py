"""Arguments of an op: its outputs, the order in which the op takes them, and how a call is written."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastllama import kernels
from fastllama.catalogue.arguments import as_written, in_order, inputs, outputs, positional, results
from fastllama.catalogue.table import small_call
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS


def test_outputs_are_those_of_the_schema() -> None:
    assert outputs("attention_decode") == ("out", "lse_out")
    assert outputs("add_rms_norm") == ("out", "residual_out")
    assert outputs("rope_and_write_kv") == ("q_out",)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_what_the_reference_takes(op: str) -> None:
    assert list(inputs(op, small_call(op))) == list(inspect.signature(getattr(reference, op)).parameters)


def test_what_a_call_lacks_is_none_by_place() -> None:
    call = small_call("attention_prefill")
    assert positional("attention_prefill", call)[-1] is None
    assert positional("attention_prefill", call)[0] is call["q"]


def test_a_call_that_is_not_the_ops_is_refused() -> None:
    call = small_call("rms_norm")
    for wrong in (call | {"bias": None}, {name: value for name, value in call.items() if name != "eps"}):
        with pytest.raises(ValueError, match="a call of rms_norm has"):
            in_order("rms_norm", wrong)
    assert list(in_order("rms_norm", dict(reversed(call.items())))) == list(call)


def test_what_is_the_default_is_not_written() -> None:
    call = small_call("matmul")
    args, named = as_written("matmul", call | {"bias": None, "residual": None})
    assert args == (call["x"], call["weight"])
    assert set(named) == {"norm", "out"}
    assert as_written("matmul", call | {"gated": True})[1]["gated"] is True


@pytest.mark.parametrize("op", [op for op in OPS if op != "sample"])
def test_a_call_as_it_is_written_is_the_call(op: str) -> None:
    call = small_call(op)
    args, named = as_written(op, inputs(op, call))
    found = results(op, call, getattr(kernels, op)(*args, **named))
    for ours, theirs in zip(found, results(op, call, getattr(kernels, op)(**call)), strict=True):
        if op not in ("rope_and_write_kv", "add_rms_norm_int8"):  # which update their inputs
            assert torch.equal(ours, theirs)
