"""rope and rope_and_write_kv against Hugging Face's rotation (half-split) and complex numbers (interleaved)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastllama import kernels
from fastllama.kernels import cos_sin_cache, reference
from tests.kernels.honest import DTYPES, assert_equal, assert_honest, backends, double, on_cpu, public

POSITIONS = 600
UNTOUCHED = 7.0
HUGE = 3e4


def cache(rotated: int) -> Tensor:
    return cos_sin_cache(10000.0 ** -(torch.arange(0, rotated, 2) / rotated), POSITIONS)


def rotated_half(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Hugging Face's rotation of the first R dimensions, in at least fp32, rounded once."""
    cos, sin = (part.repeat(1, 2)[positions][None] for part in cos_sin.chunk(2, -1))
    size = cos_sin.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    head_first = wide[..., :size].transpose(0, 1)[None]
    turned, _ = apply_rotary_pos_emb(head_first, head_first, cos.to(wide.dtype), sin.to(wide.dtype))
    return torch.cat((turned[0].transpose(0, 1), wide[..., size:]), -1).to(x.dtype)


def rotated_complex(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Meta's rotation: neighbours are complex numbers, multiplied by cos + i sin."""
    size = cos_sin.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide[..., :size].unflatten(-1, (-1, 2)).contiguous())
    turns = torch.complex(*cos_sin.to(wide.dtype)[positions].chunk(2, -1))[:, None]
    return torch.cat((torch.view_as_real(pairs * turns).flatten(-2), wide[..., size:]), -1).to(x.dtype)


FORMULAS = {False: rotated_half, True: rotated_complex}
both_pairings = pytest.mark.parametrize("interleaved", FORMULAS, ids=["half", "interleaved"])
# tokens, query heads, key heads, D, R: MHA, GQA 4 and 8, MQA, odd halves, partial rotation, none, nothing
SHAPES = [(5, 4, 4, 64, 64), (3, 8, 2, 16, 16), (1, 8, 1, 128, 128), (4, 3, 1, 10, 6), (2, 2, 1, 8, 0), (0, 2, 1, 8, 8)]


def queries_and_keys(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, num_q_heads, num_kv_heads, head_dim, rotated = shape
    q, k = (torch.randn(tokens, heads, head_dim).to(dtype) for heads in (num_q_heads, num_kv_heads))
    return q, k, cache(rotated), torch.randint(0, POSITIONS, (tokens,))


def test_the_cache_is_cosines_then_sines_of_fp32_angles() -> None:
    """Angles are position times frequency in fp32, as in training; their cosines are as exact as fp32 can be."""
    inv_freq = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    angles = torch.arange(5000).float()[:, None] * inv_freq
    cos_sin = cos_sin_cache(inv_freq, 5000)
    assert cos_sin.dtype == torch.float32
    exact = torch.cat((angles.double().cos(), angles.double().sin()), -1)
    assert (cos_sin - exact).abs().max() <= 1.5 * torch.finfo(torch.float32).eps / 2


@both_pairings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape: tuple[int, ...], interleaved: bool) -> None:
    q, k, cos_sin, positions = double(*queries_and_keys(shape, torch.float32))
    for found, x in zip(reference.rope(q, k, cos_sin, positions, interleaved), (q, k), strict=True):
        expected = FORMULAS[interleaved](x, cos_sin, positions)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@both_pairings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("rope"))
def test_rope(backend: str, dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool) -> None:
    q, k, cos_sin, positions = queries_and_keys(shape, dtype)
    found = public("rope", backend)(q, k, cos_sin, positions, interleaved=interleaved)
    exact = reference.rope(*double(q, k, cos_sin, positions), interleaved)
    for ours, oracle, x in zip(found, exact, (q, k), strict=True):
        assert_honest(ours, FORMULAS[interleaved](x, cos_sin, positions), oracle)


