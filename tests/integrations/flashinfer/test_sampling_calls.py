"""FlashInfer's sampling on our op, by its arguments: random legal calls, illegal ones, compiled ones."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.calls import CALLS, NoHostRead
from tests.integrations.flashinfer.weights import filtered, is_close_call

FILTERS = {
    "sampling_from_probs": (),
    "top_p_sampling_from_probs": ("top_p",),
    "top_k_sampling_from_probs": ("top_k",),
    "min_p_sampling_from_probs": ("min_p",),
    "top_k_top_p_sampling_from_probs": ("top_k", "top_p"),
    "sampling_from_logits": (),
    "top_k_top_p_sampling_from_logits": ("top_k", "top_p"),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random_filter(rng: random.Random, name: str, rows: int) -> tuple[Any, list[Any]]:
    """An argument, and its value for each row."""
    numbers = [rng.choice((1, rng.randint(1, 14), -1)) if name == "top_k" else rng.choice((1.0, rng.random()))] * rows
    if rng.random() < 0.5:
        return numbers[0] if rows else 1, numbers
    if name == "top_k":
        tensor = torch.tensor([rng.randint(-1, 14) for _ in range(rows)], dtype=rng.choice((torch.int32, torch.int64)))
    else:
        tensor = torch.tensor([rng.random() for _ in range(rows)]).to(rng.choice(FLOATS))
    return tensor, tensor.tolist()


def random_source(rng: random.Random, batch: int) -> dict[str, Any]:
    """Arguments that fix the random numbers: the same each time that they are made."""
    if rng.random() < 0.3:
        return {"generator": torch.Generator().manual_seed(rng.randint(0, 9)), "seed": rng.choice((None, 3))}
    if rng.random() < 0.5:
        return {"seed": rng.randint(-(1 << 63), (1 << 64) - 1), "offset": rng.randint(0, 1 << 40)}
    dtype = rng.choice((torch.int64, torch.uint64))
    return {
        name: torch.tensor([rng.randint(0, 1 << 40) for _ in range(rng.choice((1, batch)))], dtype=dtype)
        for name in ("seed", "offset")
    }


def effective(value: Any) -> Any:
    """The filter as the formula takes it: None where it keeps all."""
    return None if isinstance(value, int) and value < 1 else value


def random_weights(rng: random.Random) -> Tensor:
    """[rows, V], small integers, so that ties and zeros are common and sums are exact."""
    shape = rng.randint(0, 4), rng.randint(1, 12)
    return torch.randint(0, 10, shape).double() * (torch.rand(shape) < 0.8)


@pytest.mark.parametrize("name", FILTERS)
@CALLS
def test_random_legal_calls_sample_what_the_filters_keep(calls: int, name: str) -> None:
    rng = random.Random(name)
    while calls:
        weights = random_weights(rng)
        rows, order = len(weights), rng.choice(("top_k_first", "joint"))
        filters = {each: random_filter(rng, each, rows) for each in FILTERS[name]}
        of_row = [{each: effective(values[row]) for each, (_, values) in filters.items()} for row in range(rows)]
        if any(is_close_call(weights[row], order, **of_row[row]) for row in range(rows)):
            continue
        calls -= 1
        kept = [filtered(weights[row], **of_row[row], filter_apply_order=order) > 0 for row in range(rows)]
        given = weights.log() + 2 if name.endswith("logits") else weights / rng.choice((1, 40, 1e4))
        indices = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(0, 6))] if rows else [])
        indices = rng.choice((None, indices.int(), indices.long()))
        options: dict[str, Any] = {each: argument for each, (argument, _) in filters.items()}
        options |= {"indices": indices, "deterministic": rng.random() < 0.5, "check_nan": rng.random() < 0.5}
        options |= {"filter_apply_order": order} if len(filters) == 2 else {}
        options |= {"return_valid": True} if name.endswith("probs") else {}
        state, results = rng.getstate(), []
        for _ in range(2):
            rng.setstate(state)
            source = random_source(rng, rows if indices is None else len(indices))
            results.append(
                getattr(flashinfer, name)(given.to(rng.choice((torch.float32, torch.float64))), **options, **source)
            )
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        tokens, valid = results[0] if name.endswith("probs") else (results[0], None)
        assert tokens.dtype == (torch.int32 if indices is None else indices.dtype)
        places = range(rows) if indices is None else indices.tolist()
        for place, (row, token) in enumerate(zip(places, tokens.tolist(), strict=True)):
            some = bool(kept[row].any())
            assert kept[row][token] or (not some and token == 0)
            assert valid is None or bool(valid[place]) == some


@pytest.mark.parametrize("name", ["top_p", "top_k"])
@CALLS
def test_random_legal_calls_renormalise_what_the_filter_keeps(calls: int, name: str) -> None:
    rng = random.Random(name)
    while calls:
        weights, dtype = random_weights(rng), rng.choice(FLOATS[:3])
        argument, values = random_filter(rng, name, len(weights))
        of_row = [{name: effective(value)} for value in values]
        if any(is_close_call(row, **filters) for row, filters in zip(weights, of_row, strict=True)):
            continue
        calls -= 1
        found = getattr(flashinfer, f"{name}_renorm_probs")(weights.to(dtype), argument, rng.choice((True, False)))
        assert found.dtype == (torch.float32 if name == "top_p" else dtype)
        for row, given, filters in zip(found, weights, of_row, strict=True):
            exact = filtered(given, **filters)
            exact = exact / exact.sum().clamp(min=1)
            torch.testing.assert_close(row.double(), exact, rtol=torch.finfo(found.dtype).eps, atol=0)


@CALLS
def test_random_legal_calls_mask_what_top_k_does_not_keep(calls: int) -> None:
    rng = random.Random(7)
    for _ in range(calls):
        weights, dtype = random_weights(rng) + 1, rng.choice(FLOATS[:3])
        argument, values = random_filter(rng, "top_k", len(weights))
        found = flashinfer.top_k_mask_logits(weights.to(dtype), argument)
        assert found.dtype == dtype
        for row, given, value in zip(found, weights, values, strict=True):
            kept = filtered(given, top_k=effective(value)) > 0
            assert row.tolist() == given.masked_fill(~kept, -math.inf).tolist()


@CALLS
def test_random_legal_calls_of_softmax(calls: int) -> None:
    rng = random.Random(8)
    for _ in range(calls):
        logits = (random_weights(rng) - 4).to(rng.choice(FLOATS))
        heat = rng.choice((None, 0.5, 2, (torch.rand(len(logits)) + 0.1).to(rng.choice(FLOATS))))
        divisor = heat.double()[:, None] if isinstance(heat, Tensor) else heat or 1
        exact = (logits.double() / divisor).softmax(-1)
        found = flashinfer.softmax(logits, heat, rng.choice((None, True)))
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)  # exponents to 90 in fp32
        assert found.dtype == torch.float32


P, NAN = torch.full((3, 4), 0.25), torch.tensor([[0.5, math.nan]])
I64 = torch.zeros(3, dtype=torch.int64)
ILLEGAL: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("softmax", (P[0],), {}, ValueError, r"logits has shape \[4\]; legal: \[rows, V\]"),
    ("softmax", (P.long(),), {}, TypeError, "logits has dtype torch.int64; legal"),
    ("softmax", (P, -1.0), {}, ValueError, "temperature is -1.0; legal"),
    ("softmax", (P, "hot"), {}, TypeError, "temperature must be a number"),
    ("softmax", (P, torch.ones(2)), {}, ValueError, r"temperature has shape \[2\]; legal: \[3\]"),
    ("softmax", (P, I64), {}, TypeError, "temperature has dtype torch.int64; legal"),
    ("sampling_from_logits", (NAN,), {"check_nan": True}, ValueError, "logits has a NaN; legal"),
    ("sampling_from_logits", (P.mT,), {}, ValueError, "logits has strides"),
    ("sampling_from_probs", (P[:, :0],), {}, ValueError, r"probs has shape \[3, 0\]; legal"),
    ("sampling_from_probs", (NAN,), {"check_nan": True}, ValueError, "probs has a NaN; legal"),
    ("sampling_from_probs", (P, P), {}, ValueError, r"indices has shape \[3, 4\]; legal"),
    ("sampling_from_probs", (P, P[:, 0]), {}, TypeError, "indices has dtype torch.float32; legal"),
    ("sampling_from_probs", (P,), {"seed": 1, "offset": I64}, ValueError, r"seed is 1, offset a tensor \[3\]; legal"),
    ("sampling_from_probs", (P,), {"seed": 1.5, "offset": 0}, TypeError, "seed is 1.5; legal: an integer"),
    ("sampling_from_probs", (P,), {"seed": 1 << 64, "offset": 0}, ValueError, "seed is 18446744073709551616; legal"),
    (
        "sampling_from_probs",
        (P,),
        {"seed": I64[:2], "offset": I64},
        ValueError,
        r"seed has shape \[2\]; legal: \[1\] or",
    ),
    ("sampling_from_probs", (P,), {"seed": I64, "offset": I64.int()}, TypeError, "offset has dtype torch.int32; legal"),
    ("top_p_sampling_from_probs", (P, 1.5), {}, ValueError, "top_p is 1.5; legal: 0 to 1"),
    ("top_p_sampling_from_probs", (P, math.nan), {}, ValueError, "top_p is nan; legal: 0 to 1"),
    ("top_p_sampling_from_probs", (P, torch.ones(4)), {}, ValueError, r"top_p has shape \[4\]; legal: \[3\]"),
    ("top_p_sampling_from_probs", (P, I64), {}, TypeError, "top_p has dtype torch.int64; legal"),
    ("min_p_sampling_from_probs", (P, -0.1), {}, ValueError, "min_p is -0.1; legal: 0 to 1"),
    ("top_k_sampling_from_probs", (P, 0), {}, ValueError, "top_k is 0; legal: at least 1, or -1"),
    ("top_k_sampling_from_probs", (P, 2.0), {}, TypeError, "top_k is 2.0; legal: an integer"),
    ("top_k_sampling_from_probs", (P, torch.ones(3)), {}, TypeError, "top_k has dtype torch.float32; legal"),
    (
        "top_k_top_p_sampling_from_probs",
        (P, 1, 0.5, None, "top_p_first"),
        {},
        ValueError,
        "filter_apply_order is 'top_p",
    ),
    ("top_k_top_p_sampling_from_logits", (P, 1, 0.5, None, "Joint"), {}, ValueError, "filter_apply_order is 'Joint'"),
    ("top_k_top_p_sampling_from_logits", (P, I64[:2], 0.5), {}, ValueError, r"top_k has shape \[2\]; legal: \[3\]"),
    ("top_p_renorm_probs", (P, 2), {}, ValueError, "top_p is 2; legal: 0 to 1"),
    ("top_k_renorm_probs", (P[0], 2), {}, ValueError, r"probs has shape \[4\]; legal"),
    ("top_k_mask_logits", (P, True), {}, TypeError, "top_k is True; legal: an integer"),
]


@pytest.mark.parametrize(("name", "arguments", "options", "error", "message"), ILLEGAL)
def test_what_is_illegal_is_refused_by_name_before_the_generator_advances(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        getattr(flashinfer, name)(*arguments, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [*FILTERS, "top_p_renorm_probs", "top_k_renorm_probs", "top_k_mask_logits", "softmax"])
def test_they_compile_whole_and_read_nothing_on_the_host(name: str) -> None:
    function = getattr(flashinfer, name)
    filters: dict[str, Any] = {"top_p": torch.tensor([0.3, 0.9, 1.0]), "top_k": 2, "min_p": 0.1}
    options = {each: filters[each] for each in FILTERS.get(name, (name[:5],) if name != "softmax" else ())}
    if name in FILTERS:
        options |= {"indices": torch.tensor([2, 0, 1, 1]), "seed": I64[:1] + 3, "offset": I64[:1]}
    if len(FILTERS.get(name, ())) == 2:
        options["filter_apply_order"] = "joint"
    rows = torch.rand(3, 5)
    with NoHostRead():
        function(rows, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, **options), function(rows, **options), rtol=0, atol=0)


def test_compiled_samples_from_torchs_generator_differ_from_call_to_call() -> None:
    compiled = torch.compile(flashinfer.sampling_from_logits, fullgraph=True, backend="aot_eager")
    logits = torch.zeros(40, 100)
    assert not torch.equal(compiled(logits), compiled(logits))
