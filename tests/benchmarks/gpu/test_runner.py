"""Stages run as processes: their limits hold, their output is kept, and a failure shows at once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import results, runner
from benchmarks.gpu.plan import Stage


def stage(name: str, source: str, **options: Any) -> Stage:
    return Stage(name, ("-c", source), **({"least": 1, "most": 60} | options))


def ended(out: Path, name: str) -> dict[str, Any]:
    return results.outcome(results.read(out)[name])


def test_outcomes(tmp_path: Path) -> None:
    stages = [
        stage("good", "print('fine')"),
        stage("bad", "print('why'); raise SystemExit(3)"),
        stage("untested", "raise SystemExit(5)"),
        stage("lacking", "", needs=("no_such_package",)),
        stage("late", "", least=600),
    ]
    assert not runner.run(stages, tmp_path, 1.0, {})
    assert [ended(tmp_path, each.name)["outcome"] for each in stages] == [
        "passed",
        "failed",
        "no test here",
        "skipped",
        "skipped",
    ]
    assert ended(tmp_path, "lacking")["why"] == "no_such_package not installed"
    assert ended(tmp_path, "late")["why"].endswith("600 wanted")
    assert runner.run(stages[:1] + stages[2:], tmp_path, 1.0, {})


def test_a_failure_shows_its_last_lines_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.run([stage("bad", "raise ValueError('the reason')")], tmp_path, 1.0, {})
    printed = capsys.readouterr().out
    assert printed.startswith("bad: failed in 0 s\n")
    assert "ValueError: the reason" in printed
    assert "ValueError: the reason" in (tmp_path / runner.LOG).read_text()


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Its output until then is kept."""
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.1)"
    source = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "open(sys.argv[-1], 'w').write('{\"cases\": [1]}'); time.sleep(60)"
    )
    start = time.monotonic()
    assert runner.run([stage("long", source, most=2, writes=True)], tmp_path, 1.0, {})
    assert time.monotonic() - start < 20
    found = ended(tmp_path, "long")
    assert (found["outcome"], found["record"]) == ("cut short", {"cases": [1]})
    assert not (tmp_path / "current.json").exists()
    count = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == count > 0


def test_variables_are_those_of_the_run_and_of_the_stage(tmp_path: Path) -> None:
    source = "import os; print('seen', os.environ['ALL'], os.environ['OWN'])"
    runner.run([stage("s", source, variables={"OWN": "2"})], tmp_path, 1.0, {"ALL": "1", "OWN": "1"})
    assert "seen 1 2" in (tmp_path / runner.LOG).read_text()


def test_what_the_caller_adds_to_pytest_is_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-q")
    assert runner.run([stage("s", "import os; assert 'PYTEST_ADDOPTS' not in os.environ")], tmp_path, 1.0, {})


def test_what_an_earlier_run_left_is_gone(tmp_path: Path) -> None:
    runner.run([stage("old", "print('old')")], tmp_path, 1.0, {})
    runner.run([stage("new", "print('new')")], tmp_path, 1.0, {})
    assert list(results.read(tmp_path)) == ["new"]
    assert "old" not in (tmp_path / runner.LOG).read_text()


def test_a_run_leaves_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may bring back eight, and none deeper than two folders."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path), "--stages", "ceilings"])
    assert command.main() == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log.txt", "report.md", "results.jsonl", "verdict.md"]
    assert any("environment" in line for line in results.read(tmp_path)["facts"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "3"], "--minutes is 3; legal: 4 to 60"),
        (["--stages", "facts", "lunch"], "--stages are ['lunch']; legal: facts, "),
        (["--cache", "/no/file"], "--cache is /no/file, which is no file"),
    ],
)
def test_options_that_are_not_legal(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_without_a_gpu_only_the_walk_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "no GPU here; --dry walks the stages" in capsys.readouterr().err


def test_lines_are_read_up_to_where_a_run_was_cut(tmp_path: Path) -> None:
    path = tmp_path / results.FILE
    results.append(path, stage="a", error=float("inf"), found=[1.5, float("nan")])
    with path.open("a") as file:
        file.write('{"stage": "a", "half')
    assert results.read(tmp_path) == {"a": [{"stage": "a", "error": "inf", "found": [1.5, "nan"]}]}
    assert json.loads(path.read_text().splitlines()[0])


def test_what_a_stage_has_written_is_there_while_it_runs(tmp_path: Path) -> None:
    """A run that is lost with its machine leaves that, and the output of each stage before it."""
    seen: list[list[str]] = []
    source = f"""
import sys
from pathlib import Path
from benchmarks.gpu import results
Path(sys.argv[-1]).write_text('{{"cases": [1]}}')
(found,) = [line for line in results.read(Path({str(tmp_path)!r}))["running"] if "record" in line]
assert found["record"] == {{"cases": [1]}}
"""
    stages = [stage("first", ""), stage("running", source, writes=True)]
    assert runner.run(stages, tmp_path, 1.0, {}, after=lambda: seen.append(sorted(results.read(tmp_path))))
    assert seen == [["first"], ["first", "running"]]
    assert [line["record"] for line in results.read(tmp_path)["running"] if "record" in line] == [{"cases": [1]}]


def test_a_verdict_follows_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(stages: Any, out: Path, *args: Any, after: Any) -> bool:
        results.append(out / results.FILE, stage="verify", outcome="passed", seconds=1)
        after()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", lost)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert "| verify | passed |" in (tmp_path / command.VERDICT).read_text()
    assert (tmp_path / "report.md").exists()


FAILING = """
import time
from pathlib import Path

def test_bad(): assert 1 == 2, 'the reason'

def test_later():
    lines = []
    while not any('AssertionError: the reason' in line for line in lines):
        time.sleep(0.1)
        lines = Path(__file__).with_name('log').read_text().splitlines()
    assert 'call of test_failing.py::test_bad failed:' in lines
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_failed_test_is_reported_before_the_run_ends(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """tests/gpu's conftest: pytest alone prints tracebacks at the end, which a stage cut short does not reach."""
    source = (runner.ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    own = "@pytest.fixture(autouse=True)\ndef _poison_and_seed() -> None: ...\n"
    (tmp_path / "conftest.py").write_text(source + own, encoding="utf-8")
    (tmp_path / "test_failing.py").write_text(FAILING, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", *workers]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        assert runner._ended([*command, str(tmp_path / "test_failing.py")], log, 60) == 1
    assert "1 failed, 1 passed" in (tmp_path / "log").read_text()