@both_pairings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("rope"))
def test_angles_in_16_bits_are_widened_as_they_are_read(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    """As flash-attn keeps them: bit-identical to fp32 angles of these values. Illegal positions give NaN."""
    q, k, cos_sin, positions = queries_and_keys((3, 8, 2, 10, 6), dtype)
    rounded = cos_sin.to(dtype)
    run = public("rope", backend)
    found = run(q, k, rounded, positions, interleaved=interleaved)
    for ours, theirs in zip(found, run(q, k, rounded.float(), positions, interleaved=interleaved), strict=True):
        assert_equal(ours, theirs)
    positions[1] = POSITIONS
    found, _ = run(q, k, rounded, positions, interleaved=interleaved)
    assert found[1, :, :6].isnan().all()
    assert_equal(found[1, :, 6:], q[1, :, 6:])


@pytest.mark.parametrize("op", ["rope", "rope_and_write_kv"])
def test_angles_in_another_16_bits_than_the_queries_are_refused(op: str) -> None:
    """And angles in 16 bits with fp32 queries."""
    for dtype, angles in ((torch.float16, torch.bfloat16), (torch.float32, torch.float16)):
        q, k, cos_sin, positions = queries_and_keys((3, 8, 2, 16, 16), dtype)
        legal = "torch.float32" + (", torch.float16" if dtype == torch.float16 else "")
        given = {"q": q, "k": k, "cos_sin": cos_sin.to(angles), "positions": positions}
        if op == "rope_and_write_kv":
            pages = [pages_of("HND", 1, 2, 4, 16, dtype) for _ in "kv"]
            given |= {"qkv": torch.cat((given.pop("q"), k, given.pop("k")), 1).flatten(1), "slots": positions}
            given |= {"k_pages": pages[0], "v_pages": pages[1]}
        with pytest.raises(TypeError, match=rf"^cos_sin has dtype {angles}; legal: {legal}$"):
            getattr(kernels, op)(**given)


@both_pairings
@pytest.mark.parametrize("code", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("rope_and_write_kv"))
def test_so_they_are_where_keys_are_written(
    backend: str, dtype: torch.dtype, code: torch.dtype | None, interleaved: bool
) -> None:
    q, k, cos_sin, positions = queries_and_keys((3, 8, 2, 16, 16), dtype)
    qkv, rounded, slots = torch.cat((q, k, k), 1).flatten(1), cos_sin.to(dtype), torch.tensor([2, -1, 0])
    found = []
    for angles in (rounded, rounded.float()):
        held = [pages_of("HND", 1, 2, 4, 16, code or dtype) for _ in "kv"]
        held += [torch.zeros(1, 2, 4) for _ in "kv"] if code else []
        run = public("rope_and_write_kv", backend)
        found.append([run(qkv, angles, positions, slots, *held, interleaved=interleaved), *held])
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours, theirs)


@both_pairings
@pytest.mark.parametrize("backend", backends("rope"))
def test_rope_in_place_on_slices_with_int32_positions(backend: str, interleaved: bool) -> None:
    q, k, cos_sin, positions = queries_and_keys(SHAPES[1], torch.bfloat16)
    buffer = torch.full((3, 14, 16), UNTOUCHED, dtype=q.dtype)
    q_view, k_view = buffer[:, 1:9], buffer[:, 10:12]
    q_view.copy_(q)
    k_view.copy_(k)
    expected = public("rope", backend)(q, k, cos_sin, positions, interleaved=interleaved)
    found = public("rope", backend)(
        q_view, k_view, cos_sin, positions.int(), interleaved=interleaved, q_out=q_view, k_out=k_view
    )
    assert found == (q_view, k_view)
    assert_equal(q_view, expected[0])
    assert_equal(k_view, expected[1])
    assert (buffer[:, [0, 9, 12, 13]] == UNTOUCHED).all()


@both_pairings
@pytest.mark.parametrize("backend", backends("rope"))
def test_what_is_not_rotated_passes_through_whatever_it_is(backend: str, interleaved: bool) -> None:
    """An infinity or a minus zero past the rotary dimensions is copied, and disturbs no neighbour."""
    q, k = torch.randn(2, 3, 10), torch.randn(2, 1, 10)
    q[..., 6:] = torch.tensor([torch.inf, -0.0, torch.nan, -torch.inf])
    positions = torch.tensor([3, 500])
    found, _ = public("rope", backend)(q, k, cache(6), positions, interleaved=interleaved)
    assert_equal(found[..., 6:], q[..., 6:])
    assert_equal(found[..., 6:].signbit(), q[..., 6:].signbit())
    assert found[..., :6].isfinite().all()


