"""The launcher of the RMSNorm kernel. The kernel's values are tested in tests/kernels/ops/test_norm.py."""

from __future__ import annotations

import pytest
import torch

from fastllama import kernels
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch import tuning
from fastllama.kernels.triton.rows.norm import rows_per_program
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, double, public
from tests.kernels.ops.test_norm import EPS, hugging_face, inputs

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.interpreter
@dtypes
@pytest.mark.parametrize("shape", [(33, 64), (100, 17), (5, 1024), (2, 16384), (1, 20000)], ids=str)
def test_several_rows_of_one_program(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A program owns 8 rows of 64, one of 1024 and more; the last program's rows do not all exist."""
    x, residual, weight = inputs(shape, dtype)
    normed, total = public("add_rms_norm", "triton")(x, residual, weight, EPS)
    assert_equal(total, x + residual)
    exact = kernels.reference.rms_norm(*double(total, weight), EPS)
    assert_honest(normed, hugging_face(total, weight), exact)
    assert_equal(public("rms_norm", "triton")(total, weight, EPS), normed)


@pytest.mark.interpreter
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_user_can_force_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    chosen = OPS[op].implementation("cpu")
    assert (chosen.backend, chosen.run.__module__) == ("triton", "fastllama.kernels.triton.rows.norm")


@pytest.mark.parametrize("size", [1, 63, 64, 511, 512, 4096, 5120, 8192, 16384, 1 << 20])
def test_a_thread_has_sixteen_elements_where_rows_are_short(size: int) -> None:
    block = 1 << (size - 1).bit_length()
    warps = tuning.norm(torch.device("cpu"), size=size, itemsize=2).num_warps
    rows = rows_per_program(block, warps)
    assert rows & (rows - 1) == 0
    assert rows * block == 16 * 32 * warps or (rows == 1 and block > 16 * 32 * warps)
