"""A call like an earlier one is recognised by all that decides its legality, and runs without another check."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.likeness import Likeness
from fastllama.kernels.dispatch.op import _MOST_KNOWN, OPS
from tests.kernels.honest import assert_equal

WEIGHT = torch.ones(8)


def x() -> Tensor:
    return torch.zeros(3, 8)


SAME = x()
UNLIKE: dict[str, tuple[Any, ...]] = {
    "a row more": (torch.zeros(4, 8), x(), 1e-5, None),
    "a dimension more": (x()[None], x(), 1e-5, None),
    "strides": (torch.zeros(8, 3).t(), x(), 1e-5, None),
    "dtype": (x().half(), x(), 1e-5, None),
    "dtype of another": (x(), x().half(), 1e-5, None),
    "device": (x().to("meta"), x(), 1e-5, None),
    "a parameter": (torch.nn.Parameter(x(), requires_grad=False), x(), 1e-5, None),
    "requires grad": (x().requires_grad_(), x(), 1e-5, None),
    "one tensor twice": (SAME, SAME, 1e-5, None),
    "no tensor": (x(), None, 1e-5, None),
    "a tensor more": (x(), x(), 1e-5, x()),
    "a number": (x(), x(), 1e-6, None),
    "no tensor at all": ([], x(), 1e-5, None),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_makes_calls_unlike(name: str) -> None:
    like = Likeness((x(), x(), 1e-5, None), (0, 1, 3))
    assert like.match((x(), x(), 1e-5, None))
    assert not like.match(UNLIKE[name])
    assert like.match((x(), x(), 1e-5, None))


def test_a_tensor_that_came_twice_must_again() -> None:
    like = Likeness((SAME, 1e-5, SAME), (0, 2))
    other = x()
    assert like.match((other, 1e-5, other))
    assert not like.match((other, 1e-5, x()))


def test_what_tensors_hold_and_where_makes_no_difference() -> None:
    like = Likeness((x(), x()), (0, 1))
    assert like.match((torch.ones(5, 8)[2:], torch.full((3, 8), torch.nan)))


def test_inference_tensors_are_others_than_those_that_grad_could_know() -> None:
    with torch.inference_mode():
        like = Likeness((x(), x()), (0, 1))
        assert like.match((x(), x()))
    assert not like.match((x(), x()))


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_is_kept_alive(op: str) -> None:
    given = small_call(op)
    with torch.inference_mode():
        getattr(kernels, op)(**given)
    alive = [weakref.ref(value) for value in given.values() if isinstance(value, Tensor)]
    shared = {id(value) for value in small_call(op).values()}  # the module's own
    del given
    gc.collect()
    assert [ref() for ref in alive if ref() is not None and id(ref()) not in shared] == []


@pytest.mark.parametrize("op", OPS)
def test_a_call_like_an_earlier_one_is_not_checked_and_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, run = [], []
    check, implementation = OPS[op]._check, OPS[op].implementation("cpu").run

    def noted(*args: Any) -> None:
        run.append(args)
        implementation(*args)

    monkeypatch.setattr(OPS[op], "_check", lambda *args: (checked.append(args), check(*args)))
    with torch.inference_mode(), OPS[op].bound_to(torch.device("cpu"), noted):
        results = []
        for _ in range(3):
            torch.manual_seed(0)
            result = getattr(kernels, op)(**small_call(op))
            results.append(result[0] if isinstance(result, tuple) else result)
    assert (len(checked), len(run)) == (1, 3)
    assert len({id(args[0]) for args in run}) == 3
    assert_equal(results[2], results[0])


def test_an_implementation_may_name_what_runs_the_calls_after_it(bind: Callable[..., None]) -> None:
    ran: list[str] = []

    def first(*args: Any) -> Callable[..., None]:
        ran.append("first")
        return lambda *args: ran.append("again")

    bind("silu_mul", first)
    for rows in (2, 2, 3, 2, 3):
        kernels.silu_mul(torch.ones(rows, 8))
    assert ran == ["first", "again", "first", "again", "again"]


def test_grad_is_refused_also_of_what_was_known_without() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    for _ in range(2):
        with torch.no_grad():
            kernels.rms_norm(x(), weight)
        with pytest.raises(RuntimeError, match=r"^weight requires grad"):
            kernels.rms_norm(x(), weight)


def test_what_is_refused_is_not_known() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^weight has shape"):
            kernels.rms_norm(x(), torch.ones(7))


def test_another_implementation_starts_anew_and_so_does_the_one_after_it() -> None:
    calls: list[str] = []
    kernels.rms_norm(x(), WEIGHT)
    with OPS["rms_norm"].bound_to(torch.device("cpu"), lambda *args: calls.append("other")):
        kernels.rms_norm(x(), WEIGHT)
        kernels.rms_norm(x(), WEIGHT)
    assert calls == ["other", "other"]
    assert_equal(kernels.rms_norm(x(), WEIGHT), x())
    assert calls == ["other", "other"]


def test_only_so_many_are_remembered() -> None:
    for rows in range(1, 3 * _MOST_KNOWN):
        kernels.rms_norm(torch.ones(rows, 8), WEIGHT)
    assert 1 <= len(OPS["rms_norm"]._known) <= _MOST_KNOWN


@pytest.mark.parametrize("eps", [torch.zeros(()), torch.tensor([1e-5]), "1e-5", None, [1e-5]], ids=str)
def test_what_is_no_number_is_refused_also_where_a_call_with_its_value_is_known(eps: Any) -> None:
    """A tensor's value could change after a launch has stored it."""
    for known in (0.0, 1e-5):
        kernels.rms_norm(x(), WEIGHT, known)
    with pytest.raises(TypeError, match=r"^eps is .* of type \w+; legal: a number|^unhashable"):
        kernels.rms_norm(x(), WEIGHT, eps)


@pytest.mark.parametrize("eps", [1, np.float32(1e-5), np.float64(1e-5), np.int32(0)], ids=repr)
def test_numbers_of_every_kind_are_taken(eps: Any) -> None:
    given = torch.randn(3, 8)
    assert_equal(kernels.rms_norm(given, WEIGHT, eps), kernels.rms_norm(given, WEIGHT, float(eps)))


def test_no_tensor_at_all() -> None:
    with pytest.raises(TypeError, match=r"^weight is None of type NoneType; legal: a tensor$"):
        kernels.rms_norm(x(), None)  # type: ignore[arg-type]