def pages_of(order: str, num_pages: int, heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Pages [P, H, page_size, D]: HND has this order in memory, NHD [P, page_size, H, D]."""
    if order == "HND":
        return torch.full((num_pages, heads, page_size, head_dim), UNTOUCHED, dtype=dtype)
    return torch.full((num_pages, page_size, heads, head_dim), UNTOUCHED, dtype=dtype).transpose(1, 2)


@both_pairings
@pytest.mark.parametrize(("page_size", "order"), [(5, "HND"), (16, "NHD"), (64, "HND")])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", backends("rope_and_write_kv"))
def test_rope_and_write_kv(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], page_size: int, order: str, interleaved: bool
) -> None:
    """Shuffled slots, every second one padding; q and the written slots are right, all other slots untouched."""
    tokens, _, num_kv_heads, head_dim, _ = shape
    q, k, cos_sin, positions = queries_and_keys(shape, dtype)
    v = torch.randn(k.shape).to(dtype)
    qkv = torch.cat((q, k, v), 1).flatten(1)
    k_pages, v_pages = (pages_of(order, 3, num_kv_heads, page_size, head_dim, dtype) for _ in "kv")
    slots = torch.randperm(3 * page_size)[:tokens]
    slots[1::2] = -1
    q_out = public("rope_and_write_kv", backend)(
        qkv, cos_sin, positions, slots, k_pages, v_pages, interleaved=interleaved
    )

    expected_k, expected_v = (torch.full((3, num_kv_heads, page_size, head_dim), UNTOUCHED).double() for _ in "kv")
    plain_k = torch.full(expected_k.shape, UNTOUCHED, dtype=dtype)
    exact_q, exact_k = reference.rope(*double(q, k, cos_sin, positions), interleaved)
    rotated_k = FORMULAS[interleaved](k, cos_sin, positions)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            expected_k[page, :, offset] = exact_k[token]
            expected_v[page, :, offset] = v[token].double()
            plain_k[page, :, offset] = rotated_k[token]
    assert_honest(q_out, FORMULAS[interleaved](q, cos_sin, positions), exact_q)
    assert_honest(k_pages, plain_k, expected_k)
    assert_equal(v_pages.double(), expected_v)


@pytest.mark.parametrize("backend", on_cpu("rope_and_write_kv"))
def test_the_oracle_of_rope_and_write_kv_is_fp64_throughout(backend: str) -> None:
    q, k, cos_sin, positions = double(*queries_and_keys((4, 4, 2, 16, 16), torch.float32))
    k_pages, v_pages = (pages_of("HND", 1, 2, 4, 16, torch.float64) for _ in "kv")
    qkv = torch.cat((q, k, k), 1).flatten(1)
    for angles in (cos_sin, cos_sin.float()):  # exact angles, and the model's own
        q_out = public("rope_and_write_kv", backend)(qkv, angles, positions, torch.arange(4), k_pages, v_pages)
        for found, x in ((q_out, q), (k_pages[0].transpose(0, 1), k)):
            expected = rotated_half(x, angles.double(), positions)
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", backends("rope_and_write_kv"))
def test_rope_and_write_kv_in_place_with_int32_indices(backend: str) -> None:
    """q is rotated in place in the projection's output, which is a slice of a wider buffer."""
    q, k, cos_sin, positions = queries_and_keys(SHAPES[1], torch.float16)
    qkv = torch.cat((q, k, k), 1).flatten(1)
    pages = [pages_of("HND", 2, 2, 4, 16, torch.float16) for _ in range(4)]
    slots = torch.tensor([6, -1, 0])
    run = public("rope_and_write_kv", backend)
    expected = run(qkv, cos_sin, positions, slots, *pages[:2])
    buffer = torch.full((3, 200), HUGE, dtype=torch.float16)
    view = buffer[:, 4:196]
    view.copy_(qkv)
    q_out = view[:, :128].view(3, 8, 16)
    assert run(view, cos_sin, positions.int(), slots.int(), *pages[2:], q_out=q_out) is q_out
    assert_equal(q_out, expected)
    assert_equal(pages[2], pages[0])
    assert_equal(pages[3], pages[1])
    assert (buffer[:, :4] == HUGE).all()
    assert (buffer[:, 196:] == HUGE).all()
