"""The repaired interpreter computes what torch does, bit for bit, and its patches are undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastllama.testing import selftest, triton_api
from fastllama.testing.interpreter import RepairedBuilder, repaired

pytestmark = pytest.mark.interpreter

N = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = {"e4nv": torch.float8_e4m3fn, "e5": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def _repaired(request: pytest.FixtureRequest) -> Iterator[None]:
    if "stock" in request.fixturenames:
        yield
        return
    with repaired():
        yield


@pytest.fixture
def stock() -> None:
    """The test starts with Triton's interpreter as it is."""


# One program owns all N elements of x, y, z and writes fp32, in every kernel here that has no other line above it.
@triton.jit
def binary_kernel(out_ptr, x_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        r = x + y
    elif OP == "sub":
        r = x - y
    elif OP == "mul":
        r = x * y
    elif OP == "div":
        r = x / y
    elif OP == "neg":
        r = -x
    elif OP == "number":
        r = x * 2.7 + 0.1
    elif OP == "abs":
        r = tl.abs(x)
    elif OP == "maximum":
        r = tl.maximum(x, y)
    elif OP == "minimum":
        r = tl.minimum(x, y)
    elif OP == "greater":
        r = tl.where(x > y, x, y)
    elif OP == "equal":
        r = tl.where(x == tl.abs(x), x, y)
    elif OP == "full":
        r = tl.full([N], 1.2, tl.bfloat16) + x
    elif OP == "clamp":
        r = tl.clamp(x, -0.5, 0.5)
    tl.store(out_ptr + i, r.to(tl.float32))


NAN_AWARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x.float() / y.float(),  # fp32: Triton's rule
    "neg": lambda x, y: -x,
    "number": lambda x, y: x * torch.tensor(2.7, dtype=x.dtype) + torch.tensor(0.1, dtype=x.dtype),
    "abs": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "greater": lambda x, y: torch.where(x > y, x, y),
    "equal": lambda x, y: torch.where(x == x.abs(), x, y),
}


def assert_bits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", NAN_AWARE)
def test_arithmetic(op: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
    out = torch.empty(N)
    binary_kernel[(1,)](out, x, y, OP=op, N=N)
    assert_bits(out, NAN_AWARE[op](x, y))


@triton.jit
def unary_kernel(out_ptr, x_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "exp":
        result = tl.exp(x)
    elif OP == "exp2":
        result = tl.exp2(x)
    elif OP == "log":
        result = tl.log(x)
    else:
        result = tl.log2(x)
    tl.store(out_ptr + i, result)


@pytest.mark.parametrize("op", ["exp", "exp2", "log", "log2"])
def test_elementary_functions_are_the_same_on_every_processor(op: str) -> None:
    """Rounded once from fp64, where NumPy's own in fp32 differ by units from one instruction set to another."""
    x = 10 * torch.rand(4096) + 1e-3
    out = torch.empty(4096)
    unary_kernel[(1,)](out, x, OP=op, N=4096)
    assert_bits(out, getattr(torch, op)(x.double()).float())


def test_a_bf16_constant() -> None:
    x = torch.randn(N).bfloat16()
    out = torch.empty(N)
    binary_kernel[(1,)](out, x, x, OP="full", N=N)
    assert_bits(out, torch.tensor(1.2).bfloat16() + x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["maximum", "minimum"])
def test_the_operand_that_is_a_number_wins(op: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
    x[3] = y[5] = torch.nan
    out = torch.empty(N)
    binary_kernel[(1,)](out, x, y, OP=op, N=N)
    assert_bits(out, {"maximum": torch.fmax, "minimum": torch.fmin}[op](x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_clamp(dtype: torch.dtype) -> None:
    x = torch.randn(N).to(dtype)
    out = torch.empty(N)
    binary_kernel[(1,)](out, x, x, OP="clamp", N=N)
    assert_bits(out, x.clamp(-0.5, 0.5))


@triton.jit
def fma_kernel(out_ptr, x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """(1 + e)^2 - (1 + 2e) is e^2, and 0 where the square is rounded first."""
    eps = torch.finfo(dtype).eps
    x = torch.full((N,), 1 + eps, dtype=dtype)
    z = torch.full((N,), -(1 + 2 * eps), dtype=dtype)
    out = torch.empty(N, dtype=dtype)
    fma_kernel[(1,)](out, x, x, z, N=N)
    assert_bits(out, torch.full((N,), eps * eps))


@triton.jit
def cast_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


CASTS = [
    *((source, target) for source in DTYPES.values() for target in DTYPES.values() if source != target),
    *((source, target) for source in DTYPES.values() for target in FP8.values()),
    *((source, target) for source in FP8.values() for target in DTYPES.values()),
    (torch.int32, torch.bfloat16),
    (torch.bfloat16, torch.int32),
    (torch.int8, torch.bfloat16),
]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    x = (torch.randn(4096) * 100).to(source) if source.is_floating_point else torch.arange(4096).sub(99).to(source)
    out = torch.empty(4096, dtype=target)
    cast_kernel[(1,)](out, x, N=4096)
    assert_bits(out.float(), x.to(target).float())


@pytest.mark.parametrize("target", FP8.values(), ids=FP8)
def test_fp8_saturates(target: torch.dtype) -> None:
    x = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan, 1.96, 448.0, 57344.0])
    out = torch.empty(8, dtype=target)
    cast_kernel[(1,)](out, x, N=8)
    largest = torch.finfo(target).max
    assert_bits(out.float(), x.clamp(-largest, largest).to(target).float())


@triton.jit
def down_kernel(out_ptr, x_ptr, ROUNDING: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding=ROUNDING))


@pytest.mark.parametrize("rounding", ["rtne", "rtz"])
def test_a_named_rounding(rounding: str) -> None:
    x = torch.randn(N)
    out = torch.empty(N, dtype=torch.bfloat16)
    down_kernel[(1,)](out, x, ROUNDING=rounding, N=N)
    towards_zero = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    assert_bits(out.float(), x.bfloat16() if rounding == "rtne" else towards_zero)


# One program reduces or scans each row of x [4, N].
@triton.jit
def reduce_kernel(out_ptr, x_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    row = tl.arange(0, 4)
    x = tl.load(x_ptr + i)
    if OP == "sum":
        tl.store(out_ptr + row, tl.sum(x, 1).to(tl.float32))
    elif OP == "max":
        tl.store(out_ptr + row, tl.max(x, 1).to(tl.float32))
    elif OP == "argmax":
        tl.store(out_ptr + row, tl.argmax(x, 1).to(tl.float32))
    elif OP == "total":
        tl.store(out_ptr, tl.sum(x).to(tl.float32))
    elif OP == "cumsum":
        tl.store(out_ptr + i, tl.cumsum(x, 1).to(tl.float32))
    elif OP == "sort":
        tl.store(out_ptr + i, tl.sort(x).to(tl.float32))


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "argmax": lambda x: x.argmax(1),
    "total": lambda x: x.sum().view(1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1).values,
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_and_scans(op: str, dtype: torch.dtype) -> None:
    """Inputs are small integers, so that every order of summation is exact."""
    x = torch.stack([torch.randperm(N) for _ in range(4)]).sub(N // 2).clamp(-6, 6).float()
    x = (x + torch.arange(N) / 64 if op in ("sort", "max", "argmax") else x).to(dtype)
    out = torch.empty_like(REDUCTIONS[op](x.double()), dtype=torch.float32)
    reduce_kernel[(1,)](out, x, OP=op, N=N)
    expected = REDUCTIONS[op](x.double()).to(dtype) if op != "argmax" else x.double().argmax(1)
    if op == "argmax":
        expected = torch.tensor([row.tolist().index(row.max()) for row in x])
    assert_bits(out, expected)


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision="ieee"))


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *FP8.values()], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-6, 7, (16, 16)).float() for _ in range(2))
    out = torch.empty(16, 16)
    dot_kernel[(1,)](out, a.to(dtype), b.to(dtype), N=16)
    assert_bits(out, a @ b)


