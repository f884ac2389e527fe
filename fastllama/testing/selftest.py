"""A kernel that needs every repair of the interpreter, run once per process to detect an unsupported Triton."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

N = 16


@triton.jit
def _plus(a, b):
    return a + b


# A single program: row i of out is the result with the i-th name in _expected.
@triton.jit
def _kernel(out_ptr, x_ptr, y_ptr, n, N: tl.constexpr):
    row = tl.arange(0, N)
    grid = row[:, None] * N + row[None, :]  # [N, N]
    x = tl.load(x_ptr + row)  # bf16
    y = tl.load(y_ptr + row)  # fp32
    z = y.to(tl.bfloat16)
    loops = 0
    for i in range(n):
        loops = _plus(loops, i)
    small = (grid % 7).to(tl.bfloat16)  # every dot product is exact in any order
    tl.store(out_ptr + row, z.to(tl.float32))
    tl.store(out_ptr + 1 * N + row, ((x + z) * x - z * 1.5).to(tl.float32))
    tl.store(out_ptr + 2 * N + row, -x / z)  # fp32: Triton's rule for a division of two bf16
    tl.store(out_ptr + 3 * N + row, tl.where(x > z, tl.maximum(x, z), tl.zeros([N], tl.bfloat16)).to(tl.float32))
    tl.store(out_ptr + 4 * N + row, tl.fma(x, z, x).to(tl.float32))
    tl.store(out_ptr + 5 * N + row, tl.zeros([N], tl.float32) + tl.sum(x, 0).to(tl.float32))
    tl.store(out_ptr + 6 * N + row, tl.sort(x).to(tl.float32))
    tl.store(out_ptr + 7 * N + row, tl.sum(tl.dot(small, small), 0))
    tl.store(out_ptr + 8 * N + row, (y * 100).to(tl.float8e4nv).to(tl.float32))
    tl.store(out_ptr + 9 * N + row, (y * 100).to(tl.float8e5).to(tl.float32))
    tl.store(out_ptr + 10 * N + row, tl.zeros([N], tl.float32) + loops, mask=(row < N) & (row >= 0) & (n >= 0))
    tl.store(out_ptr + 11 * N + row, tl.sum(tl.where(grid < n, 1.0, 0.0), 1))


def _expected(x: Tensor, y: Tensor, n: int) -> dict[str, Tensor]:
    z = y.bfloat16()
    places = torch.arange(N * N, dtype=torch.int64, device="cpu").view(N, N)
    small = (places % 7).float()
    fp8 = (y * 100).clamp(-448, 448)
    return {
        "bf16 rounding": z,
        "bf16 + - *": (x + z) * x - z * 1.5,
        "bf16 division": -x.float() / z.float(),
        "bf16 comparison": torch.where(x > z, torch.maximum(x, z), 0),
        "bf16 fma": (x.double() * z.double() + x.double()).bfloat16(),
        "bf16 sum": x.double().sum().bfloat16().expand(N),
        "bf16 sort": x.sort().values,
        "bf16 dot": (small @ small).sum(0),
        "fp8 e4m3": fp8.to(torch.float8_e4m3fn),
        "fp8 e5m2": (y * 100).to(torch.float8_e5m2),
        "range of a runtime integer": torch.tensor(n * (n - 1) / 2, dtype=torch.float32, device="cpu").expand(N),
        "masks": (places < n).sum(1),
    }


@functools.cache
def check_repairs() -> None:
    """Raise RuntimeError, naming the wrong operations, unless the repaired interpreter equals torch bit for bit."""
    x, fractions = (torch.arange(*span, dtype=torch.bfloat16, device="cpu") for span in ((-8, 8), (N,)))
    x += fractions / 32
    y = torch.linspace(-5, 7, N, dtype=torch.float32, device="cpu")
    n = 5
    expected = _expected(x, y, n)
    out = torch.full((len(expected), N), torch.nan, dtype=torch.float32, device="cpu")
    _kernel[(1,)](out, x, y, n, N=N)
    wrong = [name for row, (name, exact) in zip(out, expected.items(), strict=True) if not row.equal(exact.float())]
    if wrong:
        raise RuntimeError(f"the repairs do not fit the interpreter of Triton {triton.__version__}: {', '.join(wrong)}")
