"""The chat page at GET /: three files, with no requests to other origins.

index.html contains the notice, so that limits and licence of the model are visible without a key and without
JavaScript. The page uses /v1/models and /v1/chat/completions like any client.
"""

from __future__ import annotations

import html
import re
from importlib.resources import files

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

_PLACE = "<!-- notice.md -->"
_LINK = re.compile(r"\[([^\]]+)\]\((https://[^\s)]+)\)")


def _text(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def notice() -> str:
    """Returns limits and licence of the model, Markdown: notice.md, which the operator may replace."""
    return _text("notice.md").strip()


def notice_html(markdown: str) -> str:
    """Converts the notice to HTML: paragraphs, "- " lists and https links; anything else is escaped."""
    blocks = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        text = _LINK.sub(r'<a href="\2" target="_blank" rel="noopener noreferrer">\1</a>', html.escape(block))
        if block.startswith("- "):
            items = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
            blocks.append("<ul>\n" + "\n".join(f"<li>{item.strip()}</li>" for item in items) + "\n</ul>")
        else:
            blocks.append(f"<p>{text}</p>")
    return "\n".join(blocks)


FILES: dict[str, tuple[bytes, str]] = {  # path of the URL -> (body, content type)
    "/": (_text("index.html").replace(_PLACE, notice_html(notice())).encode(), "text/html; charset=utf-8"),
    "/page.js": (_text("page.js").encode(), "text/javascript; charset=utf-8"),
    "/page.css": (_text("page.css").encode(), "text/css; charset=utf-8"),
}