@triton.jit
def helper(i):
    return i + tl.sum(tl.zeros([4], tl.int32), 0)


@triton.jit
def loop_kernel(out_ptr, count_ptr, n):
    total = 0
    for i in range(n):
        total += helper(i)
    for i in range(1, tl.load(count_ptr)):
        total += helper(i)
    tl.store(out_ptr, total)


def test_loops_over_runtime_integers() -> None:
    out = torch.empty(1, dtype=torch.int32)
    loop_kernel[(1,)](out, torch.tensor([4], dtype=torch.int32), 5)
    assert out.item() == (0 + 1 + 2 + 3 + 4) + (1 + 2 + 3)


def test_helpers_patch_the_language_once_a_launch(stock: None) -> None:
    calls = mock.Mock(wraps=interpreter._patch_builtin)
    counts = []
    with mock.patch.object(interpreter, "_patch_builtin", calls), repaired():
        out = torch.empty(1, dtype=torch.int32)
        for n in (1, 20):
            calls.reset_mock()
            loop_kernel[(1,)](out, torch.tensor([0], dtype=torch.int32), n)
            counts.append(calls.call_count)
    assert counts[0] == counts[1] > 0


@triton.jit
def mask_kernel(out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, i, mask=(i < 4) & (i >= 0) & (n >= 0))


def test_a_scalar_comparison_joins_a_mask() -> None:
    out = torch.full((8,), -1, dtype=torch.int32)
    mask_kernel[(1,)](out, -1, N=8)
    assert out.tolist() == [-1] * 8
    mask_kernel[(1,)](out, 1, N=8)
    assert out.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


@triton.jit
def overflow_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, (tl.exp(x) / (x - x)).to(tl.float16))


def test_nothing_warns_where_a_gpu_is_silent() -> None:
    out = torch.empty(N, dtype=torch.float16)
    overflow_kernel[(1,)](out, torch.full((N,), 100.0), N=N)
    assert out.isinf().all()


def state() -> list[Any]:
    owners = [interpreter, interpreter.InterpreterBuilder, interpreter.GridExecutor, triton_api.TritonSemantic]
    builder = interpreter.interpreter_builder
    return [*(dict(vars(owner)) for owner in owners), type(builder), builder.options]


def test_everything_is_put_back(stock: None) -> None:
    before = state()
    with repaired(), repaired():
        assert isinstance(interpreter.interpreter_builder, RepairedBuilder)
    assert state() == before
    with pytest.raises(ZeroDivisionError), repaired():
        raise ZeroDivisionError
    assert state() == before


def test_it_needs_the_interpreter(stock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"only where TRITON_INTERPRET=1 before Python starts"), repaired():
        pass


@pytest.mark.parametrize(
    ("name", "wrong"), [("create_fma", "bf16 fma"), ("create_dot", "bf16 dot"), ("cast_impl", "bf16 rounding")]
)
def test_a_triton_that_the_repairs_do_not_fit_is_loud(
    stock: None, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RepairedBuilder, name, getattr(interpreter.InterpreterBuilder, name))
    expected = rf"do not fit the interpreter of Triton {triton.__version__}: .*{wrong}"
    with pytest.raises(RuntimeError, match=expected), repaired():
        selftest.check_repairs.__wrapped__()


def test_a_triton_that_lacks_a_part_is_loud(stock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_fma")
    with pytest.raises(RuntimeError, match=r"has no InterpreterBuilder.create_fma$"), repaired():
        pass
