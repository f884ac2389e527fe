"""write_kv: keys and values from separate tensors into pages, plain or quantized."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.kernels.reference.quantize import LARGEST_CODE
from tests.kernels.honest import DTYPES, assert_equal, backends, implementation, on_cpu, public
from tests.kernels.ops.test_quantized_pages import legal_codes
from tests.kernels.ops.test_rope import UNTOUCHED, pages_of

CODES = list(LARGEST_CODE)
PAGES, PAGE_SIZE = 3, 5
every_backend = pytest.mark.parametrize("backend", backends("write_kv"))
every_code = pytest.mark.parametrize("code", CODES, ids=str)
# tokens, key heads, D: MHA, GQA, MQA, odd dimensions, one alone, nothing
SHAPES = [(5, 4, 64), (3, 2, 16), (1, 1, 128), (4, 3, 7), (2, 1, 1), (0, 2, 8)]


def keys_and_values(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(shape).to(dtype) for _ in "kv")
    return k, v


def some_slots(tokens: int) -> Tensor:
    """Distinct slots, out of order; from the second token on every third is padding, and the last is past the end."""
    slots = torch.randperm(PAGES * PAGE_SIZE)[:tokens]
    slots[1::3] = -1
    slots[4::3] = PAGES * PAGE_SIZE
    return slots


def written(pages: Tensor, slots: Tensor) -> Tensor:
    """The pages' contents at the legal slots, [T', Hkv, ...]."""
    kept = slots[(slots >= 0) & (slots < PAGES * PAGE_SIZE)]
    return pages.transpose(1, 2).flatten(0, 1)[kept]


def held(heads: int, head_dim: int, dtype: torch.dtype, order: str = "HND") -> list[Tensor]:
    """k_pages and v_pages, UNTOUCHED."""
    return [pages_of(order, PAGES, heads, PAGE_SIZE, head_dim, torch.float32).to(dtype) for _ in "kv"]


def scales_of(heads: int) -> list[Tensor]:
    """k_scales and v_scales, UNTOUCHED."""
    return [torch.full((PAGES, heads, PAGE_SIZE), UNTOUCHED) for _ in "kv"]


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_each_token_is_copied_to_its_slot_alone(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], order: str
) -> None:
    tokens, heads, head_dim = shape
    k, v = keys_and_values(shape, dtype)
    slots, pages = some_slots(tokens), held(heads, head_dim, dtype, order)
    expected = [torch.full((PAGES, heads, PAGE_SIZE, head_dim), UNTOUCHED, dtype=dtype) for _ in "kv"]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < PAGES * PAGE_SIZE:
            page, place = divmod(slot, PAGE_SIZE)
            expected[0][page, :, place], expected[1][page, :, place] = k[token], v[token]
    assert public("write_kv", backend)(k, v, slots, *pages) is None
    for found, right in zip(pages, expected, strict=True):
        assert_equal(found, right)


@every_backend
def test_strides_of_all_kinds_and_int32_slots(backend: str) -> None:
    """Keys cut out of a fused projection, values [Hkv, T, D] in memory, pages cut out of one buffer."""
    fused = torch.randn(3, 8, 20)
    k, v = fused[:, 4:6, 3:19], torch.randn(2, 3, 16).transpose(0, 1)
    pool = torch.full((PAGES, 2, 4, PAGE_SIZE, 24), UNTOUCHED)
    k_pages, v_pages = pool[:, 0, 1:3, :, 4:20], pool[:, 1, :2, :, :16]
    slots = torch.tensor([6, 14, 0])
    public("write_kv", backend)(k, v, slots.int(), k_pages, v_pages)
    assert_equal(written(k_pages, slots), k)
    assert_equal(written(v_pages, slots), v)
    assert (pool == UNTOUCHED).sum() == pool.numel() - k.numel() - v.numel()


@every_code
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_computed_scales_and_codes_are_those_of_rope_and_write_kv(
    backend: str, dtype: torch.dtype, code: torch.dtype
) -> None:
    """With no dimension rotated, for keys and values alike, finite or not."""
    k, v = keys_and_values((9, 2, 16), dtype)
    k[2, 1, 3], v[5, 0, 0], v[7] = math.inf, math.nan, 0.0
    slots, none = some_slots(9), torch.zeros(9, dtype=torch.int64)
    ours, theirs = ([*held(2, 16, code), *scales_of(2)] for _ in range(2))
    public("write_kv", backend)(k, v, slots, *ours)
    qkv, cos_sin = torch.cat((k[:, :1], k, v), 1).flatten(1), torch.empty(1, 0)
    public("rope_and_write_kv", backend)(qkv, cos_sin, none, slots, *theirs)
    for found, right in zip(ours, theirs, strict=True):
        assert_equal(found.float(), right.float())


@every_code
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_codes_under_given_scales_are_quotients_rounded_to_nearest(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], code: torch.dtype
) -> None:
    """Divided in fp32, as NumPy divides; multiplying by the reciprocal changes the last place of one value in 50."""
    tokens, heads, head_dim = shape
    k, v = keys_and_values(shape, dtype)
    slots, pages = some_slots(tokens), held(heads, head_dim, code)
    public("write_kv", backend)(k, v, slots, *pages, k_scale=0.013, v_scale=0.3)
    kept = (slots >= 0) & (slots < PAGES * PAGE_SIZE)
    for found, x, scale in zip(pages, (k, v), (0.013, 0.3), strict=True):
        quotient = torch.from_numpy(x[kept].float().numpy() / torch.tensor(scale).numpy())
        quotient = quotient.clamp(-LARGEST_CODE[code], LARGEST_CODE[code])
        expected = (quotient.round() if code == torch.int8 else quotient).to(code)
        assert_equal(written(found, slots).view(torch.uint8), expected.view(torch.uint8))
        untouched = found.float() == UNTOUCHED
        assert untouched.transpose(1, 2).flatten(0, 1).all(-1).all(-1).sum() >= PAGES * PAGE_SIZE - int(kept.sum())


@every_code
@every_backend
def test_ties_under_a_given_scale_go_to_the_even_code(backend: str, code: torch.dtype) -> None:
    """Every value and the middles between them, at a scale of 2, which divides exactly."""
    values = legal_codes(code)
    numbers = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
    x = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 16)).view(1, -1, 16)
    pages = held(x.shape[1], 16, code)
    public("write_kv", backend)(2 * x, 2 * x, torch.tensor([4]), *pages, k_scale=2.0, v_scale=2)
    expected = (x.round() if code == torch.int8 else x).to(code)
    for found in pages:
        assert_equal(found[0, :, 4].view(torch.uint8), expected[0].view(torch.uint8))


@every_code
@every_backend
def test_what_a_given_scale_does_not_reach(backend: str, code: torch.dtype) -> None:
    """Becomes the largest value, as do infinities and overflowing quotients; NaN stays NaN in fp8, and is 0 in int8."""
    largest = LARGEST_CODE[code]
    x = torch.tensor([largest + 0.49, -largest - 1e3, 3e38, math.inf, -math.inf, math.nan, -0.0, 1e-45, 1.0])
    pages = held(1, 9, code)
    public("write_kv", backend)(x[None, None], x[None, None], torch.tensor([0]), *pages, k_scale=1.0, v_scale=0.25)
    nan = 0.0 if code == torch.int8 else math.nan
    expected = torch.tensor([largest, -largest, largest, largest, -largest, nan, 0.0, 0.0, 1.0])
    for found, last in zip(pages, (1.0, 4.0), strict=True):
        expected[-1] = last
        torch.testing.assert_close(found[0, 0, 0].float(), expected, rtol=0, atol=0, equal_nan=True)


@every_code
@pytest.mark.parametrize("scale", [torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max])
@every_backend
def test_the_smallest_and_the_largest_scale(backend: str, scale: float, code: torch.dtype) -> None:
    x, pages = torch.tensor([[[0.0, scale, -3 * scale if scale < 1 else -scale]]]), held(1, 3, code)
    public("write_kv", backend)(x, x, torch.tensor([0]), *pages, k_scale=scale, v_scale=scale)
    expected = torch.tensor([0.0, 1.0, -3.0 if scale < 1 else -1.0])
    for found in pages:
        assert_equal(found[0, 0, 0].float(), expected)


@pytest.mark.parametrize("backend", on_cpu("write_kv"))
def test_the_oracle_is_fp64_throughout(backend: str) -> None:
    x, pages = torch.randn(2, 1, 4, dtype=torch.float64), held(1, 4, torch.float64)
    public("write_kv", backend)(x, -x, torch.tensor([3, 9]), *pages)
    assert_equal(written(pages[0], torch.tensor([3, 9])), x)
    assert_equal(written(pages[1], torch.tensor([3, 9])), -x)
    codes = held(1, 4, torch.int8)
    public("write_kv", backend)(x, x, torch.tensor([3, 9]), *codes, k_scale=0.01, v_scale=0.01)
    assert_equal(written(codes[0], torch.tensor([3, 9])), (x / 0.01).clamp(-127, 127).round().to(torch.int8))


@every_code
@every_backend
def test_a_token_alone_is_written_as_in_a_batch(backend: str, code: torch.dtype) -> None:
    k, v = keys_and_values((9, 1, 16), torch.float32)
    slots = torch.arange(9)
    batch, alone = ([*held(1, 16, code), *scales_of(1)] for _ in range(2))
    public("write_kv", backend)(k, v, slots, *batch)
    public("write_kv", backend)(k[6:7], v[6:7], slots[6:7], *alone)
    for together, single in zip(batch, alone, strict=True):
        assert_equal(single[1, :, 1].float(), together[1, :, 1].float())


def arguments(code: torch.dtype, scale: float | None = None) -> dict[str, Any]:
    """A call with scales that are computed, or with one that is given."""
    k, v = keys_and_values((3, 2, 8), torch.float32)
    k_pages, v_pages = held(2, 8, code)
    k_scales, v_scales = (None, None) if scale else scales_of(2)
    given = {"k": k, "v": v, "slots": torch.tensor([4, -1, 0]), "k_pages": k_pages, "v_pages": v_pages}
    return given | {"k_scales": k_scales, "v_scales": v_scales, "k_scale": scale, "v_scale": scale}


NORMAL = "legal: from 1.175e-38 to 3.403e+38, the normal numbers of fp32"
INT8 = {"k_scales": None, "v_scales": None}
NO_CODES = {"k_pages": torch.ones(3, 2, 5, 8), "v_pages": torch.ones(3, 2, 5, 8)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k_scale": 0.5}, ValueError, "k_scale is 0.5; legal where k_scales is a tensor: None"),
        ({"v_scale": 0.5}, ValueError, "v_scale is 0.5; legal where v_scales is a tensor: None"),
        ({"k_scales": None, "k_scale": 0.5}, ValueError, "k_scale is 0.5, v_scale None; legal for pages of torch.int8"),
        ({"k_scales": None}, ValueError, "k_scales is None; legal for pages of torch.int8: a tensor [3, 2, 5]"),
        (INT8 | {"k_scale": 0.0, "v_scale": 1.0}, ValueError, f"k_scale is 0.0; {NORMAL}"),
        (INT8 | {"k_scale": 1.0, "v_scale": -1.0}, ValueError, f"v_scale is -1.0; {NORMAL}"),
        (INT8 | {"k_scale": 1.0, "v_scale": math.nan}, ValueError, f"v_scale is nan; {NORMAL}"),
        (INT8 | {"k_scale": math.inf, "v_scale": 1.0}, ValueError, f"k_scale is inf; {NORMAL}"),
        (INT8 | {"k_scale": 1e-40, "v_scale": 1.0}, ValueError, f"k_scale is 1e-40; {NORMAL}"),
        (INT8 | {"k_scale": "1", "v_scale": 1.0}, TypeError, "k_scale is '1' of type str; legal: a number"),
        (NO_CODES, ValueError, "k_scales is a tensor [3, 2, 5]; legal for pages of torch.float32: None"),
        (INT8 | NO_CODES | {"k_scale": 1.0}, ValueError, "k_scale is 1.0; legal for pages of torch.float32: None"),
        (INT8 | NO_CODES | {"v_scale": 1.0}, ValueError, "v_scale is 1.0; legal for pages of torch.float32: None"),
        ({"k": torch.ones(3, 2, 4)}, ValueError, "k has shape [3, 2, 4]; legal: [T, 2, 8]"),
        ({"v": torch.ones(2, 2, 8)}, ValueError, "v has shape [2, 2, 8]; legal: [3, 2, 8]"),
        ({"v": torch.ones(3, 2, 8).half()}, TypeError, "v has dtype torch.float16; legal: torch.float32"),
        ({"k": torch.ones(3, 8, 2).mT}, ValueError, "k has strides [16, 1, 2]; legal: a contiguous last dimension"),
        ({"slots": torch.arange(4)}, ValueError, "slots has shape [4]; legal: [3]"),
        ({"slots": torch.ones(3)}, TypeError, "slots has dtype torch.float32; legal: torch.int32, torch.int64"),
        ({"v_pages": torch.ones(3, 2, 5, 8)}, TypeError, "v_pages has dtype torch.float32; legal: torch.int8"),
        ({"k_pages": torch.ones(3, 2, 5)}, ValueError, "k_pages has shape [3, 2, 5]; legal: [P, Hkv, page_size, D]"),
    ],
)
def test_nothing_is_written_by_a_call_that_is_not_legal(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = arguments(torch.int8) | changed
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        kernels.write_kv(**given)
    for name, value in before.items():
        assert_equal(given[name], value)


def test_pages_may_not_be_the_keys() -> None:
    pages = torch.zeros(PAGES, 2, PAGE_SIZE, 8)
    with pytest.raises(ValueError, match="k_pages"):
        kernels.write_kv(pages[:, :, 0], torch.ones(3, 2, 8), torch.arange(3), pages, torch.zeros_like(pages))
    assert not pages.any()


@every_backend
def test_pages_of_keys_and_of_values_may_be_views_that_overlap(backend: str) -> None:
    """transformers' pool: pages of keys and of values by turns, values as the same view begun a page later."""
    pool, (k, v) = torch.zeros(7, PAGE_SIZE, 2, 8), keys_and_values((4, 2, 8), torch.float32)
    k_pages, v_pages = (pool[start : start + 6].transpose(1, 2) for start in (0, 1))
    slots = torch.tensor([0, 3, 2 * PAGE_SIZE, 4 * PAGE_SIZE + 1])
    for _ in range(2):  # checked anew, and known
        public("write_kv", backend)(k, v, slots, k_pages, v_pages)
    tokens = pool.flatten(0, 1)
    assert_equal(tokens[slots], k)
    assert_equal(tokens[slots + PAGE_SIZE], v)


