"""The drop-in adapters have the signatures of flash-attn and FlashInfer, and treat each argument as documented.

`signatures/*.json` is read from those packages' sources (`tools/signatures.py`), `signatures/treatment.py` lists how
each argument is treated here, `signatures/calls.py` has a small call of each function.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.signatures.calls import CALLS
from tests.integrations.signatures.treatment import TREATMENTS
from tools.signatures import FOLDER, PAGE, Theirs, theirs

ALL = theirs()


def key_of(each: Theirs) -> tuple[str, str]:
    return each.module, each.name


FUNCTIONS = [each for each in ALL if isinstance(each.signature, list)]
# Each of ours once, with all of theirs that it stands for.
OURS = [list(found) for _, found in groupby(sorted(FUNCTIONS, key=key_of), key=key_of)]
# FlashAttention 3 and 4 have the arguments of 2 in another order: theirs are keywords here.
OTHER_SPELLINGS = ("FA3", "FA4")


def cases(found: list[Theirs]) -> list[Any]:
    return [pytest.param(each, id=f"{each.module}-{each.variant}-{each.name}") for each in found]


def ours() -> list[Any]:
    return [pytest.param(found, id=f"{found[0].module}-{found[0].name}") for found in OURS]


def arguments(found: list[Theirs]) -> set[str]:
    """Names of our arguments and of theirs."""
    here = {p.name for p in found[0].our_parameters() if p.kind is not p.VAR_KEYWORD}
    return here | {name for each in found for name, *_ in each.signature or ()}


def defaults(each: Theirs) -> dict[str, Any]:
    return {name: eval(default[0], {"torch": torch}) for name, _, *default in each.signature or () if default}


def assert_equal(found: Any, expected: Any) -> None:
    """Assert equality, of tensors bit by bit, in nested tuples too."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("each", cases([each for each in FUNCTIONS if each.variant not in OTHER_SPELLINGS]))
def test_positions_and_defaults_are_theirs(each: Theirs) -> None:
    here = each.our_parameters()
    by_position = [name for name, kind, *_ in each.signature or () if kind == "positional or keyword"]
    assert [p.name for p in here if p.kind is p.POSITIONAL_OR_KEYWORD][: len(by_position)] == by_position
    theirs_here = {p.name: p.default for p in here if p.name in defaults(each)}
    assert theirs_here == defaults(each)


@pytest.mark.parametrize("each", cases(FUNCTIONS))
def test_what_they_take_may_be_given_by_name_at_its_default_and_changes_nothing(each: Theirs) -> None:
    """FlashAttention 3 and 4 are included, whose defaults differ."""
    call = CALLS[each.name]
    assert_equal(call(**{name: value for name, value in defaults(each).items() if name not in call.arguments}), call())


@pytest.mark.parametrize("each", cases([each for each in ALL if isinstance(each.signature, str)]))
def test_their_other_names_are_here(each: Theirs) -> None:
    assert isinstance(each.ours(), property) == (each.signature == "property")


def test_what_is_absent_is_absent() -> None:
    for each in ALL:
        if each.signature is None:
            with pytest.raises(AttributeError):
                each.ours()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_their_package_exports_ours_does(path: Path) -> None:
    ours = import_module(f"fastllama.integrations.{path.stem.split('-')[0].removesuffix('_python')}")
    assert set(json.loads(path.read_text(encoding="utf-8"))["root"]) - set(ours.__all__) == set()


def test_every_argument_has_one_treatment() -> None:
    for found in OURS:
        for argument in arguments(found):
            assert found[0].becomes(argument)


def test_a_taken_argument_is_read() -> None:
    unread = []
    for found in OURS:
        source = ast.parse(textwrap.dedent(inspect.getsource(found[0].ours())))
        read = {node.id for node in ast.walk(source) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        names = [p.name for p in found[0].our_parameters() if p.kind is not p.VAR_KEYWORD]
        unread += [
            f"{found[0].name}.{name}" for name in names if found[0].becomes(name)[0] == "taken" and name not in read
        ]
    assert unread == []


@pytest.mark.parametrize("package", TREATMENTS)
def test_every_treatment_is_that_of_some_argument(package: str) -> None:
    treatment = TREATMENTS[package]
    here = [found for found in OURS if found[0].treatment is treatment]
    used = {found[0].becomes(argument)[1] for found in here for argument in arguments(found)}
    assert set().union(*treatment.keys().values()) - used == set()
    absent = {name for names in treatment.absent.values() for name in names.split()}
    assert absent == {each.name for each in ALL if each.treatment is treatment and each.signature is None}


@pytest.mark.parametrize("found", ours())
def test_a_refused_argument_is_refused_by_its_name(found: list[Theirs]) -> None:
    names = arguments(found)
    for argument in sorted(names):
        kind, key = found[0].becomes(argument)
        if kind != "refused":
            continue
        for others in ({}, {"causal": True}) if "causal" in names else ({},):
            with pytest.raises(NotImplementedError, match=rf"^{argument} is "):
                CALLS[found[0].name](**{argument: found[0].treatment.refused[key]}, **others)


@pytest.mark.parametrize("found", ours())
def test_an_ignored_argument_changes_nothing(found: list[Theirs]) -> None:
    call = CALLS[found[0].name]
    for argument in sorted(arguments(found)):
        kind, key = found[0].becomes(argument)
        if kind == "ignored":
            value, _ = found[0].treatment.ignored[key]
            assert_equal(call(**{argument: value}), call())


def test_the_examples_of_the_page_run() -> None:
    *calls, of_transformers = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(calls) == 2
    for example in calls:
        found: dict[str, Any] = {}
        exec(example, found)
        assert found["out"].shape == found["q"].shape
    exec(of_transformers, found)
    assert found["model"].config._attn_implementation == "fastllama_flash"
