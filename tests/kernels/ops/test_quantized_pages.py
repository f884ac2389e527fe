"""rope_and_write_kv into int8 and float8_e4m3fn pages: quotients rounded to nearest, one scale per token and head."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels import reference
from fastllama.kernels.reference.quantize import LARGEST_CODE
from tests.kernels.honest import DTYPES, assert_equal, backends, implementation, public
from tests.kernels.ops.test_rope import SHAPES, UNTOUCHED, both_pairings, cache, queries_and_keys

CODES = list(LARGEST_CODE)
PAGES, PAGE_SIZE = 3, 5
EPS = torch.finfo(torch.float32).eps
every_backend = pytest.mark.parametrize("backend", backends("rope_and_write_kv"))
every_code = pytest.mark.parametrize("code", CODES, ids=str)


def pages_and_scales(num_kv_heads: int, head_dim: int, code: torch.dtype) -> list[Tensor]:
    """k_pages, v_pages, k_scales, v_scales, all of them UNTOUCHED."""
    pages = [torch.full((PAGES, num_kv_heads, PAGE_SIZE, head_dim), UNTOUCHED).to(code) for _ in "kv"]
    return pages + [torch.full((PAGES, num_kv_heads, PAGE_SIZE), UNTOUCHED) for _ in "kv"]


def legal_codes(code: torch.dtype) -> Tensor:
    """All values of the pages' dtype in use, ascending, in fp64."""
    if code == torch.int8:
        return torch.arange(-127, 128).double()
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(code).double()
    return values[~values.isnan()].sort().values


