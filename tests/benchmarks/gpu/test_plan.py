"""The stages of `make gpu`: their order, their limits, and that each command can be run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.gpu.plan import MINUTES, SWITCHES, Stage, plan
from fastllama import env
from fastllama.cli.main import _parser

OUT = Path("/out")


@pytest.fixture(params=[False, True], ids=["gpu", "dry"])
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return list(plan(OUT, cache=Path("/cache.tar.xz"), workers=16, dry=request.param))


def test_the_most_valuable_comes_first(stages: list[Stage]) -> None:
    """Correctness first, then our speed, then the peers'."""
    names = [stage.name for stage in stages]
    assert names[:4] == ["facts", "cache", "parity", "tokens, as it is"]
    wanted = ["parity", "tokens, no graphs", "ceilings", "decode at 512", "block", "tests of runtime", "ops", "tuning"]
    assert [name for name in names if name in wanted] == wanted
    assert len(set(names)) == len(names)


def test_the_walk_is_of_the_same_stages() -> None:
    """Except for the stage that only has peers on a GPU."""
    real, dry = ([stage.name for stage in plan(OUT, cache=None, workers=2, dry=dry)] for dry in (False, True))
    assert [name for name in real if name not in dry] == ["decode, peers"]
    assert [name for name in dry if name not in real] == []


def test_commands_are_there(stages: list[Stage]) -> None:
    for stage in stages:
        assert stage.argv[0] == "-m"
        assert importlib.util.find_spec(stage.argv[1]) is not None, stage.name
        if stage.argv[1].startswith("benchmarks."):
            importlib.import_module(stage.argv[1])  # a name that has moved would cost the stage
        if stage.argv[1] == "fastllama":
            _parser().parse_args([*stage.argv[2:], *(("--output", "x") if stage.writes else ())])


def test_files_of_tests_are_there(stages: list[Stage]) -> None:
    root = Path(__file__).parents[3]
    named = [word for stage in stages for word in stage.argv if word.startswith("tests/")]
    assert len(named) >= 4
    assert [word for word in named if not (root / word).exists()] == []


def test_switches_are_variables_with_legal_values() -> None:
    legal = {variable.name: variable.legal for variable in env.VARIABLES}
    for mode, variables in SWITCHES.items():
        assert all(value in legal[name] for name, value in variables.items()), mode
    assert SWITCHES["as it is"] == {}
    assert len(SWITCHES) == 5


def test_a_limit_never_passes_what_is_left() -> None:
    stage = Stage("s", (), least=10, most=60)
    assert stage.limit(MINUTES, 400.0) == 60.0
    assert stage.limit(4.0, 400.0) == 60.0  # a shorter run has fewer stages, not shorter ones
    assert stage.limit(16.0, 400.0) == 120.0
    assert stage.limit(MINUTES, 30.0) == 30.0
    assert stage.limit(MINUTES, 9.0) == 0.0