@pytest.mark.parametrize("start", [0, 8])
def test_pages_of_keys_are_not_those_of_values(start: int) -> None:
    """Nor begun within a page of these."""
    memory, (k, v) = torch.zeros(PAGES * 2 * PAGE_SIZE * 8 + start), keys_and_values((3, 2, 8), torch.float32)
    k_pages, v_pages = (memory[at:].as_strided((PAGES, 2, PAGE_SIZE, 8), (80, 40, 8, 1)) for at in (0, start))
    with pytest.raises(ValueError, match="k_pages shares memory with v_pages"):
        kernels.write_kv(k, v, torch.arange(3), k_pages, v_pages)
    assert not memory.any()


@pytest.mark.parametrize("scale", [None, 0.02])
def test_opcheck(scale: float | None) -> None:
    """With int8 alone: torch's check compares the arguments before and after, and does not compare float8."""
    given = (*arguments(torch.int8, scale).values(),)
    torch.library.opcheck(torch.ops.fastllama.write_kv.default, given)


@pytest.mark.parametrize("scale", [None, 0.02])
@every_code
@every_backend
def test_compiled_is_eager(backend: str, code: torch.dtype, scale: float | None, bind: Callable[..., None]) -> None:
    bind("write_kv", implementation("write_kv", backend))
    given = arguments(code, scale)
    ours, theirs = (
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()} for _ in range(2)
    )
    torch.compiler.reset()
    compiled = torch.compile(lambda **args: kernels.write_kv(**args), fullgraph=True, backend="aot_eager")
    assert compiled(**ours) is None
    kernels.write_kv(**theirs)
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert_equal(value.float(), theirs[name].float())
            assert name in ("k", "v", "slots") or not (value.float() == UNTOUCHED).all()
