"""Compares the implementation of every op on this device with explicit fp64 formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastllama import kernels
from fastllama.verify.case import FormulaCase, Results
from fastllama.verify.cases import all_cases
from fastllama.verify.report import Row, bound_of, error_of


def rows(dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """One row per op: its worst case. dtype, device: of the inputs."""
    backends = kernels.backend_of(device)
    for op, cases in itertools.groupby(all_cases(dtype), key=lambda case: case.op):
        worst = max((row for case in cases for row in _judge(case.to(device))), key=lambda row: row.strain)
        yield replace(worst, backend=backends[op].backend)


def _judge(case: FormulaCase) -> Iterator[Row]:
    """A row per output of the op."""
    try:
        found = run(case)
    except Exception as error:  # a kernel that cannot run is a finding, not the end of the report
        yield Row("op", case.op, f"{case.label}: {type(error).__name__}: {error}", math.inf, 0.0)
        return
    exact, plain = (given.expected() for given in (case.to(torch.float64), case))
    for ours, theirs, reference in zip(found, plain, exact, strict=False):  # a formula may return more: the log-sum-exp
        yield Row("op", case.op, case.label, error_of(ours, reference), bound_of(theirs, reference, ours.dtype))


def run(case: FormulaCase) -> Results:
    """The outputs of the public op, and the tensors that it updates in place."""
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.given.items()}
    results = getattr(kernels, case.op)(**given, **case.options)
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    return case.view((*results, *(given[name] for name in case.written)))
