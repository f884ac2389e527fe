"""Documentation pages: links resolve, tables are whole, each page is on the site and each image is used."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
CODE = re.compile(r"``.*?``|`[^`\n]*`")
IMAGES = (".png", ".svg", ".jpg")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(page: Path) -> Iterator[str]:
    """The lines outside of fenced blocks, and of those the last."""
    fence = None
    for line in page.read_text(encoding="utf-8").splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
        if fence is None:
            yield line


def links(page: Path) -> list[str]:
    """The targets of links and images, but for other sites."""
    found = [a or b for a, b in LINK.findall(CODE.sub("", "\n".join(lines(page))))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def slugs(page: Path) -> set[str]:
    """The anchors of the headings, by GitHub's rules: of equal ones the second ends in -1."""
    found: list[str] = []
    for line in lines(page):
        if heading := re.match(r"#{1,6} +(.+)", line):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found.append(slug)
    return {slug if (count := found[:i].count(slug)) == 0 else f"{slug}-{count}" for i, slug in enumerate(found)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in slugs(target), f"{link}: no such heading among {sorted(slugs(target))}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name)
def test_pages_of_the_site_link_to_the_site(page: Path) -> None:
    """Other files of the repository are not on it: they are named by their paths, in backticks."""
    outside = [link for link in links(page) if not (page.parent / link.split("#")[0]).resolve().is_relative_to(DOCS)]
    assert outside == []


def test_headings_become_anchors_as_on_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `a.b`: C_d, *e*?\n## Two\n```\n# no heading\n```\n## Two\n## [To](x.md) - f\n", encoding="utf-8")
    assert slugs(page) == {"ab-c_d-e", "two", "two-1", "to---f"}


def test_the_site_has_each_page_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ +- (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_each_image_is_used() -> None:
    """Missing images are found with the links."""
    used = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(IMAGES)}
    there = {path for path in DOCS.rglob("*") if path.suffix in IMAGES}
    assert {name(path) for path in there - used} == set()
    assert used


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_whole(page: Path) -> None:
    """Each row has as many cells as its header; a pipe within a cell is escaped, also in backticks."""
    before = ""
    for is_table, group in itertools.groupby(lines(page), lambda line: line.startswith("|")):
        rows = [*group]
        if is_table:
            assert not before or before.startswith("#"), f"no blank line before the table: {rows[0]}"
            assert re.fullmatch(r"(\|:?-+:?)+\|", rows[1]), f"no head: {rows[0]}"
            assert [row for row in rows if not row.endswith("|") or cells(row) != cells(rows[0])] == []
        before = rows[-1]
