"""Contract: files stay short, folders state what they promise, comments carry no banners and no to-dos."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastllama", "tests", "benchmarks", "tools")
LIMIT = 400
# path -> why this file is better left whole
LONGER_FOR_A_REASON: dict[str, str] = {}
# "# -----", "# === Title ===", "#####"
BANNER = re.compile(r"#\s*([-=*#~_+])\1{2,}|##")
# spelled so that this file does not find itself
LATER = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X]|HAC[K])\b")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_too_long() -> None:
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {path: count for path, count in lines.items() if count > LIMIT and path not in LONGER_FOR_A_REASON} == {}
    short_again = {path for path in LONGER_FOR_A_REASON if lines.get(path, 0) <= LIMIT}
    assert short_again == set(), "drop the reason"


@pytest.mark.parametrize("path", [path for path in sources() if path.name == "__init__.py"], ids=name)
def test_a_folder_states_what_it_promises(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{name(path)} starts with no docstring"
    sentence = docstring.split("\n\n")[0]
    assert sentence.endswith("."), f"{name(path)}: the first paragraph is one sentence with its full stop"


def test_every_package_folder_has_its_init() -> None:
    folders = {path.parent for path in (ROOT / "fastllama").rglob("*.py")}
    assert {name(folder) for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_every_module_states_what_it_is() -> None:
    silent = [name(path) for path in sources() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_no_comment_is_a_banner() -> None:
    found = []
    for path in sources():
        with tokenize.open(path) as file:
            comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
        found += [f"{name(path)}:{token.start[0]}: {token.string}" for token in comments if BANNER.match(token.string)]
    assert found == []


def test_nothing_is_left_for_later() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LATER.search(line)
    ]
    assert found == []


def test_make_finds_each_test_that_compiles() -> None:
    (folders,) = re.findall(r"^COMPILE_TESTS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    marked = [path for path in sources() if re.search(r"mark\.compile\b", path.read_text(encoding="utf-8"))]
    assert [name(path) for path in marked if not name(path).startswith(tuple(folders.split()))] == []
    assert marked
