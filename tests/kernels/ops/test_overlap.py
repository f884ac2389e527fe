"""Outputs that overlap an op's inputs or other outputs: right where that is allowed, refused everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import outputs
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import assert_equal, backends, public


def given_tensors(op: str) -> list[str]:
    return [name for name, value in small_call(op).items() if isinstance(value, Tensor)]


def written(op: str) -> list[str]:
    """The outputs of an op, and the inputs that it updates."""
    return [name for name in given_tensors(op) if OPS[op].names.index(name) in OPS[op]._written]


PAIRS = [(op, name, other) for op in OPS for name in written(op) for other in given_tensors(op) if other != name]


def over(call: dict[str, Any], name: str, other: str, shift: int) -> dict[str, Any]:
    """The call with one tensor over another's memory, `shift` bytes on."""
    size = call[name].nbytes + call[other].nbytes + shift
    buffer = torch.zeros(-(-size // 8), dtype=torch.int64)

    def placed(value: Tensor, start: int) -> Tensor:
        made = torch.empty(0, dtype=value.dtype).set_(
            buffer.untyped_storage(), start // value.itemsize, value.shape, value.contiguous().stride()
        )
        return made.copy_(value)

    made = {name: placed(call[name], shift)}
    return call | made | {other: placed(call[other], 0)}


@pytest.mark.parametrize(("op", "name", "other"), PAIRS)
def test_memory_of_another_tensor_is_refused_before_anything_is_written(op: str, name: str, other: str) -> None:
    """Also after a legal call of the same shapes. Interleaved columns of one buffer are accepted."""
    run = getattr(kernels, op)
    run(**small_call(op))
    allowed = OPS[op]._aliasing._in_place.get(name, {}).get(other, 0)
    for shift in (0, 16):
        call = small_call(op)
        if shift >= call[other].nbytes or (allowed and not shift):
            continue
        call = over(call, name, other, shift)
        before = {each: value.clone() for each, value in call.items() if isinstance(value, Tensor)}
        with pytest.raises(
            ValueError, match=rf"^({name} shares memory with {other}|{other} shares memory with {name})"
        ):
            run(**call)
        for each, value in before.items():
            torch.testing.assert_close(call[each], value, rtol=0, atol=0, equal_nan=True, check_stride=False)


IN_PLACE = [
    (op, name, other, part)
    for op in OPS
    for name, inputs in OPS[op]._aliasing._in_place.items()
    for other, parts in inputs.items()
    for part in range(parts)
    if (part + 1) * small_call(op)[name].numel() <= small_call(op)[other].numel()
]


@pytest.mark.parametrize(
    ("op", "name", "other", "part", "backend"),
    [
        pytest.param(*case, *(each.values if hasattr(each, "values") else (each,)), marks=getattr(each, "marks", ()))
        for case in IN_PLACE
        for each in backends(case[0])
        if OPS[case[0]].has_triton or isinstance(each, str)
    ],
)
def test_over_an_input_it_is_right_where_that_is_allowed(
    op: str, name: str, other: str, part: int, backend: str
) -> None:
    torch.manual_seed(0)
    apart, call = small_call(op), small_call(op)
    for key, value in apart.items():
        if isinstance(value, Tensor):
            call[key] = value.clone()
    rows = call[other].flatten(min(call[other].dim(), call[name].dim()) - 1)
    size = call[name].flatten(rows.dim() - 1).shape[-1]
    call[name] = rows[..., part * size : (part + 1) * size].unflatten(-1, call[name].shape[rows.dim() - 1 :])
    run = public(op, backend)
    expected, found = run(**apart), run(**call)
    for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in outputs(op) if name in small_call(op)])
def test_an_output_that_holds_elements_twice_is_refused(op: str, name: str) -> None:
    call = small_call(op)
    shape = call[name].shape
    call[name] = call[name][:1].expand(shape) if shape[0] > 1 else call[name]
    with pytest.raises(ValueError, match=rf"^{name} has (shape .* so that elements share memory|strides \[0\])"):
        getattr(kernels, op)(**call)


@torch.inference_mode()
def test_columns_of_one_buffer_share_no_memory() -> None:
    """Packed projections, both halves of a cache, alternating rows: NumPy decides once for each layout."""
    buffer = torch.randn(5, 96)
    q, k = buffer[:, :64].view(5, 4, 16), buffer[:, 64:].view(5, 4, 8)[:, :2, :]
    assert q.shape[1] == 4
    pool = torch.zeros(6, 2, 2, 4, 16)  # keys and values of a page are adjacent
    qkv, cache = torch.randn(3, 8 * 16), torch.randn(16, 16)
    places = torch.arange(3)
    apart = [torch.zeros(6, 2, 4, 16) for _ in "kv"]
    expected = kernels.rope_and_write_kv(qkv, cache, places, places, *apart)
    for _ in range(2):
        found = kernels.rope_and_write_kv(qkv, cache, places, places, pool[:, 0], pool[:, 1])
        assert_equal(found, expected)
        assert_equal(pool[:, 0], apart[0])
        assert_equal(pool[:, 1], apart[1])
    rows = torch.randn(10, 32)
    expected = kernels.rms_norm(rows[::2], torch.ones(32))
    for _ in range(2):
        kernels.rms_norm(rows[::2], torch.ones(32), out=rows[1::2])
        assert_equal(rows[1::2], expected)
    with pytest.raises(ValueError, match=r"^out shares memory with x"):
        kernels.rms_norm(rows[:5], torch.ones(32), out=rows[1:6])
    assert k.shape == (5, 2, 8)


@torch.inference_mode()
def test_an_output_that_is_an_input_stays_distinct_from_the_others() -> None:
    """A call like an earlier in-place one: the tensor that is written has two names there."""
    buffer = torch.randn(3, 64)
    x, weight = buffer[:2], torch.ones(64)
    for _ in range(2):
        kernels.rms_norm(x, weight, out=x)
    with pytest.raises(ValueError, match=r"^out shares memory with weight"):
        kernels.rms_norm(x, buffer[1], out=x)


def rewritten(op: str, name: str) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """A right program that torch.compile turns into a call whose output is its input (pytorch/pytorch#198031)."""

    def program(x: Tensor, others: dict[str, Any]) -> Tensor:
        getattr(kernels, op)(**others, **{name: x.clone()}, out=x)
        return x * 2

    return program


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_graph_that_reuses_an_input_for_an_output_is_right(backend: str, rows: int) -> None:
    torch.compiler.reset()
    x, weight = torch.randn(rows, 64), torch.randn(64, 64)
    program = rewritten("matmul", "x")
    with torch.no_grad():
        expected = program(x.clone(), {"weight": weight})
        found = torch.compile(program, fullgraph=True, backend=backend)(x.clone(), {"weight": weight})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", ["matmul", "matmul_int4", "matmul_int8"])
def test_rows_that_are_multiplied_apart_are_refused_together(op: str) -> None:
    """Before the first of them is written, though only a later one shares memory."""
    call = {name: value for name, value in small_call(op).items() if name not in ("residual", "out")}
    features = call.get("weight", call.get("scales")).shape[0]
    size = call["x"].shape[1]
    buffer = torch.randn(9, max(size, features))
    call["x"], out = buffer[:4, :size], buffer[3:7, :features]
    before = buffer.clone()
    with pytest.raises(ValueError, match=r"^out shares memory with x"):
        getattr(kernels, op)(**call, out=out, deterministic=True)
    assert_equal(buffer, before)
