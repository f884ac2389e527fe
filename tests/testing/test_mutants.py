"""The runner of mutants, on a toy project: what is caught, what survives, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllama.testing import mutants
from fastllama.testing.mutants import Mutant, Verdict

MODULE = "def double(x):\n    return 2 * x\n\n\ndef unused():\n    return 1\n"
TESTS = """
import os
import toy

def test_double():
    assert toy.double(3) == 6

def test_tier():
    assert os.environ.get("TRITON_INTERPRET") == "1"
"""
TABLE = """
from fastllama.testing.mutants import Mutant
MUTANTS = (
    Mutant("adds", "toy.py", "2 * x", "2 + x", ("test_toy.py",)),
    Mutant("not tested", "toy.py", "return 1", "return 2", ("test_toy.py",)),
)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(MODULE)
    (tmp_path / "test_toy.py").write_text(TESTS)
    (tmp_path / "table.py").write_text(TABLE)
    return tmp_path


def mutant(old: str, new: str, tests: str = "test_toy.py::test_double", interpreter: bool = True) -> Mutant:
    return Mutant("planted", "toy.py", old, new, (tests,), interpreter)


def test_verdicts(project: Path) -> None:
    """The second edit is as long as the first, and made in the same second: stale bytecode must not be used."""
    planted = [
        mutant("return 1", "return 2"),
        mutant("2 * x", "2 + x", "test_toy.py"),
        mutant("2 * x", "2 *"),
        mutant("2 * x", "2 + x", interpreter=False),
    ]
    found = list(mutants.run(planted, project))
    assert [each.mutant for each in found] == planted
    assert [each.outcome for each in found] == ["survived", "killed", "broken", "killed"]
    failed = "FAILED test_toy.py::test_double - assert 5 == 6"
    assert [each.failure for each in found] == ["", failed, "ERROR test_toy.py", failed]
    assert (project / "toy.py").read_text() == MODULE


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("test_toy.py", "FAILED test_toy.py::test_tier"),
        ("test_toy.py::test_doubel", "not found: .*test_doubel"),
        ("--deselect=test_toy.py", "2 deselected"),
    ],
)
def test_tests_that_do_not_pass_without_a_fault_prove_nothing(project: Path, tests: str, message: str) -> None:
    """Also tests that do not exist."""
    with pytest.raises(RuntimeError, match=rf"(?s)^pytest {tests} does not pass without any mutant:\n.*{message}"):
        list(mutants.run([mutant("2 * x", "2 + x", tests, interpreter=False)], project))


@pytest.mark.parametrize(
    ("tests", "markers", "outcome"),
    [
        (("test_toy.py",), "not slow", "survived"),
        (("-m", "slow", "test_toy.py"), "not slow", "untested"),
    ],
)
def test_markers_choose_among_a_mutants_tests(
    project: Path, tests: tuple[str, ...], markers: str, outcome: str
) -> None:
    marked = TESTS.replace("def test_double", "import pytest\n@pytest.mark.slow\ndef test_double")
    (project / "test_toy.py").write_text(marked)
    (project / "pytest.ini").write_text("[pytest]\nmarkers = slow: so")
    planted = Mutant("planted", "toy.py", "2 * x", "2 + x", tests)
    assert [each.outcome for each in mutants.run([planted], project, markers=markers)] == [outcome]


def test_what_the_caller_adds_to_pytest_is_not_inherited(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--deselect=test_toy.py")
    assert [each.outcome for each in mutants.run([mutant("2 * x", "2 + x")], project)] == ["killed"]


def test_skipped_tests_kill_nothing(project: Path) -> None:
    (project / "test_toy.py").write_text("import pytest\n\ndef test_toy():\n    pytest.skip()\n")
    assert [each.outcome for each in mutants.run([mutant("2 * x", "2 + x", "test_toy.py")], project)] == ["survived"]


def test_tests_that_never_end_have_failed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "TIMEOUT", 0.01)
    assert mutants._pytest(project, ["test_toy.py"], interpreter=True) == (1, "FAILED after 0.01 s")


@pytest.mark.parametrize(("old", "count"), [("3 * x", 0), ("return", 2), ("2 * x", 1)])
def test_a_mutant_that_does_not_fit_is_refused(project: Path, old: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"^mutant 'planted': .* stands {count} times in toy.py; legal: once$"):
        list(mutants.run([mutant(old, old)], project))


def test_the_command(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    assert mutants.main(["table.py", "--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["killed", "survived", "1"]
    assert lines[2] == "1 of 2 mutants killed"
    assert mutants.main(["table.py", "--shard", "1/2"]) == 0
    assert capsys.readouterr().out.endswith("1 of 1 mutants killed\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        mutants.main(["table.py", "-k", "no such"])
    assert "no mutant has 'no such' in its name or path; there are 2" in capsys.readouterr().err


def test_a_page_gets_the_outcomes_in_place_of_the_last_ones() -> None:
    outcomes = {"adds": "killed", "forgets": "untested", "halves": "survived"}
    verdicts = [Verdict(Mutant(name, "a/toy.py", "", "", ()), kind, "", 0) for name, kind in outcomes.items()]
    verdicts.append(Verdict(Mutant("adds", "other.py", "", "", ()), "killed", "", 0))
    page = mutants.written("Above.\n<!-- mutants -->\nold\n<!-- end of mutants -->\nBelow.\n", verdicts)
    assert page.splitlines() == [
        "Above.",
        "<!-- mutants -->",
        "",
        "| file | mutants | killed | not killed |",
        "|---|---|---|---|",
        "| `a/toy.py` | 3 | 1 | forgets, halves |",
        "| `other.py` | 1 | 1 | - |",
        "",
        "<!-- end of mutants -->",
        "Below.",
    ]
    assert mutants.written(page, verdicts) == page
