"""Every op under torch.compile without a graph break, and torch's own checks of how it is registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import inputs, positional
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import assert_equal

# inductor itself still uses what torch has deprecated
INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
)
WITH_LSE = [op for op in OPS if op.startswith("attention")]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Resets torch.compile: one function compiled by many tests would reach the limit of graphs."""
    torch.compiler.reset()


def copy(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}


def same(found: Any, expected: Any) -> None:
    """Results, whether one tensor, several or arguments by name."""
    found, expected = (
        x
        if isinstance(x, tuple)
        else tuple(v for v in x.values() if isinstance(v, Tensor))
        if isinstance(x, dict)
        else (x,)
        for x in (found, expected)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("op", "lse"), [*((op, False) for op in OPS), *((op, True) for op in WITH_LSE)])
def test_opcheck(op: str, lse: bool) -> None:
    """Schema (what is written and what is not), autograd registration, fake tensors, and tracing by AOTAutograd."""
    given = small_call(op)
    if lse:
        given["lse_out"] = torch.empty(given["q"].shape[:2])
    torch.library.opcheck(getattr(torch.ops.fastllama, op).default, positional(op, given))


@pytest.mark.parametrize("allocate", [True, False], ids=["allocated", "given"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_is_eager(op: str, allocate: bool) -> None:
    """Results and everything written in place."""
    given = small_call(op)
    if allocate:
        given = inputs(op, given)
    options = {"return_lse": True} if op in WITH_LSE else {}
    function = getattr(kernels, op)
    ours, theirs = copy(given), copy(given)
    compiled = torch.compile(lambda **args: function(**args), fullgraph=True, backend="aot_eager")
    same(compiled(**ours, **options), function(**theirs, **options))
    same(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_all_sizes_of_a_batch(op: str) -> None:
    """No check reads the value of a size that may change from one step to the next, which would recompile."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    function = getattr(kernels, op)
    compiled = torch.compile(lambda **args: function(**args), fullgraph=True, dynamic=True, backend=count)
    fixed = {"weight", "codes", "outliers", "packed", "scales", "zeros", "bias", "counts", "norm", "cos_sin"}
    fixed |= {"k_pages", "v_pages"}
    for repeats in (1, 2, 3):
        given = inputs(op, small_call(op))
        for name, value in given.items():
            if name.startswith("cu_seqlens"):
                step = value[-1]
                given[name] = torch.cat([value[:1], *(value[1:] + i * step for i in range(repeats))])
            elif isinstance(value, Tensor) and name not in fixed:
                given[name] = value.repeat(repeats, *[1] * (value.dim() - 1))
        same(compiled(**copy(given)), function(**copy(given)))
    assert len(graphs) == 1


def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of a block as the layers call them: the second in place, over its own inputs."""
    hidden = kernels.rms_norm(x, weight)
    kernels.rms_norm(hidden, weight, out=hidden)
    return kernels.add_rms_norm(hidden + 1, residual, weight, out=hidden, residual_out=residual)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_in_place_norms_stay_right_when_compiled(backend: str) -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    ours, theirs = residual.clone(), residual.clone()
    expected = layer(x, theirs, weight)
    before = x.clone()
    found = torch.compile(layer, fullgraph=True, backend=backend)(x, ours, weight)
    same(found, expected)
    assert_equal(ours, theirs)
    assert_equal(x, before)


def aliased(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.add_rms_norm(x, residual, weight, out=x, residual_out=residual)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_an_op_over_its_own_inputs_stays_right_when_compiled(backend: str) -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    ours, theirs = (x.clone(), residual.clone()), (x.clone(), residual.clone())
    same(torch.compile(aliased, fullgraph=True, backend=backend)(*ours, weight), aliased(*theirs, weight))
    same(ours, theirs)


def test_a_graph_refuses_grad_too() -> None:
    compiled = torch.compile(kernels.rms_norm, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="weight requires grad, and op rms_norm has no backward"):
        compiled(torch.randn(2, 8), torch.ones(8, requires_grad=True))
