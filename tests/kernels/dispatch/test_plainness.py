"""Every op with tensor subclasses and under torch's modes: what torch would do, or a clear error."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama import kernels
from fastllama.catalogue.arguments import inputs, outputs, results
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.honest import assert_equal

every_op = pytest.mark.parametrize("op", OPS)
# Each argument of each op that is a tensor, outputs among them.
PLACES = [(op, name) for op in OPS for name, value in small_call(op).items() if isinstance(value, Tensor)]
FLOATS = [(op, name) for op, name in PLACES if small_call(op)[name].dtype == torch.float32 and name not in outputs(op)]
every_float = pytest.mark.parametrize(("op", "name"), FLOATS)
every_tensor = pytest.mark.parametrize(("op", "name"), PLACES)


def changed(call: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in call.items()}


def run(op: str, call: dict[str, Any]) -> tuple[Tensor, ...]:
    return results(op, call, getattr(kernels, op)(**call))


@pytest.fixture(autouse=True)
def _known() -> None:
    """Each op has run the call with plain tensors before: a subclass must not be mistaken for them."""
    for op in OPS:
        run(op, small_call(op))


@every_op
def test_fake_tensors_give_fake_results(op: str) -> None:
    expected = run(op, small_call(op))
    mode = FakeTensorMode()
    call = inputs(op, changed(small_call(op), mode.from_tensor))
    with mode:
        found = run(op, call)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, FakeTensor)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)


@every_op
def test_meta_tensors_give_meta_results(op: str) -> None:
    expected = run(op, small_call(op))
    found = run(op, inputs(op, changed(small_call(op), lambda tensor: tensor.to("meta"))))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device.type) == (theirs.shape, theirs.dtype, "meta")


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_op
def test_make_fx_has_the_op_in_its_graph(op: str, mode: str) -> None:
    call = small_call(op)
    names = [name for name, value in call.items() if isinstance(value, Tensor)]

    def program(*given: Tensor) -> Any:
        return getattr(kernels, op)(**(call | dict(zip(names, given, strict=True))))

    graph = make_fx(program, tracing_mode=mode)(*(call[name] for name in names))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert getattr(torch.ops.fastllama, op).default in targets


@every_op
def test_a_mode_sees_the_op_and_its_result_is_right(op: str) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    torch.manual_seed(0)
    expected = run(op, small_call(op))
    torch.manual_seed(0)
    call = small_call(op)
    with Seen():
        found = run(op, call)
    assert seen.count(getattr(torch.ops.fastllama, op).default) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


class Wrapped(Tensor):
    """A tensor without memory of its own, as torchao's weights and DTensor are."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, strides=held.stride(), device=held.device
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"asked for {func}")


@every_tensor
def test_a_wrapper_is_asked(op: str, name: str) -> None:
    call = small_call(op)
    with pytest.raises(NotImplementedError, match=rf"^asked for fastllama\.{op}"):
        run(op, call | {name: Wrapped(call[name])})


class Named(Tensor):
    """A subclass that holds data as any tensor does."""


@every_op
def test_a_subclass_with_data_gives_what_its_data_does(op: str) -> None:
    torch.manual_seed(0)
    expected = run(op, small_call(op))
    torch.manual_seed(0)
    call = small_call(op)
    found = run(op, changed(call, lambda tensor: tensor.as_subclass(Named)))
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours.as_subclass(Tensor), theirs)


@every_tensor
def test_a_storage_that_was_freed_is_an_error(op: str, name: str) -> None:
    """As FSDP does between a module's calls."""
    call = small_call(op)
    call[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name} has no memory for its {call[name].numel()} elements"):
        run(op, call)
    with pytest.raises(ValueError, match=rf"^{name} has no memory for its"):
        getattr(torch.ops.fastllama, op)(*(call.get(each) for each in OPS[op].names))


@every_float
def test_a_zero_tensor_is_an_error(op: str, name: str) -> None:
    """Autograd's zeros, which take no memory: torch's fallback would lose what the op writes."""
    call = small_call(op)
    with pytest.raises(ValueError, match=rf"^{name} has no memory for its"):
        run(op, call | {name: torch._efficientzerotensor(call[name].shape)})


@every_tensor
def test_what_is_not_strided_is_an_error(op: str, name: str) -> None:
    call = small_call(op)
    with pytest.raises(TypeError, match=rf"^{name} has layout torch\.sparse_coo; legal: torch\.strided$"):
        run(op, call | {name: torch.empty(call[name].shape, dtype=call[name].dtype, layout=torch.sparse_coo)})


@every_float
def test_a_lazy_negative_is_the_negative_or_an_error(op: str, name: str) -> None:
    """An error where it is an output: torch's own fallback would not write it."""
    torch.manual_seed(0)
    call = small_call(op)
    call[name].neg_()
    expected = run(op, call)
    torch.manual_seed(0)
    call = small_call(op)
    if OPS[op].names.index(name) in OPS[op]._written:
        with pytest.raises(RuntimeError, match=r"^Expected Tensor but got None$"):
            run(op, call | {name: torch._neg_view(call[name])})
        return
    found = run(op, call | {name: torch._neg_view(call[name])})
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_float
def test_no_transform_is_passed_by(op: str, name: str) -> None:
    """Derivatives that an op does not have, vmap's hidden batch dimension, writes that functionalization would miss."""
    call = small_call(op)
    given = call[name]

    def first(x: Tensor) -> Tensor:
        return run(op, inputs(op, call) | {name: x})[0].float().sum()

    no_derivative = rf"^{name} (carries a tangent|requires grad), and op {op} has no"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=no_derivative):
        first(forward_ad.make_dual(given, torch.ones_like(given)))
    with pytest.raises(RuntimeError, match=no_derivative):
        torch.func.jvp(first, (given,), (torch.ones_like(given),))
    with pytest.raises(RuntimeError, match=no_derivative):
        torch.func.grad(first)(given)
    with pytest.raises(RuntimeError, match=rf"fastllama::{op}"):
        torch.func.functionalize(first)(given)
    with pytest.raises(RuntimeError, match=r"vmap|[Bb]atch"):
        torch.func.vmap(first)(given.expand(2, *given.shape))


@every_op
def test_what_autograd_saved_is_not_overwritten_unseen(op: str) -> None:
    call = small_call(op)
    for name in {*outputs(op)} & {*call}:
        if not call[name].is_floating_point():
            continue
        saved = call[name]
        loss = (torch.ones_like(saved).requires_grad_() * saved).sum()
        with torch.no_grad():
            run(op, call)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()


@every_op
def test_inference_tensors_are_not_written_outside_of_inference_mode(op: str) -> None:
    """As torch's own out= requires; raised before anything is written."""
    with torch.inference_mode():
        call = small_call(op)
        kept = {name: call[name].clone() for name in {*outputs(op)} & {*call}}
    with pytest.raises(RuntimeError, match=r"^\w+ is an inference tensor, which must not be written outside"):
        run(op, call)
    for name, value in kept.items():
        torch.testing.assert_close(call[name], value, rtol=0, atol=0, equal_nan=True)


def test_dtensor_reports_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, weight = (distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (torch.randn(3, 8), torch.ones(8)))
        with pytest.raises(NotImplementedError, match="does not have a sharding strategy"):
            kernels.rms_norm(x, weight)
    finally:
        dist.destroy_process_group()
