"""The page's files: their types and what they load, their content policy, their colours, and the notice in them."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import product

import pytest

from fastllama.serve.page import FILES, HEADERS, notice, notice_html

HTML, JS, CSS = (FILES[path][0].decode() for path in ("/", "/page.js", "/page.css"))
VOID = {"meta", "link", "input", "br"}
SVG = "http://www.w3.org/2000/svg"  # a name, which no browser fetches


class Tags(HTMLParser):
    """Tags of a document with their attributes and enclosing tags; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.found.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def values(self, name: str) -> list[str]:
        return [value for _, attributes, _ in self.found if (value := attributes.get(name))]


PAGE = Tags(HTML)


def test_every_tag_is_closed_and_every_id_is_one_elements() -> None:
    assert {tag for tag, _, _ in PAGE.found} >= {"html", "head", "title", "header", "aside", "main", "form"}
    assert [name for name, count in Counter(PAGE.values("id")).items() if count > 1] == []


def test_nothing_is_inline_that_the_policy_forbids() -> None:
    handlers = [name for _, attributes, _ in PAGE.found for name in attributes if name.startswith("on")]
    assert handlers == []
    assert PAGE.values("style") == []
    assert [text for tag, text in PAGE.texts if tag in {"script", "style"} and text.strip()] == []
    assert "style" not in {tag for tag, _, _ in PAGE.found}


def test_whatever_the_page_loads_is_one_of_its_files() -> None:
    loaded = [*PAGE.values("src"), *(a["href"] or "" for tag, a, _ in PAGE.found if tag == "link")]
    assert {path for path in loaded if not path.startswith("data:image/")} == set(FILES) - {"/"}
    assert re.findall(r"@import|url\(", CSS) == []


def test_no_other_origin_is_named_but_by_links_that_a_reader_follows() -> None:
    elsewhere = re.compile(r"[a-z]+://[^\s\"'`)]+|[\"'`(]//[^\s\"'`)]+")
    links = {attributes["href"] for tag, attributes, _ in PAGE.found if tag == "a"} - {"#limits"}
    assert set(elsewhere.findall(HTML.replace(SVG, ""))) == links
    assert elsewhere.findall(JS + CSS) == []


def test_the_policy_lets_a_page_load_its_own_files_and_nothing_else() -> None:
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors")
    own = ("script-src", "style-src", "connect-src")
    assert policy == {**dict.fromkeys(nothing, "'none'"), **dict.fromkeys(own, "'self'"), "img-src": "'self' data:"}
    assert HEADERS["x-content-type-options"] == "nosniff"
    assert HEADERS["referrer-policy"] == "no-referrer"
    assert HEADERS["cache-control"] == "no-cache"


def test_each_file_has_its_type() -> None:
    kinds = {path: kind for path, (_, kind) in FILES.items()}
    assert kinds == {
        "/": "text/html; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",  # a module with another type is not run
        "/page.css": "text/css; charset=utf-8",
    }


def test_every_id_that_something_refers_to_is_there() -> None:
    there = set(PAGE.values("id"))
    looked_up = set(re.findall(r'byId\("([^"]+)"\)', JS))
    assert looked_up
    assert looked_up - there == set()
    named = {name for kind in ("for", "aria-describedby") for value in PAGE.values(kind) for name in value.split()}
    assert named - there == set()


def test_every_field_has_a_label() -> None:
    fields = {a["id"] for tag, a, _ in PAGE.found if tag in {"input", "textarea"}}
    assert fields == {a["for"] for tag, a, _ in PAGE.found if tag == "label"}


def test_a_models_text_is_never_taken_for_html_or_code() -> None:
    assert re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function|srcdoc)\b", JS) == []


def test_answers_are_read_out() -> None:
    (log,) = [attributes for _, attributes, _ in PAGE.found if attributes.get("id") == "log"]
    assert log["role"] == "log"  # a polite live region
    assert 'setAttribute("aria-busy", "true")' in JS  # whole, and not token by token


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6});", block))


LIGHT = colours(CSS.split("@media")[0])
DARK = {**LIGHT, **colours(CSS.split("@media (prefers-color-scheme: dark)")[1].split("\n}\n")[0])}
GROUNDS = ("--ground", "--panel", "--own", "--code")
SURFACES = {  # a colour of text -> what it stands on
    "--ink": GROUNDS,
    "--quiet": GROUNDS,
    "--failure": GROUNDS,
    "--accent": GROUNDS,
    "--on-accent": ("--accent",),
}


def contrast(one: str, other: str) -> float:
    """The contrast of WCAG 2, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_known_pairs() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_all_that_it_stands_on(scheme: dict[str, str]) -> None:
    pairs = [(text, ground) for text, grounds in SURFACES.items() for ground in grounds]
    assert {pair: ratio for pair in pairs if (ratio := contrast(scheme[pair[0]], scheme[pair[1]])) < 4.5} == {}


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_edge_of_a_field_and_the_focus_can_be_seen(scheme: dict[str, str]) -> None:
    pairs = product(("--border", "--accent"), ("--ground", "--panel"))
    assert {pair: ratio for pair in pairs if (ratio := contrast(scheme[pair[0]], scheme[pair[1]])) < 3} == {}


def test_every_colour_is_one_of_those_that_are_compared() -> None:
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert re.findall(r"#[0-9a-f]{3,8}\b(?=[;, ])|\brgba?\(|\bhsla?\(", rules) == []
    assert set(re.findall(r"(?<![-\w])color: var\((--[a-z-]+)\)", rules)) == set(SURFACES)
    assert set(re.findall(r"background: var\((--[a-z-]+)\)", rules)) == {*GROUNDS, "--accent"}
    assert set(colours(CSS.split("prefers-color-scheme: dark")[1])) == set(LIGHT), "a scheme lacks a colour"


def test_the_notice_is_in_view_without_a_key() -> None:
    assert notice_html(notice()) in HTML
    assert "<!--" not in HTML
    for words in ("inaccurate", "English", "cannot be predicted", "safety testing", "toy", "does not know who trained"):
        assert words in notice()
    for address in ("license/", "use-policy/", "responsible-use-guide/"):
        assert f'href="https://ai.meta.com/llama/{address}"' in HTML


def test_a_notice_of_ones_own_is_text_and_links() -> None:
    shown = notice_html("A <b> & [terms](https://example.org/a?b&c).\n\n- one\n  line\n- [x](javascript:alert)\n")
    link = '<a href="https://example.org/a?b&amp;c" target="_blank" rel="noopener noreferrer">terms</a>'
    items = "<ul>\n<li>one\n  line</li>\n<li>[x](javascript:alert)</li>\n</ul>"
    assert shown == f"<p>A &lt;b&gt; &amp; {link}.</p>\n{items}"
    Tags(shown)
