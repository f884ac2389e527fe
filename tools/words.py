"""Counts words that only this project used, in docstrings, comments, messages and pages; prints what to say instead.

    python -m tools.words                     # a line for each word: how often, and where
    python -m tools.words fastllama/kernels   # every place, as path:line: word: text

Names are code, not prose: text in backticks, fenced blocks and links' targets are skipped. A word is listed in
`GLOSSARY` by its regular expression; a meaning that the field shares is listed in `FINE` and not counted.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The word, and what to say instead.
GLOSSARY = {
    r"products?": "matmul, GEMM",
    r"codes?": "quantized weight, packed or quantized values",
    r"(?:no|some)body(?:'s)?": "the noun: unused, discarded, no owner, another process",
    r"(?:tell|say)s?|told|said": "returns, reports, states, logs, raises",
    r"guess\w*": "draft tokens; estimate",
    r"(?:come|comes|came) true": "is accepted",
    r"draws?|drawn|drew": "sample, sampled",
    r"around": "prologue, epilogue, fused with; about",
    r"in front(?: of)?": "before, prologue, prefix",
    r"behind": "after, epilogue, under",
    r"the same bits": "batch-invariant, bit-identical",
    r"dice|in any company": "random generator; in any batch",
}

# Where a word of the glossary has the meaning that it has everywhere. Matched at the word, within its line.
FINE = [
    r"(?:dot|inner|outer|Cartesian|element-?wise|Kronecker) products?",
    r"products? of (?:two|all|its|the) (?:sizes|shapes|dimensions|factors|primes|probabilities|numbers)",
    r"(?:status|exit|return|error|source|machine|dead|generated|object|native|user|byte|response|language) codes?",
    r"(?:untrusted|pickled|running|without|runs?|no|own|write|transformers'|file,) code\b",
    r"codes? (?:points?|blocks?|paths?|units?|review|size|generation|generator|object|completion|model|hosts?|from|as)",
    r"(?:the|of|in|this|that|our|their|whose|calling|test) code\b",
    r"\w+\.py|Where code goes|Code Llama|codellama",
    r"(?:draws?|drawn|drew) (?:\w+ ){0,3}(?:plot|picture|figure|chart|curve|diagram|line|page|bar|arrow|box)(?:e?s)?",
    r"(?:plot|picture|figure|chart|curve|diagram|line|page|bar|arrow|box)(?:e?s)?,? (?:\w+ ){0,3}(?:drawn|draws?)",
    r"behind (?:a|the|one|another|any) (?:reverse |load )?(?:proxy|proxies|balancer|firewall|flag|router|gateway)",
    r"(?:wrap|wraps|wrapped|wrapping|work|works|worked|turn|turns|turned) around",
]
# Not read: stories and their prompts, in which people tell and draw, and the tests of this file.
SKIPPED = ("fastllama/assets/", "tools/tiny_model/", "benchmarks/gpu/answers.py", "tests/tools/test_words.py")

WORDS = {word: re.compile(rf"(?<![\w-])(?:{word})(?![\w-])", re.IGNORECASE) for word in GLOSSARY}
EXCEPT = re.compile("|".join(FINE), re.IGNORECASE)
NAMES = re.compile(r"``?[^`]*``?|\]\([^)]*\)|https?://\S+|\{[^{}]*\}")


@dataclass(frozen=True)
class Hit:
    """One word in one line of prose."""

    path: str
    line: int
    word: str
    text: str


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are read as language, with their numbers from 1."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _pages(text)
    return _python(text, docstrings_only=path.is_relative_to(ROOT / "tests"))


def _pages(text: str) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def _python(text: str, docstrings_only: bool) -> Iterator[tuple[int, str]]:
    """Comments, and strings of three words or more: docstrings, messages, option help. In tests/ strings are data."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if docstrings_only:
            node = node.body[0].value if _has_docstring(node) else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) >= 3:
            for offset, line in enumerate(node.value.split("\n")):
                yield node.lineno + offset, line


def _has_docstring(node: ast.AST) -> bool:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None


def hits(path: Path) -> Iterator[Hit]:
    """The words of the glossary in a file."""
    for number, line in prose(path):
        bare = NAMES.sub(lambda found: " " * len(found[0]), line)
        fine = [found.span() for found in EXCEPT.finditer(bare)]
        for word, pattern in WORDS.items():
            for found in pattern.finditer(bare):
                if not any(start <= found.start() < end for start, end in fine):
                    yield Hit(str(path.relative_to(ROOT)), number, word, line.strip())


def files(places: list[str]) -> list[Path]:
    """The tracked Python files and pages below these places, without SKIPPED and this file."""
    listed = subprocess.run(
        ["git", "ls-files", "--", *places], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    here = Path(__file__).resolve()
    found = [ROOT / name for name in listed if name.endswith((".py", ".md")) and not name.startswith(SKIPPED)]
    return [path for path in found if path != here and path.exists()]


def main() -> None:
    """Print the count, or the places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", help="files and folders, every place of which is printed")
    places = parser.parse_args().places
    found = [hit for path in files(places or ["."]) for hit in hits(path)]
    if places:
        for hit in found:
            print(f"{hit.path}:{hit.line}: {hit.word}: {hit.text}")
    counts = Counter(hit.word for hit in found)
    rooms = {word: Counter(hit.path.split("/")[0] for hit in found if hit.word == word) for word in counts}
    for word, instead in GLOSSARY.items():
        where = ", ".join(f"{room} {count}" for room, count in sorted(rooms.get(word, {}).items()))
        print(f"{counts[word]:5} {word:30} say {instead}{f' ({where})' if where else ''}")
    print(f"{len(found):5} in all")


if __name__ == "__main__":
    main()
