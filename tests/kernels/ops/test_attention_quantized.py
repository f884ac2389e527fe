"""Attention over pages of int8 and float8_e4m3fn, against fp64 attention of the dequantized values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.table import small_call
from fastllama.kernels import reference
from fastllama.kernels.reference.quantize import LARGEST_CODE, dequantize_heads, quantize_heads
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, public
from tests.kernels.ops.test_attention import Packed, bounds, packed, paged

OPS = ("attention_prefill", "attention_decode")
every_code = pytest.mark.parametrize("code", list(LARGEST_CODE), ids=str)
every_backend = pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, *each.values, marks=each.marks) if hasattr(each, "marks") else (op, each)
                        for op in OPS for each in backends(op)],
)  # fmt: skip


@dataclass
class Quantized:
    """A batch whose keys and values are in quantized pages; scales of unowned slots are NaN."""

    batch: Packed  # of the dequantized values, in fp64
    dtype: torch.dtype
    tables: tuple[Tensor, ...]  # k_pages, v_pages, page_table, seq_lens
    scales: dict[str, Tensor]

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        q = self.batch.q.to(self.dtype)
        return (q, *self.tables, *((bounds(self.batch.queries),) if op == "attention_prefill" else ()))

    def assert_honest(self, out: Tensor, lse: Tensor) -> None:
        """Against plain torch on keys and values rounded to the queries' dtype."""
        rounded = [x.to(self.dtype) for x in (self.batch.q, self.batch.k, self.batch.v)]
        plain = Packed(*rounded, self.batch.queries, self.batch.lengths).plain()
        for ours, theirs, exact in zip((out, lse), plain, self.batch.exact(), strict=True):
            assert_honest(ours, theirs, exact)


def quantized(batch: Packed, code: torch.dtype, page_size: int, order: str = "HND") -> Quantized:
    parts = [quantize_heads(x.float(), code) for x in (batch.k, batch.v)]
    codes, scales = zip(*parts, strict=True)
    exact = [dequantize_heads(*part, torch.float64) for part in parts]
    held = []
    for k, v, each, poison in (
        (*(x.float() for x in codes), order, 99.0),
        (*(x[..., None] for x in scales), "HND", math.nan),
    ):
        torch.manual_seed(1)  # the same pages for both
        held.append(paged(Packed(batch.q.float(), k, v, batch.queries, batch.lengths), page_size, each, poison))
    pages, beside = held
    return Quantized(
        Packed(batch.q.double(), *exact, batch.queries, batch.lengths),
        batch.q.dtype,
        (pages.k_pages.to(code), pages.v_pages.to(code), pages.page_table, pages.seq_lens),
        {"k_scales": beside.k_pages[..., 0], "v_scales": beside.v_pages[..., 0]},
    )


