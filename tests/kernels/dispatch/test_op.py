"""The dispatch: which implementation runs and why, what is refused, and what is registered."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

from fastllama import kernels
from fastllama.catalogue.arguments import results
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS, Op
from tests.kernels.honest import assert_equal

FLOAT_INPUTS = [
    (op, name)
    for op in OPS
    for name, value in small_call(op).items()
    if isinstance(value, torch.Tensor) and value.is_floating_point()
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]) -> None:
    """Clears the ops' choices of backend before and after a test."""
    force("auto")
    monkeypatch.delenv("FASTLLAMA_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: bool) -> None:
    """Pretends that a package is installed, or is not."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        if name in installed:
            return ModuleSpec(name, None) if installed[name] else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


# op with Triton and Numba kernels, one with torch's CPU path alone, one with the reference alone
@pytest.mark.parametrize(
    ("op", "device", "variable", "numba", "backend", "reason"),
    [
        ("rms_norm", "cpu", "auto", True, "numba", "tensors on cpu, Numba is installed"),
        ("rms_norm", "cpu", "auto", False, "reference", "tensors on cpu; the reference is the CPU backend"),
        ("matmul", "cpu", "auto", True, "numba", "tensors on cpu, Numba is installed"),
        ("matmul", "cpu", "auto", False, "cpu", "tensors on cpu"),
        ("attention_varlen", "cpu", "auto", True, "cpu", "tensors on cpu"),
        ("attention_prefill", "cpu", "auto", True, "numba", "tensors on cpu, Numba is installed"),
        ("embedding", "cpu", "auto", True, "reference", "tensors on cpu; the reference is the CPU backend"),
        ("rms_norm", "cpu", "reference", True, "reference", "FASTLLAMA_BACKEND=reference"),
        ("rms_norm", "cuda", "auto", True, "triton", "tensors on cuda"),
        ("rms_norm", "cuda", "triton", True, "triton", "FASTLLAMA_BACKEND=triton"),
        ("matmul_bf12", "cpu", "triton", True, "numba", "no Triton kernel yet; tensors on cpu, Numba is installed"),
        ("matmul_bf12", "mps", "triton", False, "reference", "no Triton kernel yet; no kernels for mps"),
        ("matmul_bf12", "cuda", "triton", True, "reference", "no Triton kernel yet"),
        ("matmul_bf12", "mps", "triton", True, "reference", "no Triton kernel yet; no kernels for mps"),
        ("rms_norm", "cuda", "reference", True, "reference", "FASTLLAMA_BACKEND=reference"),
        ("embedding", "cuda", "auto", True, "triton", "tensors on cuda"),
        ("matmul_bf12", "cuda", "auto", True, "reference", "no Triton kernel yet"),
        ("rms_norm", "mps", "auto", True, "reference", "no kernels for mps"),
    ],
)
def test_what_runs(
    monkeypatch: pytest.MonkeyPatch, op: str, device: str, variable: str, numba: bool, backend: str, reason: str
) -> None:
    if numba and importlib.util.find_spec("numba") is None:
        pytest.skip("needs the extra [cpu]")
    pretend(monkeypatch, numba=numba, triton=True)
    monkeypatch.setenv("FASTLLAMA_BACKEND", variable)
    chosen = OPS[op].implementation(device)
    assert (chosen.backend, chosen.reason) == (backend, reason)
    assert callable(chosen.run)
    if (device, variable) != ("cpu", "triton"):  # there ops with a Triton kernel raise: it is not interpreted
        assert kernels.backend_of(device)[op] == chosen


def test_backend_of_takes_a_tensor_a_device_or_its_name() -> None:
    expected = {name: op.implementation("cpu") for name, op in OPS.items()}
    for device in (torch.zeros(1), torch.device("cpu"), "cpu", "cpu:0"):
        assert kernels.backend_of(device) == expected


def test_the_reference_comes_last_and_once() -> None:
    for op in OPS.values():
        for device in ("cpu", "cuda", "mps"):
            found = [each.backend for each in op.implementations(device)]
            assert found.index("reference") == len(found) - 1
            assert op.implementation(device).backend == found[0]


@pytest.mark.parametrize(
    ("op", "device", "variable", "triton", "message"),
    [
        (
            "rms_norm",
            "cuda",
            "auto",
            False,
            "op rms_norm needs Triton on cuda: pip install triton, or set FASTLLAMA_BACKEND=reference",
        ),
        (
            "rms_norm",
            "cpu",
            "triton",
            True,
            "op rms_norm: Triton kernels run on CPU tensors only in the interpreter; set TRITON_INTERPRET=1",
        ),
        (
            "rms_norm",
            "cpu",
            "triton",
            False,
            "op rms_norm needs Triton on cpu: pip install triton, or set FASTLLAMA_BACKEND=reference",
        ),
    ],
)
def test_what_cannot_be_honoured_raises(
    monkeypatch: pytest.MonkeyPatch, op: str, device: str, variable: str, triton: bool, message: str
) -> None:
    pretend(monkeypatch, triton=triton)
    monkeypatch.setenv("FASTLLAMA_BACKEND", variable)
    with pytest.raises(RuntimeError) as raised:
        OPS[op].implementation(device)
    assert str(raised.value) == message


def test_a_call_raises_too_and_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
            kernels.rms_norm(**small_call("rms_norm"))
    monkeypatch.setenv("FASTLLAMA_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"FASTLLAMA_BACKEND is 'fastest'.*'auto', 'reference', 'triton'"):
        kernels.rms_norm(**small_call("rms_norm"))
    monkeypatch.setenv("FASTLLAMA_BACKEND", "auto")
    kernels.rms_norm(**small_call("rms_norm"))


@pytest.mark.parametrize("op", OPS)
def test_the_variable_decides_which_implementation_a_call_runs(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Read once for each op and device: a value set later changes nothing."""
    ran, given = [], small_call(op)
    reference = OPS[op]._reference
    monkeypatch.setattr(OPS[op], "_reference", lambda *args: (ran.append(op), reference(*args))[1])
    monkeypatch.setenv("FASTLLAMA_BACKEND", "reference")
    getattr(kernels, op)(**given)
    assert ran == [op]
    monkeypatch.setenv("FASTLLAMA_BACKEND", "fastest")
    getattr(kernels, op)(**given)
    assert ran == [op, op]


@pytest.mark.parametrize(("op", "name"), FLOAT_INPUTS)
def test_no_op_pretends_to_have_a_backward(op: str, name: str) -> None:
    """Not even for outputs: writing into a leaf that requires grad would lose its history."""
    given = small_call(op)
    expected = getattr(kernels, op)(**small_call(op))
    torch.manual_seed(0)
    given[name].requires_grad_()
    message = f"^{name} requires grad, and op {op} has no backward: call it under torch.inference_mode"
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, op)(**given)
    with torch.no_grad():
        found = getattr(kernels, op)(**given)
    assert type(found) is type(expected)


@pytest.mark.parametrize("op", OPS)
def test_inference_mode_changes_nothing(op: str) -> None:
    given = small_call(op)
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    expected = results(op, own, getattr(kernels, op)(**own))
    with torch.inference_mode():
        found = results(op, given, getattr(kernels, op)(**given))
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal(ours.clone(), theirs)


def test_every_op_is_registered_once() -> None:
    assert all(hasattr(torch.ops.fastllama, name) for name in OPS)
    before = dict(OPS)
    with pytest.raises(RuntimeError, match="multiple times"):
        Op("rms_norm(Tensor x, float eps, Tensor(a!) out) -> ()", check=print, reference=kernels.reference.rms_norm)
    assert before == OPS
