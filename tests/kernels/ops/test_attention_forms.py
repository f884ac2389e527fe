"""Attention without a causal mask over pages, with one scale for all keys and values, and into a given lse_out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import positional
from fastllama.catalogue.table import small_call
from fastllama.kernels.reference.quantize import LARGEST_CODE
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, on_cpu, public
from tests.kernels.ops.test_attention import (
    OPS,
    PAGES,
    Packed,
    assert_both_honest,
    everywhere,
    op_arguments,
    packed,
    paged,
    torch_own,
)

PAGED = ("attention_prefill", "attention_decode")
K_SCALE, V_SCALE = 0.37, 2.9
NAMES = {
    "attention_varlen": ("k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    "attention_prefill": ("k_pages", "v_pages", "page_table", "seq_lens", "cu_seqlens_q"),
    "attention_decode": ("k_pages", "v_pages", "page_table", "seq_lens"),
}
over_pages = pytest.mark.parametrize(
    ("op", "backend"),
    [pytest.param(op, *each.values, marks=each.marks) if hasattr(each, "marks") else (op, each)
     for op in PAGED for each in backends(op)],
)  # fmt: skip


def batch_of(op: str, dtype: torch.dtype = torch.float32, heads: str = "GQA 4", head_dim: int = 16) -> Packed:
    """Three queries each where counts must be equal, cached tokens before some, more queries than tokens, padding."""
    lengths = [5, 40, 2, 0]
    queries = [3] * 4 if op == "attention_decode" else [5, 17, 3, 1]
    return packed(queries, lengths, heads, dtype, head_dim)


def named(op: str, batch: Packed, page_size: int = 16) -> dict[str, Any]:
    return dict(zip(NAMES[op], op_arguments(op, batch, paged(batch, page_size)), strict=True))


@pytest.mark.in_turn("page_size", "head_dim")
@pytest.mark.parametrize("head_dim", [16, 10])
@pytest.mark.parametrize(("page_size", "order"), PAGES)
@pytest.mark.parametrize(("dtype", "heads"), list(zip(DTYPES, ("MHA", "GQA 4", "MQA"), strict=True)), ids=str)
@over_pages
def test_without_a_mask_every_query_sees_all_tokens(
    op: str, backend: str, dtype: torch.dtype, heads: str, page_size: int, order: str, head_dim: int
) -> None:
    batch = batch_of(op, dtype, heads, head_dim)
    args = op_arguments(op, batch, paged(batch, page_size, order))
    found = public(op, backend)(batch.q, *args, causal=False, return_lse=True)
    assert_both_honest(found, batch, causal=False)


@over_pages
def test_one_query_sees_the_same_with_and_without_a_mask(op: str, backend: str) -> None:
    batch = packed([1] * 4, [1, 40, 90, 0], "GQA 4", torch.bfloat16)
    args = op_arguments(op, batch, paged(batch, 16))
    with_mask, without = (
        public(op, backend)(batch.q, *args, causal=causal, return_lse=True) for causal in (True, False)
    )
    for ours, theirs in zip(without, with_mask, strict=True):
        assert_equal(ours, theirs)


def assert_scaled_honest(found: tuple[Tensor, ...], batch: Packed, held: Packed, causal: bool) -> None:
    """batch: the true values, in fp64; held: as stored in pages, in the queries' dtype."""
    parts = [torch_own(q, k, v, causal) for q, k, v in held.parts(held.k, held.v)]
    plain = [torch.cat(each) for each in zip(*parts, strict=True)]
    for ours, theirs, exact in zip(found, plain, batch.exact(causal), strict=True):
        assert_honest(ours, theirs, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_pages
def test_one_scale_of_all_pages(op: str, backend: str, dtype: torch.dtype, causal: bool) -> None:
    """The log-sum-exp counts that of the keys."""
    batch = batch_of(op, dtype)
    exact = Packed(
        batch.q.double(), batch.k.double() * K_SCALE, batch.v.double() * V_SCALE, batch.queries, batch.lengths
    )
    held = Packed(batch.q, exact.k.to(dtype), exact.v.to(dtype), batch.queries, batch.lengths)
    args = op_arguments(op, batch, paged(batch, 5))
    options = {"causal": causal, "k_scale": K_SCALE, "v_scale": V_SCALE}
    found = public(op, backend)(batch.q, *args, **options, return_lse=True)
    assert_scaled_honest(found, exact, held, causal)
    assert_equal(public(op, backend)(batch.q, *args, **options), found[0])


@pytest.mark.parametrize(("name", "place"), [("k_scale", 1), ("v_scale", 2)])
@over_pages
def test_a_scale_of_one_side_alone(op: str, backend: str, name: str, place: int) -> None:
    batch = batch_of(op)
    scaled = Packed(batch.q, batch.k.clone(), batch.v.clone(), batch.queries, batch.lengths)
    (scaled.q, scaled.k, scaled.v)[place].mul_(0.5)
    args = op_arguments(op, batch, paged(batch, 16))
    found = public(op, backend)(batch.q, *args, **{name: 0.5}, return_lse=True)
    assert_both_honest(found, scaled)


@pytest.mark.in_turn("dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", list(LARGEST_CODE), ids=str)
@over_pages
def test_one_scale_of_all_quantized_pages(op: str, backend: str, code: torch.dtype, dtype: torch.dtype) -> None:
    """Without a tensor of scales; the scales differ."""
    drawn = batch_of(op, dtype)
    codes = [(25 * x.double()).clamp(-127, 127).round().to(code) for x in (drawn.k, drawn.v)]
    scales = {"k_scale": 0.03, "v_scale": 0.5}
    k, v = (x.double() * scale for x, scale in zip(codes, scales.values(), strict=True))
    exact = Packed(drawn.q.double(), k, v, drawn.queries, drawn.lengths)
    held = Packed(drawn.q, k.to(dtype), v.to(dtype), drawn.queries, drawn.lengths)
    cache = paged(Packed(drawn.q.float(), *(x.float() for x in codes), drawn.queries, drawn.lengths), 16, poison=99.0)
    cache.k_pages, cache.v_pages = cache.k_pages.to(code), cache.v_pages.to(code)
    args = op_arguments(op, drawn, cache)
    found = public(op, backend)(drawn.q, *args, **scales, return_lse=True)
    assert_scaled_honest(found, exact, held, causal=True)


@over_pages
def test_the_result_is_rounded_after_its_scale(op: str, backend: str) -> None:
    """Once: these means are between 2**-24 and 2**-23, where fp16 has no number; times 2**10 it has."""
    batch = packed([1, 1], [2, 4], "MHA", torch.float16)
    batch.q.zero_()
    batch.v.fill_(2.0**-24)[::2] = 2.0**-23
    args = op_arguments(op, batch, paged(batch, 5))
    out = public(op, backend)(batch.q, *args, v_scale=2.0**10)
    assert_equal(out, torch.full_like(out, 1.5 * 2.0**-14))


@pytest.mark.parametrize("base2", [False, True])
@everywhere
def test_log_sum_exps_into_a_transposed_view(op: str, backend: str, base2: bool) -> None:
    """[Hq, T] in memory, as in flash-attn; memory beside it is not written. A given `lse_out` is always returned."""
    batch = batch_of(op)
    args = op_arguments(op, batch, paged(batch, 16))
    run = public(op, backend)
    expected = run(batch.q, *args, base2=base2, return_lse=True)
    rows, heads, _ = batch.q.shape
    buffer = torch.full((heads + 1, 2 * rows + 3), 7.0)
    lse_out = buffer[:heads, : 2 * rows : 2].t()
    out, lse = run(batch.q, *args, base2=base2, lse_out=lse_out)
    assert lse is lse_out
    assert_equal(out, expected[0])
    assert_equal(lse, expected[1])
    lse_out.fill_(7.0)
    assert (buffer == 7.0).all()


@everywhere
def test_a_sequence_of_any_stride_between_log_sum_exps(op: str, backend: str) -> None:
    batch = packed([1] * 3, [40, 9, 0], "MHA")
    args = op_arguments(op, batch, paged(batch, 16))
    expected = public(op, backend)(batch.q, *args, return_lse=True)[1]
    for strides in ((3, 1), (1, 3), (40, 5)):
        lse_out = torch.full((200,), 7.0).as_strided((3, 3), strides)
        public(op, backend)(batch.q, *args, lse_out=lse_out)
        assert_equal(lse_out, expected)


@pytest.mark.parametrize("op", OPS)
def test_of_fp64_they_are_fp64(op: str) -> None:
    batch = batch_of(op)
    batch = Packed(batch.q.double(), batch.k.double(), batch.v.double(), batch.queries, batch.lengths)
    args = op_arguments(op, batch, paged(batch, 16))
    for backend in on_cpu(op):
        lse_out = torch.empty(batch.q.shape[1], batch.q.shape[0], dtype=torch.float64).t()
        out, lse = public(op, backend)(batch.q, *args, lse_out=lse_out)
        for ours, exact in zip((out, lse), batch.exact(), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@everywhere
def test_whole_numbers_in_64_bits_are_those_in_32(op: str, backend: str) -> None:
    """All of them, and each alone."""
    batch = batch_of(op, heads="MHA")
    call = named(op, batch)
    run = public(op, backend)
    expected = run(batch.q, **call, return_lse=True)
    numbers = [name for name, value in call.items() if value.dtype == torch.int32]
    for chosen in (numbers, *([name] for name in numbers)):
        found = run(batch.q, **call | {name: call[name].long() for name in chosen}, return_lse=True)
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal(ours, theirs)


def spoiled(name: str, values: Tensor, wrong: int) -> Tensor:
    """Corrupts the first sequence's length or first page, or the end of the last: no other bound reveals it."""
    values = values.long()
    values[(0, 0) if name == "page_table" else -1 if name.startswith("cu_") else 0] += wrong
    return values


@pytest.mark.parametrize(("wrong", "page_size"), [(1 << 32, 16), (1 << 32, 64), (-(1 << 32), 16)])
@everywhere
def test_a_number_past_32_bits_is_not_its_low_half(op: str, backend: str, wrong: int, page_size: int) -> None:
    """2**32 + 5 is no length of 5 tokens. A tile reads one large page, or as many small ones as it has tokens."""
    batch = packed([1, 1] if op == "attention_decode" else [2, 5], [5, 9], "MHA")
    call = named(op, batch, page_size)
    right, sums = public(op, backend)(batch.q, **call, return_lse=True)
    first = batch.queries[0]
    for name in NAMES[op][2:]:
        found, lse = public(op, backend)(batch.q, **call | {name: spoiled(name, call[name], wrong)}, return_lse=True)
        end = len(batch.q) if name.startswith("cu_") else first
        assert found[:end].isnan().all(), name
        assert lse[:end].isnan().all(), name
        torch.testing.assert_close(found[end:], right[end:])
        torch.testing.assert_close(lse[end:], sums[end:])


@pytest.mark.parametrize("op", OPS)
def test_checked_they_are_named(op: str, monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]) -> None:
    monkeypatch.setenv("FASTLLAMA_CHECK", "1")
    batch = packed([1, 1] if op == "attention_decode" else [2, 5], [5, 9], "GQA 4")
    call = named(op, batch)
    force("auto")
    for name in NAMES[op][2:]:
        given = call | {name: spoiled(name, call[name], 1 << 32)}
        with pytest.raises(ValueError, match=rf"^{name}.* is .*429496"):
            getattr(kernels, op)(batch.q, **given)


CODES = {name: torch.zeros(5, 2, 7, 8, dtype=torch.int8) for name in ("k_pages", "v_pages")}
TENSORS = {name: torch.ones(5, 2, 7) for name in ("k_scales", "v_scales")}


@pytest.mark.parametrize("op", PAGED)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {},
            ValueError,
            r"k_scales is None; legal for pages of torch.int8: a tensor \[5, 2, 7\], or a number as k_scale$",
        ),
        ({"k_scale": 0.5}, ValueError, r"v_scales is None; legal .*: a tensor \[5, 2, 7\], or a number as v_scale$"),
        (
            {"k_scales": TENSORS["k_scales"], "v_scale": 0.5},
            ValueError,
            "k_scale is None, v_scale 0.5; legal for pages of torch.int8: both numbers, or k_scales and v_scales both",
        ),
        ({**TENSORS, "k_scale": 0.5}, ValueError, "k_scale is 0.5; legal where k_scales is a tensor: None"),
        ({**TENSORS, "v_scale": 0.5}, ValueError, "v_scale is 0.5; legal where v_scales is a tensor: None"),
        ({"k_scale": torch.ones(()), "v_scale": 1.0}, TypeError, r"k_scale is tensor.*; legal: a number \(float\?\)"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {name: value for name, value in (small_call(op) | CODES).items() if name not in ("k_scale", "v_scale")}
    getattr(kernels, op)(**given, k_scale=1, v_scale=2.0)
    with pytest.raises(error, match=f"^{message}"):
        getattr(kernels, op)(**given | change)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda rows: torch.zeros(6, rows), ValueError, r"lse_out has shape \[6, 3\]; legal: \[3, 6\]"),
        (lambda rows: torch.zeros(rows, 6).half(), TypeError, "lse_out has dtype torch.float16; legal: torch.float32"),
        (lambda rows: torch.zeros(1, 6).expand(rows, 6), ValueError, "lse_out has shape .* elements share memory"),
    ],
)
def test_log_sum_exps_that_do_not_fit(
    op: str, make: Callable[[int], Tensor], error: type[Exception], message: str
) -> None:
    given = small_call(op)
    lse_out = make(3)
    with pytest.raises(error, match=f"^{message}"):
        getattr(kernels, op)(**given, lse_out=lse_out)
    assert not lse_out.any()
    assert given["out"].isnan().all()


@pytest.mark.parametrize("op", PAGED)
def test_compiled_with_scales_is_eager(op: str) -> None:
    """One mask, one scale of each side and a given lse_out in the graph."""
    given = small_call(op) | {"causal": False, "k_scale": 0.5, "v_scale": 3.0}
    given["lse_out"] = torch.zeros(6, 3).t()
    torch.library.opcheck(getattr(torch.ops.fastllama, op).default, positional(op, given))
    named = {name: value for name, value in given.items() if name not in ("out", "lse_out")}
    function = getattr(kernels, op)
    torch.compiler.reset()
    compiled = torch.compile(lambda **args: function(**args, return_lse=True), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(**named), function(**named, return_lse=True), strict=True):
        assert_equal(ours, eager)
