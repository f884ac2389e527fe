"""The suite of ops: what it measures on which device, in what order, and how it records a failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllama.bench.ops import comparison, suite
from fastllama.bench.ops.report import OURS, Record
from fastllama.bench.ops.suite import OpsOptions, calls, failed, measure
from fastllama.catalogue.table import CATALOGUE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOY: dict[str, Any] = {"shape": "toy", "device": "cpu", "peers": False}


def quiet(line: str) -> None:
    """Discards progress."""


def test_all_that_are_for_a_device_are_measured_there() -> None:
    assert {call.op for call in calls(OpsOptions(), CPU)} == set(CATALOGUE)
    on_cuda = list(calls(OpsOptions(), CUDA))
    assert set(CATALOGUE) - {call.op for call in on_cuda} == {"matmul_bf12"}
    assert {call.sizes.name for call in on_cuda} == {"llama-2-7b"}
    assert {call.dtype for call in on_cuda} == {torch.bfloat16}
    assert len(on_cuda) == sum(len(CATALOGUE[op].shapes) for op in CATALOGUE if op != "matmul_bf12")


def test_a_cpu_measures_the_most_informative_cases_only() -> None:
    found = list(calls(OpsOptions(ops=("silu_mul", "attention_decode")), CPU))
    assert [(call.op, call.rows, call.sizes.name) for call in found] == [
        ("silu_mul", 8192, "tinyllama-1.1b"),
        ("attention_decode", 1, "tinyllama-1.1b"),
        ("silu_mul", 1, "tinyllama-1.1b"),
        ("attention_decode", 64, "tinyllama-1.1b"),
    ]
    assert len(list(calls(OpsOptions(ops=("silu_mul",), most=3, dtype="float32"), CPU))) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ops": ("rmsnorm",)}, "op is 'rmsnorm' .did you mean 'rms_norm'"),
        ({"shape": "8b"}, "shape is '8b'"),
        ({"most": 0}, "most is 0"),
        ({"minutes": -1.0}, "minutes is -1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OpsOptions(**options)


def test_an_op_that_is_not_for_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="op on cuda is 'matmul_bf12'"):
        list(calls(OpsOptions(ops=("matmul_bf12",)), CUDA))


def test_a_record_has_conditions_ceilings_and_samples() -> None:
    kept: list[int] = []
    options = OpsOptions(ops=("rms_norm", "matmul"), dtype="float32", **TOY | {"peers": True})
    record = measure(options, quiet, lambda record: kept.append(len(record["cases"])))
    assert [case["op"] for case in record["cases"]] == ["rms_norm", "matmul"]
    assert record["conditions"]["dtype"] == "float32"
    assert "fp32_flops_per_second" in record["ceilings"]
    assert kept == [1, 2, 2]
    for case in record["cases"]:
        ours = case["contenders"][OURS]
        assert len(ours["eager"]["seconds"]) == comparison.ROUNDS
        assert ours["error"] <= ours["bound"]
    assert list(record["cases"][0]["contenders"]) == [OURS, "torch eager", "torch.compile", "F.rms_norm"]
    assert not failed(record)


def test_no_time_is_named() -> None:
    record = measure(OpsOptions(ops=("rms_norm",), minutes=0.0, **TOY), quiet)
    assert record["skipped"] == ["rms_norm, toy, 3 rows: no time left"]
    assert record["cases"] == []


def test_what_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = comparison.measure

    def broken(case: Any, *args: Any) -> Record:
        if case.op == "rms_norm":
            raise RuntimeError("no such launch")
        if case.op == "rope":
            raise MemoryError
        return right(case, *args)

    monkeypatch.setattr(suite.comparison, "measure", broken)
    record = measure(OpsOptions(ops=("rms_norm", "rope", "silu_mul"), **TOY), quiet)
    assert record["cases"][0]["contenders"][OURS] == {"failed": "RuntimeError: no such launch"}
    assert record["skipped"] == ["rope, toy, 3 rows: does not fit in memory"]
    assert record["cases"][1]["op"] == "silu_mul"
    assert failed(record)