def write_values(backend: str, values: Tensor, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantized values [heads, D] and scales [heads] of the given heads of v; everything else is zero."""
    heads, head_dim = values.shape
    qkv = torch.cat((torch.zeros(1 + heads, head_dim, dtype=values.dtype), values)).flatten()[None]
    held = pages_and_scales(heads, head_dim, code)
    place = torch.zeros(1, dtype=torch.int64)
    public("rope_and_write_kv", backend)(qkv, cache(head_dim), place, place, *held)
    return held[1][0, :, 0], held[3][0, :, 0]


@both_pairings
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_code
@every_backend
def test_codes_are_the_nearest(
    backend: str, code: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool
) -> None:
    """Against the exact rotation in fp64; truncation would be off by up to a whole step."""
    tokens, _, num_kv_heads, head_dim, _ = shape
    q, k, cos_sin, positions = queries_and_keys(shape, dtype)
    v = torch.randn(k.shape).to(dtype)
    slots = torch.randperm(PAGES * PAGE_SIZE)[:tokens]
    slots[1::2] = -1
    held = pages_and_scales(num_kv_heads, head_dim, code)
    qkv = torch.cat((q, k, v), 1).flatten(1)
    q_out = public("rope_and_write_kv", backend)(qkv, cos_sin, positions, slots, *held, interleaved=interleaved)

    plain = [torch.zeros(PAGES, num_kv_heads, PAGE_SIZE, head_dim, dtype=dtype) for _ in "kv"]
    expected_q = public("rope_and_write_kv", backend)(qkv, cos_sin, positions, slots, *plain, interleaved=interleaved)
    assert_equal(q_out, expected_q)
    _, exact_k = reference.rope(q.double(), k.double(), cos_sin.double(), positions, interleaved)
    values, largest = legal_codes(code), LARGEST_CODE[code]
    written = torch.zeros(PAGES, PAGE_SIZE, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, place = divmod(slot, PAGE_SIZE)
        written[page, place] = True
        for pages, scales, exact in ((held[0], held[2], exact_k[token]), (held[1], held[3], v[token].double())):
            scale = scales[page, :, place].double()
            expected = exact.abs().amax(-1) / largest
            assert ((scale - expected).abs() <= 4 * EPS * expected).all()
            quotient = exact / scale[:, None]
            nearest = (quotient[..., None] - values).abs().amin(-1)
            found = (quotient - pages[page, :, place].double()).abs()
            assert (found <= nearest + 4 * EPS * largest).all()
    for tensor in held:
        assert (tensor.float().transpose(1, 2)[~written] == UNTOUCHED).all()


@every_code
@every_backend
def test_ties_go_to_the_even_code(backend: str, code: torch.dtype) -> None:
    """Every value, and the middles between them, exact in fp32, at scale 1: as torch rounds, bit for bit."""
    values = legal_codes(code)
    numbers = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
    heads = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 15)).view(-1, 15)
    heads = torch.cat((heads, torch.full((heads.shape[0], 1), LARGEST_CODE[code])), 1)
    codes, scales = write_values(backend, heads, code)
    assert_equal(scales, torch.ones_like(scales))
    expected = heads.round() if code == torch.int8 else heads
    assert_equal(codes.view(torch.uint8), expected.to(code).view(torch.uint8))


@every_code
@every_backend
def test_a_head_of_zeros_or_of_tiny_values(backend: str, code: torch.dtype) -> None:
    """No division by zero, and no scale without a reciprocal."""
    values = torch.tensor([[0.0] * 8, [1e-38] * 8, [1e-30] * 8, [1e30] * 8])
    codes, scales = write_values(backend, values, code)
    back = codes.double() * scales[:, None].double()
    assert (scales > 0).all()
    assert scales.isfinite().all()
    torch.testing.assert_close(back[2:], values[2:].double(), rtol=4 * EPS, atol=0)
    assert (back[:2].abs() < 1e-30).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@every_code
@every_backend
def test_what_is_not_finite_reads_back_as_nan_in_its_head_alone(backend: str, code: torch.dtype, bad: float) -> None:
    values = torch.randn(3, 16)
    expected, _ = write_values(backend, values, code)
    values[1, 5] = bad
    codes, scales = write_values(backend, values, code)
    assert (codes.double() * scales[:, None].double()).isnan().all(-1).tolist() == [False, True, False]
    assert_equal(codes[[0, 2]].view(torch.uint8), expected[[0, 2]].view(torch.uint8))


@every_code
@every_backend
def test_a_token_alone_is_written_as_in_a_batch(backend: str, code: torch.dtype) -> None:
    qkv, positions, slots = torch.randn(9, 4 * 16), torch.arange(9), torch.arange(9)
    batch, alone = (pages_and_scales(1, 16, code) for _ in range(2))
    run = public("rope_and_write_kv", backend)
    run(qkv, cache(16), positions, slots, *batch)
    run(qkv[4:5], cache(16), positions[4:5], slots[4:5], *alone)
    for together, single in zip(batch, alone, strict=True):
        assert_equal(single[0, :, 4].float(), together[0, :, 4].float())


def arguments(code: torch.dtype) -> dict[str, Any]:
    names = ("k_pages", "v_pages", "k_scales", "v_scales")
    place = torch.arange(3)
    given = {"qkv": torch.randn(3, 6 * 8), "cos_sin": cache(8), "positions": place, "slots": place}
    return given | dict(zip(names, pages_and_scales(2, 8, code), strict=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k_scales": None}, ValueError, "k_scales is None; legal for pages of torch.int8: a tensor [3, 2, 5]"),
        ({"v_scales": None}, ValueError, "v_scales is None; legal for pages of torch.int8: a tensor [3, 2, 5]"),
        ({"v_scales": torch.ones(3, 2, 4)}, ValueError, "v_scales has shape [3, 2, 4]; legal: [3, 2, 5]"),
        ({"k_scales": torch.ones(3, 2, 5).half()}, TypeError, "k_scales has dtype torch.float16; legal: torch.float32"),
        ({"v_pages": torch.ones(3, 2, 5, 8)}, TypeError, "v_pages has dtype torch.float32; legal: torch.int8"),
        (
            {"k_pages": torch.ones(3, 2, 5, 8), "v_pages": torch.ones(3, 2, 5, 8)},
            ValueError,
            "k_scales is a tensor [3, 2, 5]; legal for pages of torch.float32: None",
        ),
    ],
)
def test_scales_belong_to_codes(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments(torch.int8) | changed
    before = {name: value.clone() for name, value in given.items() if value is not None}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        kernels.rope_and_write_kv(**given)
    for name, value in before.items():
        assert_equal(given[name], value)


def test_opcheck() -> None:
    """With int8 alone: torch's check compares the arguments before and after, and does not compare float8."""
    given = (*arguments(torch.int8).values(), False, torch.empty(3, 2, 8))
    torch.library.opcheck(torch.ops.fastllama.rope_and_write_kv.default, given)


@every_code
@every_backend
def test_compiled_is_eager(backend: str, code: torch.dtype, bind: Callable[..., None]) -> None:
    op = "rope_and_write_kv"
    bind(op, implementation(op, backend))
    given = arguments(code)
    ours, theirs = ({name: value.clone() for name, value in given.items()} for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(lambda **args: kernels.rope_and_write_kv(**args), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**ours), kernels.rope_and_write_kv(**theirs))
    for name, value in ours.items():
        assert_equal(value.float(), theirs[name].float())
