"""What README.md and docs/use show can be typed: Python blocks run and print the text below them, options exist.

A comment before a block changes what is done with it:
    <!-- given: llm -->      runs with that name bound, or in a folder with that file
    <!-- needs: network -->  is not run here; its imports and keywords are checked
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

from fastllama import LLM, AsyncEngine
from fastllama.bench.estimate import Work
from fastllama.bench.models import shape
from fastllama.cli import main
from fastllama.errors import ExtraRequiredError
from fastllama.layers import packing
from fastllama.layers.batch import KVCache
from fastllama.runtime.device.memory import sizes

ROOT = Path(__file__).parents[2]
USE = ROOT / "docs" / "use"
BLOCK = re.compile(
    r"(?:<!-- (given|needs): ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```$(?:\n```text\n(.*?)^```$)?", re.M | re.S
)
# Pages whose programs other tests run, and check more closely.
ELSEWHERE = {"transformers.md": "tests/integrations/test_transformers_page.py"}
ELSEWHERE |= {"parameters.md": "tests/runtime/test_parameters_page.py"}
SHELL = ("bash", "console", "")
OURS = "fastllama"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. rule: "given", "needs" or "". printed: the text block that follows, if one does."""

    page: str
    line: int
    rule: str
    words: tuple[str, ...]
    language: str
    code: str
    printed: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        rule, words, language, code, printed = found.groups()
        line = text[: found.start(4)].count("\n") + 1
        yield Block(page, line, rule or "", tuple(re.split(", *", words or "")), language, code, printed)


PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(USE.glob("*.md"))]}
ALL = [block for name, text in PAGES.items() for block in blocks(text, name)]
PYTHON = [block for block in ALL if block.language == "python"]
RUN = [block for block in PYTHON if block.rule != "needs" and block.page not in ELSEWHERE]
COMMANDS = [block for block in ALL if block.language in SHELL and re.search(r"\bfastllama\s", block.code)]


def test_every_block_is_found() -> None:
    fences = sum(len(re.findall(r"^```\w*$", text, re.MULTILINE)) for text in PAGES.values())
    assert fences == sum(2 if block.printed is None else 4 for block in ALL)
    comments = sum(len(re.findall("<!-- (?:given|needs): ", text)) for text in PAGES.values())
    assert comments == sum(bool(block.rule) for block in ALL), "a comment stands right before its block"
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def compiled(block: Block) -> CodeType:
    source = "\n" * (block.line - 1) + block.code
    return compile(source, block.page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.filterwarnings("default")  # those of other packages
@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_program_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(stories(8), encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    code = compiled(block)
    try:
        if "llm" in block.words:
            names["llm"] = LLM("tiny", max_model_len=256)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, names))
        else:
            exec(code, names)
    finally:
        for each in [value for value in names.values() if isinstance(value, LLM)]:
            each.close()
    if block.printed is not None:
        assert capsys.readouterr().out == block.printed


def stories(count: int) -> str:
    packaged = resources.files("fastllama").joinpath("assets", "calibration.txt").read_text(encoding="utf-8")
    return "\n".join(packaged.splitlines()[:count])


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_program_names_what_there_is(block: Block) -> None:
    compiled(block)
    assert wrong_names(block.code, {"llm": LLM} if "llm" in block.words else {}) == []


def wrong_names(code: str, given: dict[str, Any]) -> list[str]:
    """Imports of installed packages that do not exist, and keywords that a function of ours does not have."""
    tree, known, wrong = ast.parse(code), dict(given), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for alias in node.names:
                found = imported(module or alias.name, alias.name if module else None)
                if found is None:
                    wrong.append(alias.name)
                elif found is not UNKNOWN:
                    known[alias.asname or alias.name.split(".")[0]] = found
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if isinstance(item.optional_vars, ast.Name) and isinstance(item.context_expr, ast.Call):
                    known[item.optional_vars.id] = looked_up(item.context_expr.func, known)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or (called := looked_up(node.func, known)) is UNKNOWN:
            continue
        if called is None:
            wrong.append(ast.unparse(node.func))
        elif getattr(called, "__module__", "").startswith(OURS):
            legal = inspect.signature(called.__init__ if isinstance(called, type) else called).parameters
            wrong += [f"{ast.unparse(node.func)}({each.arg}=)" for each in node.keywords if each.arg not in legal]
    return wrong


UNKNOWN = object()  # of a package that is not installed, or a value that only running the program makes


def imported(module: str, name: str | None) -> Any:
    """The module or what it holds, None where it does not exist, UNKNOWN where its package is not installed."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return UNKNOWN
    try:
        found = importlib.import_module(module)
    except ExtraRequiredError:
        return UNKNOWN
    except ImportError:
        return None
    if (
        name
        and not hasattr(found, name)
        and hasattr(found, "__path__")
        and importlib.util.find_spec(f"{module}.{name}")
    ):
        return importlib.import_module(f"{module}.{name}")
    return getattr(found, name, None) if name else sys.modules[top]


def looked_up(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a dotted name is; an attribute of an instance is its class's. None where one of ours lacks it."""
    if isinstance(node, ast.Name):
        return known.get(node.id, UNKNOWN)
    if not isinstance(node, ast.Attribute) or (owner := looked_up(node.value, known)) is UNKNOWN or owner is None:
        return UNKNOWN
    return getattr(owner, node.attr, None)


