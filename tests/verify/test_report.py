"""Errors, bounds and verdicts, and the report that states them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from fastllama.verify import Report, Row
from fastllama.verify.report import FORMULAS, bound_of, error_of

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("found", "exact", "error"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 2.5]], [[1.0, 2.0]], 0.25),
        ([[1.0, -1.5]], [[1.0, -2.0]], 0.25),
        # the row with the small values decides, although its difference is the smallest
        ([[1000.0, 1.0], [1.0, 0.5]], [[1001.0, 1.0], [1.0, 1.0]], 0.5),
        ([[NAN, 1.0]], [[1.0, 1.0]], INF),
        ([[INF, 1.0]], [[1.0, 1.0]], INF),
        ([[-INF, 1.0]], [[-INF, 1.0]], 0.0),
        ([[-INF, 1.5]], [[-INF, 1.0]], 0.5),
        ([[1.0, 1.0]], [[-INF, 1.0]], INF),
        ([[0.25, 0.0]], [[0.0, 0.0]], 0.25),
        ([0.5, 2.0], [1.0, 2.0], 0.25),
        ([], [], 0.0),
    ],
    ids=str,
)
def test_the_error_is_relative_to_its_row(found: object, exact: object, error: float) -> None:
    assert error_of(torch.tensor(found), torch.tensor(exact, dtype=torch.float64)) == error


def test_the_error_of_nothing() -> None:
    assert error_of(torch.empty(3, 0), torch.empty(3, 0)) == 0.0


def test_the_bound_is_twice_plain_torchs_error_and_a_rounding() -> None:
    exact = torch.tensor([[4.0, 1.0]], dtype=torch.float64)
    assert bound_of(torch.tensor([[4.0, 1.5]]), exact, torch.bfloat16) == 0.25 + 2.0**-7
    assert bound_of(torch.tensor([[4.0, 1.5]]), exact, torch.float32) == 0.25 + 2.0**-23
    assert bound_of(exact.float(), exact, torch.float32) == 0.0


ROWS = (
    Row("op", "rms_norm", "x [1, 2]", 1e-7, 2e-7, "triton"),
    Row("op", "matmul", "x [3, 4]", 0.0, 0.0, "cpu"),
    Row("layer", "layer 0", "9 tokens", 1e-7, 1e-7),
    Row("logits", "logits", "9 tokens", 1e-7, 3e-7),
    Row("tokens", "tokens", "4 greedy tokens", 0.0, 0.0),
)


def report(*rows: Row, reference: str = FORMULAS) -> Report:
    return Report("some/model", "float16", "cuda:0", 1.26, rows, reference)


def test_a_report_in_which_all_agree() -> None:
    found = report(*ROWS)
    assert found.ok
    assert found.summary() == (
        "parity: 2 ops, 1 layer, logits and 4 greedy tokens agree with the reference (float16, cuda:0)"
    )
    assert found.table().splitlines() == [
        "model some/model, float16 on cuda:0, 1.3 s",
        "",
        "what      runs on  worst case       error    bound    verdict",
        "rms_norm  triton   x [1, 2]         1.0e-07  2.0e-07  ok",
        "matmul    cpu      x [3, 4]         0.0e+00  0.0e+00  ok",
        "layer 0            9 tokens         1.0e-07  1.0e-07  ok",
        "logits             9 tokens         1.0e-07  3.0e-07  ok",
        "tokens             4 greedy tokens  0.0e+00  0.0e+00  ok",
        "",
        found.summary(),
    ]


def test_a_report_states_what_was_compared_with_another_reference() -> None:
    """Ops are always compared with formulas."""
    found = report(*ROWS, reference="transformers 5.23.0")
    assert found.summary() == (
        "parity: 2 ops agree with formulas in fp64; with transformers 5.23.0: 1 layer, logits and 4 greedy tokens "
        "(float16, cuda:0)"
    )
    assert found.table().startswith("model some/model, float16 on cuda:0, against transformers 5.23.0, 1.3 s\n")
    assert found.as_json()["reference"] == "transformers 5.23.0"
    failed = report(*ROWS, Row("layer", "layer 1", "9 tokens", INF, 1e-7), reference="transformers 5.23.0")
    assert failed.summary() == "parity: FAILED in layer 1 (9 tokens), against transformers 5.23.0 (float16, cuda:0)"


def test_the_table_states_what_16_bits_hide_from_transformers() -> None:
    """The summary has no such line; formulas are given the configuration, and float32 is the finest comparison."""
    found = report(*ROWS, reference="transformers 5.23.0")
    *_, summary, last = found.table().splitlines()
    assert summary == found.summary() == found.as_json()["summary"]
    assert last == (
        "small misreadings of the configuration are below the rounding of float16: --dtype float32 detects more"
    )
    assert replace(found, dtype="float32").table().endswith(replace(found, dtype="float32").summary())


@pytest.mark.parametrize("error", [2.1e-7, INF, NAN])
def test_one_error_beyond_its_bound_fails_it(error: float) -> None:
    bad = Row("op", "rope", "q [5]", error, 2e-7)
    found = report(*ROWS, bad)
    assert not found.ok
    assert bad.strain == INF
    assert found.summary() == "parity: FAILED in rope (q [5]) (float16, cuda:0)"
    assert [line.endswith("FAILED") for line in found.table().splitlines()].count(True) == 1


def test_the_json_is_json() -> None:
    found = report(*ROWS, Row("op", "rope", "q [5]", INF, 2e-7)).as_json()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert not found["ok"]
    assert found["rows"][0] == {
        "kind": "op",
        "name": "rms_norm",
        "backend": "triton",
        "case": "x [1, 2]",
        "error": 1e-7,
        "bound": 2e-7,
        "ok": True,
    }
    assert (found["rows"][-1]["error"], found["rows"][-1]["ok"]) == (None, False)


def test_the_strain_orders_by_how_close_to_the_bound() -> None:
    assert [row.strain for row in ROWS[:3]] == [0.5, 0.0, 1.0]
