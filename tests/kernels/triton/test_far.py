"""Each tensor of each op with one dimension spread over more than 2^31 elements gives what it gives in one piece.

The interpreter's checks find any 32-bit addition or multiplication that wraps; test_offsets.py finds it for
numbers that nothing here has. Uninitialised memory takes none until it is touched: of 4 GiB each case touches a page.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fastllama.catalogue import arguments
from fastllama.catalogue.maker import Arguments
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import assert_equal, public

MOST = 1 << 31  # elements that 32 bits can count
# Arguments that stay in fp32 with 16-bit values: sums, scales, angles, sampling parameters; all but logits.
WIDE = ("scales", "lse", "cos_sin", "temperature", "top_p", "min_p", "logprobs")


@functools.cache
def given(op: str) -> Arguments:
    call = {name: value for name, value in small_call(op).items() if name != "workspace"}
    for name, value in call.items():
        if isinstance(value, Tensor):
            call[name] = value.half() if value.is_floating_point() and not is_wide(op, name) else value.clone()
    return call


def is_wide(op: str, name: str) -> bool:
    return any(word in name for word in WIDE) or (op == "adjust_logits" and name != "logits")


def spread(value: Tensor, dim: int) -> Tensor:
    """The same numbers; elements of `dim` are so far apart that the last is past 2^31."""
    count, inner = value.shape[dim], value.select(dim, 0).contiguous()
    apart = MOST // (count - 1) // 16 * 16 + 64
    strides = list(inner.stride())
    strides.insert(dim, apart)
    buffer = torch.empty(apart * (count - 1) + inner.numel(), dtype=value.dtype)
    return buffer.as_strided(value.shape, strides).copy_(value)


def results(op: str, far: str = "", dim: int = 0) -> list[Tensor]:
    """All tensors after a call in which `far` is spread: outputs, and inputs that must not change."""
    call = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given(op).items()}
    if far:
        call[far] = spread(call[far], dim)
    torch.manual_seed(0)
    found = public(op, "triton")(**call)
    found = arguments.results(op, call, found)
    return [*found, *(value for value in call.values() if isinstance(value, Tensor))]


near = functools.cache(results)
# Every tensor in every dimension but the last, which is contiguous, and but those of weights packed in tiles.
CASES = [
    (op, name, dim)
    for op in OPS
    if OPS[op].has_triton
    for name, value in given(op).items()
    if isinstance(value, Tensor)
    for dim in range(value.dim() - 1)
    if value.shape[dim] > 1 and name != "packed"
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "name", "dim"), CASES)
def test_a_tensor_past_two_to_the_31_elements(op: str, name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes memory
    for found, expected in zip(results(op, name, dim), near(op), strict=True):
        assert_equal(found, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["q", "out"])
def test_heads_past_two_to_the_31_elements_of_a_decode_in_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels: the splits, whose results are contiguous, and their reduction."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tokens, page = 1100, 64
    pages = [torch.randn(-(-tokens // page), 1, page, 16).half() for _ in "kv"]
    table = torch.arange(pages[0].shape[0], dtype=torch.int32)[None]
    call = {"q": torch.randn(1, 3, 16).half(), "out": torch.zeros(1, 3, 16).half()}
    run = functools.partial(public("attention_decode", "triton"), k_pages=pages[0], v_pages=pages[1])
    held = {"page_table": table, "seq_lens": torch.tensor([tokens], dtype=torch.int32)}
    assert_equal(run(**held, **call | {name: spread(call[name], 1)}), run(**held, **call))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("quantize_rows", "scales_out"),
        ("rms_norm_int8", "scales_out"),
        ("add_rms_norm_int8", "scales_out"),
        ("silu_mul_int8", "scales_out"),
        ("matmul_w8a8", "x_scales"),
    ],
)
def test_scales_of_rows_that_lie_apart_are_refused(op: str, name: str) -> None:
    """Kernels count scales by rows: with a gap between two groups of tokens they would read the wrong ones."""
    rows = given(op)[name].shape[0]
    call = {
        key: torch.stack([value, value])
        if isinstance(value, Tensor) and value.shape[0] == rows and key not in ("packed", "scales", "bias", "weight")
        else value
        for key, value in given(op).items()
    }
    call[name] = torch.ones(2, rows + 5)[:, :rows]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        public(op, "triton")(**call)
