"""No function reads a tensor back to the host: all compile in one graph, and are recorded and captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fastllama.integrations import flash_attn
from fastllama.kernels.dispatch.recording import record
from tests.integrations.flash_attn.calls import Call, dense_call, kvcache_call, varlen_call
from tests.integrations.flash_attn.test_fuzz import check

CPU = torch.device("cpu")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def dense() -> tuple[Any, ...]:
    return flash_attn.flash_attn_func, {"q": randn(2, 3, 4, 16), "k": randn(2, 5, 2, 16), "v": randn(2, 5, 2, 16)}


def varlen() -> tuple[Any, ...]:
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 3, 8])}
    tensors = {"q": randn(6, 4, 16), "k": randn(8, 2, 16), "v": randn(8, 2, 16)}
    used = {"seqused_q": torch.tensor([1, 4]), "seqused_k": torch.tensor([3, 4])}
    return flash_attn.flash_attn_varlen_func, {**tensors, **bounds, **used, "max_seqlen_q": 4, "max_seqlen_k": 5}


def paged() -> tuple[Any, ...]:
    pages = {"k": randn(5, 4, 2, 16), "v": randn(5, 4, 2, 16), "block_table": torch.tensor([[4, 0], [1, 3]])}
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 3, 10])}
    return flash_attn.flash_attn_varlen_func, {"q": randn(6, 4, 16), **pages, **bounds}


def appending() -> tuple[Any, ...]:
    cache = {"k_cache": randn(3, 8, 2, 16), "v_cache": randn(3, 8, 2, 16), "cache_batch_idx": torch.tensor([2, 0])}
    new = {"q": randn(2, 2, 4, 16), "k": randn(2, 2, 2, 16), "v": randn(2, 2, 2, 16)}
    turned = {"rotary_cos": randn(8, 4), "rotary_sin": randn(8, 4), "cache_seqlens": torch.tensor([3, 1])}
    return flash_attn.flash_attn_with_kvcache, {**cache, **new, **turned, "cache_leftpad": torch.tensor([1, 0])}


def decoding() -> tuple[Any, ...]:
    pages = {"k_cache": randn(5, 4, 2, 16), "v_cache": randn(5, 4, 2, 16)}
    lengths = {"cache_seqlens": torch.tensor([3, 8]), "block_table": torch.tensor([[4, 0], [1, 3]])}
    return flash_attn.flash_attn_with_kvcache, {"q": randn(2, 1, 4, 16), **pages, **lengths}


def packed_appending() -> tuple[Any, ...]:
    pages = {"k_cache": randn(5, 4, 2, 16), "v_cache": randn(5, 4, 2, 16), "page_table": torch.tensor([[4, 0], [1, 3]])}
    new = {"q": randn(5, 4, 16), "k": randn(3, 2, 16), "v": randn(3, 2, 16), "cache_seqlens": torch.tensor([3, 2])}
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k_new": torch.tensor([0, 1, 3])}
    return flash_attn.flash_attn_with_kvcache, {**pages, **new, **bounds}


CALLS = [dense, varlen, paged, appending, decoding, packed_appending]
calls = pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])


def run_without_numbers(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Results on tensors without data: reading a number from one, or how many are not zero, raises."""
    with FakeTensorMode() as mode:
        return function(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


@calls
def test_one_compiled_graph_gives_what_the_function_gives(call: Callable[[], tuple[Any, ...]]) -> None:
    function, arguments = call()
    eager, compiled = copied(arguments), copied(arguments)
    expected = function(**eager, causal=True, return_softmax_lse=True)
    run = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = run(**compiled, causal=True, return_softmax_lse=True)
    torch.testing.assert_close(found, expected)
    for name, x in compiled.items():
        assert not isinstance(x, Tensor) or torch.equal(x, eager[name]), f"{name} is written alike"


@pytest.mark.parametrize("hidden", [False, True], ids=["all seen", "some hidden"])
@pytest.mark.parametrize(("len_q", "dynamic"), [(1, None), (3, True)])
def test_two_graphs_serve_caches_of_any_length(len_q: int, hidden: bool, dynamic: bool | None) -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, lens: Tensor, pad: Tensor | None) -> Any:
        return flash_attn.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, k, cache_seqlens=lens, cache_leftpad=pad, causal=True
        )

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=graphs)
    for num_seqs, length in ((5, 12), (6, 17), (7, 40)):
        cache = randn(2, num_seqs, length, 2, 16)
        lens, pad = torch.arange(num_seqs) + 3, torch.arange(num_seqs) if hidden else None
        q, k = randn(num_seqs, len_q, 4, 16), randn(num_seqs, len_q, 2, 16)
        eager, compiled = cache.clone().unbind(), cache.clone().unbind()
        expected = step(q, *eager, k, lens, pad)
        with torch.no_grad():
            torch.testing.assert_close(run(q, *compiled, k, lens, pad), expected)
        for found, held in zip(compiled, eager, strict=True):
            assert torch.equal(found, held)
    assert graphs.frame_count <= 2, "two serve the third length, too"


@calls
def test_nothing_is_read_back(call: Callable[[], tuple[Any, ...]]) -> None:
    function, arguments = call()
    out, _ = run_without_numbers(function, {**arguments, "return_softmax_lse": True})
    assert out.shape == arguments["q"].shape


def test_what_is_read_back_would_be_found() -> None:
    for read in (lambda q: q.tolist(), lambda q: q.max().item(), lambda q: q.nonzero(), lambda q: 1 if q.any() else 0):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            run_without_numbers(read, {"q": torch.ones(3)})


@pytest.mark.parametrize(
    ("function", "make"),
    [
        (flash_attn.flash_attn_func, dense_call),
        (flash_attn.flash_attn_varlen_func, varlen_call),
        (flash_attn.flash_attn_with_kvcache, kvcache_call),
    ],
    ids=["dense", "varlen", "kvcache"],
)
def test_random_calls_read_nothing_back(function: Callable[..., Any], make: Callable[[int], Call]) -> None:
    for seed in range(30):
        run_without_numbers(function, make(seed).arguments)


@pytest.mark.parametrize("call", [varlen, paged, decoding], ids=["varlen", "paged", "decoding"])
def test_a_recording_runs_again_on_what_its_tensors_hold_then(call: Callable[[], tuple[Any, ...]]) -> None:
    """The graph then holds only ops; `seqused`, rows of a cache and lengths from bounds take a few torch calls."""
    function, arguments = call()
    for name in ("seqused_q", "seqused_k"):
        arguments.pop(name, None)
    if call is paged:
        arguments["seqused_k"] = arguments.pop("cu_seqlens_k").diff()
    out, recording = record(lambda: function(**arguments, causal=True), CPU, [])
    assert recording.replayable
    arguments["q"].normal_()
    arguments["cu_seqlens_q" if "cu_seqlens_q" in arguments else "cache_seqlens"][1] -= 1
    assert recording.replay() is out
    torch.testing.assert_close(out, function(**arguments, causal=True))


def test_a_recording_of_what_computes_places_is_not_run_again() -> None:
    function, arguments = appending()
    _, recording = record(lambda: function(**arguments), CPU, [])
    assert not recording.replayable


def test_a_recorded_call_computes_what_it_does_alone() -> None:
    for seed in range(20):
        call = kvcache_call(seed)
        result, _ = record(lambda call=call: flash_attn.flash_attn_with_kvcache(**call.arguments), CPU, [])
        check(call, result)