def test_a_wrong_name_is_found() -> None:
    code = "import fastllama\nfrom fastllama import LLM, Sampler\nwith LLM('tiny', quantize='int4') as llm:\n    pass\n"
    assert wrong_names(code, {}) == ["Sampler", "LLM(quantize=)"]
    assert wrong_names("import fastllama\nfastllama.loads('tiny')", {}) == ["fastllama.loads"]
    assert wrong_names("llm.scores('a')\nllm.score('a', begin=1)", {"llm": LLM}) == ["llm.scores", "llm.score(begin=)"]
    assert wrong_names("from nowhere import f\nf(a=1)", {}) == []
    assert inspect.signature(AsyncEngine.add_request).parameters["deadline"]


def command_lines(code: str) -> list[list[str]]:
    """The arguments of each `fastllama` in shell lines: after variables, in pipes, before redirections."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|<>;&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word[0] not in "|<>;&":
                words.append(word)
                continue
            at = words.index("fastllama") if "fastllama" in words else len(words)
            if at < len(words) and all("=" in each for each in words[:at]):
                found.append(words[at + 1 :])
            words = []
    return found


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_command_has_these_options(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where what writes a file may
    lines = command_lines(block.code)
    assert len(lines) == len(re.findall(r"(?:^|[|=.] )fastllama ", block.code, re.MULTILINE))
    for words in lines:
        main._parser().parse_args(words)


def test_command_lines_are_read_as_a_shell_reads_them() -> None:
    code = (
        "pip install 'fastllama[eval]'\nfastllama info  # versions\nA=1 fastllama serve --port 1 > log\n"
        "echo 'a | b' | fastllama chat --system \"a; b\"\n"
        "$ fastllama \\\n  eval --tasks 'a_*'\ncurl -d '{\"a\": 1}' x\n"
    )
    lines = [["info"], ["serve", "--port", "1"], ["chat", "--system", "a; b"], ["eval", "--tasks", "a_*"]]
    assert command_lines(code) == lines
    with pytest.raises(ValueError, match="unknown argument '--quant'"):
        main._parser().parse_args(command_lines("fastllama chat --quant int4")[0])


@pytest.mark.parametrize("block", [each for each in COMMANDS if each.printed and each.rule != "needs"], ids=str)
def test_a_command_prints_this(block: Block) -> None:
    shell = "\n".join(line for line in block.code.splitlines() if "fastllama " in line)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == block.printed


def cells(head: str) -> list[list[str]]:
    """The rows of the table of laptop.md whose first line begins so."""
    lines = PAGES["laptop.md"].split(f"\n{head}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def kept_bytes(name: str, of_weight: float) -> float:
    config = shape(name, 4096)
    tables = 2 * config.vocab_size * config.hidden_size
    return (config.num_parameters - tables) * of_weight + tables * 2


def test_weights_take_what_the_laptop_page_states() -> None:
    rows = cells("| `--quantize`")
    assert [row[0] for row in rows] == ["int4", "int8", "bf12", "none"]
    for kind, of_weight, *sized, _ in rows:
        assert float(of_weight) == pytest.approx(packing.PACKED.get(kind, 2.0), rel=0.03)
        exact = {"int4": 0.5157, "int8": 1.0005, "bf12": 1.5, "none": 2.0}[kind]  # with scales
        assert sized == [f"{kept_bytes(name, exact) / 1e9:.1f} GB" for name in ("7b", "13b")]


def test_the_context_is_what_the_laptop_page_states() -> None:
    config = shape("7b", 4096)
    for free, *lengths in cells("| free after loading"):
        for kv_dtype, length in zip((torch.bfloat16, torch.int8), lengths, strict=True):
            chosen = sizes(
                config,
                device="cpu",
                available=int(free.removesuffix(" GB")) * 10**9,
                dtype=torch.bfloat16,
                kv_dtype=kv_dtype,
                page_size=64,
            )
            assert length == f"{chosen.max_model_len} tokens"
    each = [
        KVCache.bytes_per_token(shape(n, 4096), d) / 1e6 for d in (torch.bfloat16, torch.int8) for n in ("7b", "13b")
    ]
    assert [round(size, 2) for size in each] == [0.52, 0.82, 0.27, 0.42]
    for size in each:
        assert f"{size:.2f}" in PAGES["laptop.md"]
    work = Work.of(config, torch.bfloat16, torch.bfloat16, ["int4"], [1], [256], 16 + 7)
    assert f"7b: {work.describe(None)}: about" in PAGES["laptop.md"]
