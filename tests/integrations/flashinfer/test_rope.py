"""FlashInfer's rotary embeddings on our op, against the rotation in fp64: positions, layouts, scalings, slices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.calls import CALLS, NoHostRead, half_unit
from tests.integrations.flashinfer.conftest import Library

LLAMA31 = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}


def frequencies(size: int, scale: float, theta: float, llama31: dict[str, Any] | None = None) -> Tensor:
    """Radians per position, one after the other, fp64."""
    found = []
    for i in range(size // 2):
        plain = theta ** (-2 * i / size)
        kept = 0.0
        if llama31 is not None:
            low, high = llama31["low_freq_factor"], llama31["high_freq_factor"]
            turns = llama31["old_context_len"] * plain / (2 * math.pi)
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(kept * plain + (1 - kept) * plain / scale)
    return torch.tensor(found, dtype=torch.float64)


def turned(x: Tensor, angles: Tensor, interleave: bool) -> Tensor:
    """x [T, heads, D] with its first dimensions turned by angles [T, R/2], as complex numbers, fp64."""
    half = angles.shape[1]
    x = x.double().clone()
    real, imaginary = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleave else (slice(0, half), slice(half, 2 * half))
    )
    pairs = torch.complex(x[..., real], x[..., imaginary]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    x[..., real], x[..., imaginary] = pairs.real, pairs.imag
    return x


def assert_turned(found: Tensor, x: Tensor, angles: Tensor, interleave: bool, ours: bool = True) -> None:
    """Within one rounding of the dtype and the fp32 angle's own error; FlashInfer's powers are approximate on top."""
    exact = turned(x, angles.to(x.device), interleave)
    per_radian = 2.0**-22 if ours else 2.0**-17
    angle = per_radian * float(angles.abs().max() if angles.numel() else 0) + 1e-6
    size = float(x.abs().max()) if x.numel() else 0.0
    legal = half_unit(found.dtype) * exact.abs() * 1.01 + 2 * angle * size
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert bool(((found.double() - exact).abs() <= legal).all())


def heads(*shape: int, dtype: torch.dtype = torch.float16, device: torch.device | None = None) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("interleave", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [None, 32], ids=["all", "32 of 64"])
def test_positions_count_on_from_each_segments_offset(
    library: Library, interleave: bool, rotary_dim: int | None
) -> None:
    q, k = (heads(9, each, 64, device=library.device) for each in (4, 2))
    indptr = torch.tensor([0, 2, 2, 9], dtype=torch.int32, device=library.device)
    offsets = torch.tensor([5, 100, 0], dtype=torch.int32, device=library.device)
    positions = torch.tensor([5, 6, *range(7)], dtype=torch.float64)
    angles = positions[:, None] * frequencies(rotary_dim or 64, 2.0, 5000.0)
    call = (indptr, offsets, rotary_dim, interleave, 2.0, 5000.0)
    for x, found in zip((q, k), library.module.apply_rope(q, k, *call), strict=True):
        assert_turned(found, x, angles, interleave, library.ours)
    given = q.clone(), k.clone()
    assert library.module.apply_rope_inplace(q, k, *call) is None
    for x, found in zip(given, (q, k), strict=True):
        assert_turned(found, x, angles, interleave, library.ours)


def test_llama31_scales_only_what_turns_slowly(library: Library) -> None:
    q, k = (heads(3, each, 64, device=library.device) for each in (4, 2))
    positions = torch.tensor([0, 40, 17], dtype=torch.int32, device=library.device)
    angles = positions.double().cpu()[:, None] * frequencies(64, 8, 5e5, LLAMA31)
    for x, found in zip((q, k), library.module.apply_llama31_rope_pos_ids(q, k, positions), strict=True):
        assert_turned(found, x, angles, False, library.ours)
    # The fastest, one between and the slowest, so that the formula above is not the only witness.
    ratio = frequencies(64, 8, 5e5, LLAMA31) / frequencies(64, 1, 5e5)
    assert ratio[0] == 1
    assert ratio[-1] == 1 / 8
    assert 1 / 8 < ratio[17] < 1


def test_a_cache_turns_slices_of_one_tensor_in_place(library: Library) -> None:
    qkv = torch.randn(5, 8 * 64, dtype=torch.float16, device=library.device)
    cache = torch.cat([f(torch.arange(50)[:, None] * frequencies(64, 1, 1e4)) for f in (torch.cos, torch.sin)], -1)
    cache = cache.float().to(library.device)
    positions = torch.tensor([3, 49, 0, 7, 7], dtype=torch.int64, device=library.device)
    angles = positions.double().cpu()[:, None] * frequencies(64, 1, 1e4)
    query, key, given = qkv[:, : 4 * 64], qkv[:, 4 * 64 : 6 * 64], qkv.clone()
    expected = library.module.apply_rope_with_cos_sin_cache(positions, query, key, 64, cache)
    assert torch.equal(qkv, given)
    library.module.apply_rope_with_cos_sin_cache_inplace(positions, query, key, 64, cache, is_neox=True)
    for found, other, old in zip((query, key), expected, (given[:, : 4 * 64], given[:, 4 * 64 : 6 * 64]), strict=True):
        assert torch.equal(found, other)
        assert_turned(found.reshape(5, -1, 64), old.reshape(5, -1, 64), angles, False, library.ours)
    assert torch.equal(qkv[:, 6 * 64 :], given[:, 6 * 64 :])


def test_tokens_past_the_last_segment_stay_as_they_are() -> None:
    q, k = heads(5, 2, 8), heads(5, 1, 8)
    found, _ = flashinfer.apply_rope(q, k, torch.tensor([0, 3]), torch.tensor([4]))
    assert torch.equal(found[3:], q[3:])
    assert not torch.equal(found[:3], q[:3])


def test_a_position_that_the_cache_lacks_gives_nan() -> None:
    found, _ = flashinfer.apply_rope_with_cos_sin_cache(
        torch.tensor([4]), heads(1, 8), heads(1, 8), 8, torch.ones(4, 8)
    )
    assert bool(found.isnan().all())


def random_call(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...], int | None, bool]:
    """q, k, positions, the same positions as segment arguments, rotary_dim and interleave."""
    size, dtype = 2 * rng.randint(1, 12), rng.choice((torch.bfloat16, torch.float16, torch.float32))
    integers = rng.choice((torch.int32, torch.int64))
    lengths = [rng.choice((0, 1, rng.randint(0, 4))) for _ in range(rng.randint(1, 4))]
    offsets = [rng.choice((0, rng.randint(0, 8000))) for _ in lengths]
    tokens, q_heads, kv_heads = sum(lengths), rng.randint(1, 3), rng.randint(1, 2)
    qkv = torch.randn(tokens, q_heads + kv_heads + 1, size + 2, dtype=dtype)[..., rng.randint(0, 2) :][..., :size]
    positions = [offset + i for offset, length in zip(offsets, lengths, strict=True) for i in range(length)]
    indptr = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=integers)
    segments = (indptr, torch.tensor(offsets, dtype=integers))
    rotary_dim = rng.choice((None, 2 * rng.randint(1, size // 2)))
    q, k = qkv[:, :q_heads], qkv[:, q_heads : q_heads + kv_heads]
    return q, k, torch.tensor(positions, dtype=integers), segments, rotary_dim, rng.random() < 0.5


@pytest.mark.parametrize("scaling", ["", "llama31_"])
@pytest.mark.parametrize("by", ["segments", "pos_ids"])
@CALLS
def test_random_legal_calls_turn_by_the_exact_angles(calls: int, by: str, scaling: str) -> None:
    rng = random.Random(4)
    name = f"apply_{scaling}rope{'_pos_ids' if by == 'pos_ids' else ''}"
    for _ in range(calls):
        q, k, positions, segments, rotary_dim, interleave = random_call(rng)
        scale, theta = rng.choice((1, 1.5, 8)), rng.choice((1e4, 5e5, 100.0))
        low = rng.choice((1, 0.5))
        factors = {"low_freq_factor": low, "high_freq_factor": low + rng.choice((0.1, 3)), "old_context_len": 512}
        options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_scale": scale, "rope_theta": theta}
        given = q.clone(), k.clone()
        arguments = (q, k, *(segments if by == "segments" else (positions,)))
        if rng.random() < 0.5:
            found = getattr(flashinfer, name)(*arguments, **options, **(factors if scaling else {}))
            assert torch.equal(q, given[0])
            assert torch.equal(k, given[1])
        else:
            found = (q, k)
            assert getattr(flashinfer, f"{name}_inplace")(*arguments, **options, **(factors if scaling else {})) is None
        speeds = frequencies(rotary_dim or q.shape[2], scale, theta, factors if scaling else None)
        for new, old in zip(found, given, strict=True):
            assert_turned(new, old, positions.double()[:, None] * speeds, interleave)


@CALLS
def test_random_legal_calls_turn_by_the_cache(calls: int) -> None:
    rng = random.Random(5)
    for _ in range(calls):
        q, k, positions, _, rotary_dim, interleave = random_call(rng)
        positions = positions % 40
        angles = torch.rand(40, (rotary_dim or q.shape[2]) // 2, dtype=torch.float64) * 6
        cache = torch.cat((angles.cos(), angles.sin()), -1).float()
        flat = rng.random() < 0.5
        given = q.clone(), k.clone()
        query, key = (x.flatten(1) if flat else x for x in (q, k))
        if rng.random() < 0.5:
            call = flashinfer.apply_rope_with_cos_sin_cache
            found = call(positions, query, key, q.shape[2], cache, not interleave)
        else:
            call = flashinfer.apply_rope_with_cos_sin_cache_inplace
            assert call(positions, query, key, q.shape[2], cache, not interleave) is None
            found = (query, key)
        for new, old in zip(found, given, strict=True):
            assert_turned(new.reshape(old.shape), old, angles[positions], interleave)


Q, K, POSITIONS = heads(4, 2, 8), heads(4, 1, 8), torch.arange(4)
INDPTR, OFFSETS, CACHE = torch.tensor([0, 1, 4]), torch.tensor([0, 3]), torch.ones(9, 8)
ILLEGAL: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("apply_rope", (Q[0], K, INDPTR, OFFSETS), {}, ValueError, r"q has shape \[2, 8\]; legal"),
    ("apply_rope", (Q, K[:3], INDPTR, OFFSETS), {}, ValueError, r"k has shape \[3, 1, 8\]; legal"),
    ("apply_rope", (Q, K.float(), INDPTR, OFFSETS), {}, TypeError, "k has dtype torch.float32; legal"),
    ("apply_rope", (Q, K, INDPTR[:2], OFFSETS), {}, ValueError, r"indptr has shape \[2\]; legal: \[3\]"),
    ("apply_rope", (Q, K, INDPTR.float(), OFFSETS), {}, TypeError, "indptr has dtype torch.float32; legal"),
    ("apply_rope", (Q, K, INDPTR, OFFSETS[:, None]), {}, ValueError, r"offsets has shape \[2, 1\]; legal"),
    ("apply_rope", (Q, K, INDPTR[:1], OFFSETS[:0]), {}, ValueError, r"offsets has shape \[0\]; legal"),
    ("apply_rope_inplace", (Q, K, INDPTR, OFFSETS.double()), {}, TypeError, "offsets has dtype torch.float64; legal"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS[:3]), {}, ValueError, r"pos_ids has shape \[3\]; legal: \[4\]"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS.half()), {}, TypeError, "pos_ids has dtype torch.float16; legal"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS, 3), {}, ValueError, "rotary_dim is 3; legal"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS, 10), {}, ValueError, "rotary_dim is 10; legal for heads of 8"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS, 0), {}, ValueError, "rotary_dim is 0; legal"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS), {"rope_scale": 0}, ValueError, "rope_scale is 0; legal"),
    ("apply_rope_pos_ids", (Q, K, POSITIONS), {"rope_theta": -1.0}, ValueError, "rope_theta is -1.0; legal"),
    (
        "apply_llama31_rope_pos_ids_inplace",
        (Q, K, POSITIONS),
        {"low_freq_factor": 0},
        ValueError,
        "low_freq_factor is 0",
    ),
    (
        "apply_llama31_rope_pos_ids",
        (Q, K, POSITIONS),
        {"high_freq_factor": 1},
        ValueError,
        "high_freq_factor is 1; legal",
    ),
    ("apply_llama31_rope_inplace", (Q, K, INDPTR, OFFSETS), {"old_context_len": 0}, ValueError, "old_context_len is 0"),
    (
        "apply_rope_with_cos_sin_cache",
        (POSITIONS, Q.flatten(1), K.flatten(1), 6, CACHE),
        {},
        ValueError,
        "cos_sin_cache",
    ),
    (
        "apply_rope_with_cos_sin_cache",
        (POSITIONS, Q.flatten(1), K.flatten(1), 9, CACHE),
        {},
        ValueError,
        "query has shape",
    ),
    ("apply_rope_with_cos_sin_cache", (POSITIONS, Q.flatten(), K, 8, CACHE), {}, ValueError, "query has shape"),
    ("apply_rope_with_cos_sin_cache", (POSITIONS, Q, K, 8, CACHE.half()), {}, TypeError, "cos_sin_cache has dtype"),
    ("apply_rope_with_cos_sin_cache_inplace", (POSITIONS[:2], Q, K, 8, CACHE), {}, ValueError, "positions has shape"),
]


@pytest.mark.parametrize(("name", "arguments", "options", "error", "message"), ILLEGAL)
def test_what_is_illegal_is_refused_by_name_and_nothing_is_written(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = Q.clone(), K.clone()
    with pytest.raises(error, match=message):
        getattr(flashinfer, name)(*arguments, **options)
    assert torch.equal(Q, before[0])
    assert torch.equal(K, before[1])


COMPILED: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (flashinfer.apply_rope_inplace, (Q, K, INDPTR, OFFSETS)),
    (flashinfer.apply_rope_pos_ids, (Q, K, POSITIONS, 4, True)),
    (flashinfer.apply_llama31_rope, (Q, K, INDPTR, OFFSETS)),
    (flashinfer.apply_rope_with_cos_sin_cache, (POSITIONS, Q.flatten(1), K.flatten(1), 8, CACHE)),
]


@pytest.mark.parametrize(("function", "arguments"), COMPILED)
def test_they_compile_whole_and_read_nothing_on_the_host(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    results = []
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for run in (function, compiled):
        given = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        results.append((run(*given), given))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    with NoHostRead():
        function(*(each.clone() if isinstance(each, Tensor) else each for each in arguments))
