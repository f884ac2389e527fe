"""silu_mul against torch's silu."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastllama import kernels
from fastllama.kernels import reference
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, public

SHAPES = [(1, 2), (3, 126), (2, 5, 100), (1, 11008), (7, 64), (0, 64), (2, 0, 64), (3, 0), (10,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    gate_up = 4 * torch.randn(shape, dtype=torch.float64)
    gate, up = gate_up[..., : shape[-1] // 2], gate_up[..., shape[-1] // 2 :]
    expected = gate / (1 + torch.exp(-gate)) * up
    for given in ((gate_up,), (gate, up)):
        torch.testing.assert_close(reference.silu_mul(*given), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_silu_mul(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = (4 * torch.randn(shape)).to(dtype)
    gate, up = (half.contiguous() for half in gate_up.tensor_split(2, -1))
    for given in ((gate_up,), (gate, up)):
        assert_honest(public("silu_mul", backend)(*given), F.silu(gate) * up, reference.silu_mul(gate_up.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_silu_times_up_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Within half a unit in the last place and fp32's own errors; rounding silu before it is multiplied exceeds it."""
    gate_up = torch.randn(50, 128).to(dtype)
    found, exact = public("silu_mul", backend)(gate_up), reference.silu_mul(gate_up.double())
    unit = torch.finfo(dtype).eps * 2 ** exact.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    assert ((found - exact).abs() <= 0.501 * unit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_far_from_zero_it_is_zero_or_the_identity(backend: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-6e4, -200.0, 200.0, 6e4, math.nan]).to(dtype)
    found = public("silu_mul", backend)(torch.cat((gate, torch.ones_like(gate))))
    assert (found[:2].float().abs() < 1e-30).all()
    assert_equal(found[2:], gate[2:])


@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_strided_rows_and_output(backend: str) -> None:
    gate_up = torch.randn(6, 20).to(torch.bfloat16)
    wide = torch.full((6, 50), math.nan, dtype=torch.bfloat16)
    wide[:, 7:27] = gate_up
    buffer = torch.full((6, 30), 7.0, dtype=torch.bfloat16)
    out = buffer[:, 5:15]
    run = public("silu_mul", backend)
    assert run(wide[:, 7:27], out=out) is out
    assert_equal(out, run(gate_up))
    buffer[:, 5:15] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_gate_up_and_out_have_strides_of_their_own(backend: str) -> None:
    """Rows of gate, up and out have different strides; memory between them is not written."""
    gate_up = torch.randn(6, 20).to(torch.bfloat16)
    gates, ups, buffer = (torch.full((6, width), 7.0, dtype=torch.bfloat16) for width in (50, 13, 30))
    gate, up, out = gates[:, 7:17], ups[:, 2:12], buffer[:, 5:15]
    gate.copy_(gate_up[:, :10])
    up.copy_(gate_up[:, 10:])
    run = public("silu_mul", backend)
    assert run(gate, up, out=out) is out
    assert_equal(out, run(*(half.contiguous() for half in gate_up.chunk(2, dim=-1))))
    assert_equal(gate, gate_up[:, :10])
    for each in (gate, up, out):
        each.fill_(7.0)
    assert (torch.cat((gates, ups, buffer), -1) == 7.0).all()


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_in_place_over_either_half_of_the_projection(backend: str, rows: int, half: int) -> None:
    """Given as one tensor, as its two halves, and as two separate tensors."""
    run, gate_up = public("silu_mul", backend), torch.randn(rows, 140)
    expected = run(gate_up)
    for given in ((gate_up.clone(),), gate_up.clone().chunk(2, dim=-1), [x.clone() for x in gate_up.chunk(2, dim=-1)]):
        out = given[half] if len(given) == 2 else given[0][:, 70 * half : 70 * half + 70]
        assert run(*given, out=out) is out
        torch.testing.assert_close(out, expected, rtol=2**-22, atol=0)  # torch's silu by strides, in its last bit


def test_the_next_row_of_the_gate_is_not_its_other_half() -> None:
    """Where up is a separate tensor, the memory after a row of the gate is the next row, not yet read."""
    buffer, up = torch.randn(6, 10), torch.randn(5, 10)
    before = buffer.clone()
    for out in (buffer[1:], buffer.flatten()[5:55].view(5, 10)):
        with pytest.raises(ValueError, match=r"^out shares memory with gate_up; legal: memory of its own, or gate_up"):
            kernels.silu_mul(buffer[:5], up, out=out)
    assert_equal(buffer, before)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", backends("silu_mul"))
def test_gates_past_the_end_of_exp(backend: str, rows: int) -> None:
    """As torch: silu(-100) is -0 in fp32, also by an up of 3e38, silu(-inf) NaN, and 3e38 * 0.5 * 2 no infinity."""
    gate = torch.tensor([-100.0, -1e4, -3e38, -89.0, -math.inf, math.inf, math.nan, 3e38, -3e38, -80.0])
    up = torch.tensor([3e38, -1e38, -3e38, 3e38, 1.0, 1.0, 1.0, 0.5, math.inf, 3e38])
    found = public("silu_mul", backend)(torch.cat((gate, up)).expand(rows, 20).contiguous())
    torch.testing.assert_close(found, (F.silu(gate) * up).expand(rows, 10), rtol=1e-6, atol=1.0, equal_nan=True)
