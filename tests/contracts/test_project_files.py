"""Contract: the files for the code host and the commit hook are well-formed, name commands that exist, and no host."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastllama.cli.main import _parser
from tools.commands import _commands

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
CI = GITHUB / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
FORMS = [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "performance", "model")]
PAGES = [CI, HOOKS, *FORMS, GITHUB / "ISSUE_TEMPLATE" / "config.yml", GITHUB / "pull_request_template.md"]
PAGES += [ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
FIELDS = {"input", "textarea", "dropdown", "checkboxes"}
SETTINGS = {"label", "description", "placeholder", "value", "render", "options", "multiple"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(path: Path) -> Iterator[list[str]]:
    """Commands of a page: in backticks, in indented blocks, and as a form's placeholder; without comments."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"`([^`\n]+)`", text)
    found += re.findall(r"^(?:.*(?:placeholder|run|entry): | {4,})(.+)$", text, re.MULTILINE)
    for line in found:
        if re.match(r"(?:\.venv/bin/)?(?:fastllama|make|python|pytest)\b(?!/|\.)", line):
            yield shlex.split(line.removeprefix(".venv/bin/"), comments=True)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def problem(words: list[str]) -> str | None:
    """The file, target or option of a command that does not exist."""
    if words[0] == "fastllama":
        known: dict[str, set[str]] = {"fastllama": {"--version"}}
        for parser, _ in _commands(_parser()):
            known |= {parser.prog: set(parser._option_string_actions)}
        names = [" ".join(words[:count]) for count in (3, 2, 1)]
        name = next((name for name in names if name in known), "fastllama")
        if name == "fastllama" and len(words) > 1 and not words[1].startswith("-"):
            return f"command {words[1]}"
        return next((word for word in words if word.startswith("-") and word not in known[name]), None)
    if words[0] == "make":
        named = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return next((word for word in named if word not in targets()), None)
    if words[:2] == ["python", "-m"]:
        return None if importlib.util.find_spec(words[2]) else words[2]
    paths = [word for word in words[1:] if "/" in word and "NAME" not in word]
    return next((path for path in paths if not (ROOT / path).exists()), None)


def test_ci_runs_what_a_change_must_pass_and_nothing_else() -> None:
    workflow = read(CI)
    events = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert set(events) == {"push", "pull_request"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"
    assert job["timeout-minutes"] >= 90
    with_ = {step["uses"].split("@")[0]: step["with"] for step in job["steps"] if "uses" in step}
    assert with_["actions/checkout"]["fetch-depth"] == 0, ".ci/run counts the commits"
    python = with_["actions/setup-python"]
    assert isinstance(python["python-version"], str), "3.10 unquoted is the number 3.1"
    assert python["cache"] == "pip"
    for pattern in python["cache-dependency-path"].split():
        assert list(ROOT.glob(pattern)), f"no file for {pattern}"
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_the_host_demands(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "labels", "body"} == set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert len({field["attributes"]["label"] for field in form["body"]}) == len(ids)
    for field in form["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"}, field["id"]
        assert field["type"] in FIELDS
        assert re.fullmatch(r"[\w-]+", field["id"])
        assert {"label"} <= set(field["attributes"]) <= SETTINGS, field["id"]
        assert field.get("validations", {"required": True}) == {"required": True}


def test_the_forms_ask_for_what_a_report_needs() -> None:
    required = {path.stem: {field["id"] for field in read(path)["body"] if "validations" in field} for path in FORMS}
    assert required["bug"] >= {"command", "found", "expected", "info"}
    assert required["performance"] >= {"machine", "command", "samples"}
    assert required["model"] >= {"config"}
    for path in FORMS:
        assert ["fastllama", "info"] in list(commands(path)), path.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_exist_with_their_options(path: Path) -> None:
    assert {" ".join(words): found for words in commands(path) if (found := problem(words))} == {}


def test_commands_that_do_not_exist_are_found() -> None:
    assert problem(["fastllama", "lint"]) == "command lint"
    assert problem(["fastllama", "bench", "runtime", "--outptu", "x.json"]) == "--outptu"
    assert problem(["make", "--no-print-directory", "proof", "MINUTES=10"]) == "proof"
    assert problem(["python", "-m", "tools.nothing"]) == "tools.nothing"
    assert problem(["pytest", "tests/nothing"]) == "tests/nothing"
    assert sum(len(list(commands(path))) for path in PAGES) > 20


def test_ruff_is_pinned_once() -> None:
    (repo,) = read(HOOKS)["repos"]
    assert repo["repo"] == "local", "a hosted hook is a second pin"
    (hook,) = repo["hooks"]
    assert hook["entry"].split()[0::2] == ["make", "lint"]
    assert hook["language"] == "system"
    pins = {path.name: path.read_text(encoding="utf-8").count("ruff==") for path in ROOT.glob("*.t*")}
    assert {name: count for name, count in pins.items() if count} == {"requirements-dev.txt": 1}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^lint:.*\n\t\$\(BIN\)/ruff check\n\t\$\(BIN\)/ruff format --check\n", makefile, re.MULTILINE)


@pytest.mark.parametrize("path", [ROOT / "pyproject.toml", *PAGES], ids=lambda path: path.name)
def test_no_address_is_invented(path: Path) -> None:
    """This repository has no public host or mail address yet, so any address would be invented."""
    assert re.findall(r"https?://\S+|[\w.]+@[\w-]+\.\w+", path.read_text(encoding="utf-8")) == []