@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize(("page_size", "order", "heads"), [(5, "HND", "GQA 4"), (64, "NHD", "MHA")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_code
@every_backend
def test_of_the_values_that_codes_stand_for(
    op: str, backend: str, code: torch.dtype, dtype: torch.dtype, page_size: int, order: str, heads: str
) -> None:
    lengths = [1, page_size - 1, page_size + 1, 150, 0]
    queries = [2] * 5 if op == "attention_decode" else [1, page_size - 1, 2, 70, 0]
    given = quantized(packed(queries, lengths, heads, dtype), code, page_size, order)
    found = public(op, backend)(*given.arguments(op), **given.scales, return_lse=True)
    given.assert_honest(*found)
    alone = public(op, backend)(*given.arguments(op), **given.scales)
    given.assert_honest(alone, found[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_scales_of_any_size(op: str, backend: str, dtype: torch.dtype) -> None:
    """Values of 1e-6 and of 1e3, in separate sequences and in one: weights times scales would underflow in fp16."""
    queries = [1, 1, 1]
    batch = packed(queries, [40, 40, 600], "GQA 4", dtype, head_dim=32)
    batch.v[:40] *= 1e-4
    batch.v[40:80] *= torch.logspace(-4, 3, 40)[:, None, None].to(dtype)
    batch.v[80:] *= torch.logspace(3, -4, 600)[:, None, None].to(dtype)
    given = quantized(batch, torch.int8, 16)
    given.assert_honest(*public(op, backend)(*given.arguments(op), **given.scales, return_lse=True))


@every_code
@every_backend
def test_every_code_is_its_value(op: str, backend: str, code: torch.dtype) -> None:
    """One key takes all the weight, so the output is its value, exactly."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(code)
    codes = codes[~codes.float().isnan()]
    pages = codes.view(1, 1, 1, -1)
    scales = torch.full((1, 1, 1), 0.37)
    q, one = torch.zeros(1, 1, codes.numel()), torch.ones(1, dtype=torch.int32)
    rest = (torch.zeros(1, 1, dtype=torch.int32), one, *((bounds([1]),) if op == "attention_prefill" else ()))
    out = public(op, backend)(q, pages, pages, *rest, k_scales=scales, v_scales=scales)
    assert_equal(out[0, 0], codes.float() * 0.37)


@every_backend
def test_a_scale_that_is_nan_reaches_its_sequence_alone(op: str, backend: str) -> None:
    given = quantized(packed([1, 1], [9, 9], "MHA"), torch.int8, 5)
    page = given.tables[2][0, 1]
    given.scales["v_scales"][page, 1, 2] = math.nan
    out = public(op, backend)(*given.arguments(op), **given.scales)
    assert out[0].isnan().all(-1).tolist() == [False, True, False]
    assert out[1].isfinite().all()


@pytest.mark.parametrize("backend", backends("attention_decode"))
@every_code
def test_what_is_written_is_read(backend: str, code: torch.dtype) -> None:
    """A token written by rope_and_write_kv, without rotation: off by half a quantization step at most."""
    heads, head_dim = 4, 32
    qkv, cos_sin = torch.randn(1, 3 * heads * head_dim), torch.tensor([[1.0, 0.0]])
    place = torch.zeros(1, dtype=torch.int64)
    pages = [torch.zeros(1, heads, 16, head_dim).to(code) for _ in "kv"]
    scales = {f"{name}_scales": torch.zeros(1, heads, 16) for name in "kv"}
    q = kernels.rope_and_write_kv(qkv, cos_sin, place, place, *pages, **scales)
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = public("attention_decode", backend)(q, *pages, table, one, **scales)
    v = qkv[0, 2 * heads * head_dim :].view(heads, head_dim)
    step = v.abs().amax(-1, keepdim=True) / (127 if code == torch.int8 else 14)
    assert ((out[0] - v).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("op", OPS)
def test_compiled_and_checked(op: str) -> None:
    given = quantized(packed([1, 1], [9, 21], "GQA 4"), torch.int8, 16)
    names = ("q", "k_pages", "v_pages", "page_table", "seq_lens", "cu_seqlens_q")
    named = dict(zip(names, given.arguments(op), strict=False)) | given.scales
    out = torch.empty_like(named["q"])
    plain: dict[str, Any] = {"scale": 0.3, "base2": False, "out": out}
    torch.library.opcheck(getattr(torch.ops.fastllama, op).default, positional(op, named | plain))
    function = getattr(kernels, op)
    torch.compiler.reset()
    compiled = torch.compile(lambda **args: function(**args), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**named), function(**named))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_scales": None}, ValueError, r"k_scales is None; legal for pages of torch.int8: a tensor \[5, 2, 7\]"),
        ({"v_scales": None}, ValueError, r"v_scales is None; legal for pages of torch.int8: a tensor \[5, 2, 7\]"),
        ({"k_scales": torch.ones(5, 2, 8)}, ValueError, r"k_scales has shape \[5, 2, 8\]; legal: \[5, 2, 7\]"),
        ({"v_scales": torch.ones(5, 2, 7).half()}, TypeError, "v_scales has dtype torch.float16; legal: torch.float32"),
        ({"v_pages": torch.zeros(5, 2, 7, 8)}, TypeError, "v_pages has dtype torch.float32; legal: torch.int8"),
        ({"k_pages": torch.zeros(5, 2, 7, 8), "v_pages": torch.zeros(5, 2, 7, 8)}, ValueError, "k_scales is a tensor"),
    ],
)
def test_scales_and_pages_that_do_not_fit(
    op: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = small_call(op)
    codes = {name: torch.zeros(5, 2, 7, 8, dtype=torch.int8) for name in ("k_pages", "v_pages")}
    given |= codes | {name: torch.ones(5, 2, 7) for name in ("k_scales", "v_scales")}
    getattr(kernels, op)(**given)
    with pytest.raises(error, match=f"^{message}"):
        getattr(kernels, op)(**given | change)


def test_the_oracle_is_in_fp64() -> None:
    """Otherwise its own rounding would count as the kernel's."""
    given = quantized(packed([1], [40], "MHA"), torch.int8, 16)
    q, *rest = given.arguments("attention_decode")
    out, lse = reference.attention_decode(q.double(), *rest, *given.scales.values(), None, None, 0.25)
    exact, sums = given.batch.exact()
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, sums, rtol=1e-13, atol=1e-13)
