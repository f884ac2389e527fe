"""Finds a chat template's tags, which messages must not contain, and its stop texts, from what it renders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastllama.errors import CheckpointError
from fastllama.io.chat.errors import TemplateBudgetError
from fastllama.io.chat.messages import Markers, Message
from fastllama.io.tokenizer import Tokenizer

# "<|user|>", "</s>", "<<SYS>>", "[INST]", "<|end of turn|>"
_TAG = re.compile(r"<<[^\s<>]+>>|<\|[^|\n]{1,40}\|>|<[^\s<>]+>|\[[^\s\[\]]+\]")
# "USER:", "### Response", "Human >": a line with a letter that begins or ends with a sign that no prose line ends with.
_LABEL = re.compile(r"(?=.*[^\W\d_])(?:[#=*>|\-].*|.*[:\uff1a=*>|\-])")
_PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))


class Findings(NamedTuple):
    """The result of the probes: markers, the ids among them, and the texts and ids that end an answer."""

    markers: Markers
    guarded_ids: frozenset[int]
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]


class Segment(NamedTuple):
    """Literal text of a rendering, and the roles of the contents before and after it; "" where there is none."""

    text: str
    before: str
    after: str


def placeholder(index: int) -> str:
    """A harmless content that can be located in the rendered text."""
    return f"q{index}z"


def examine(render: Callable[[Sequence[Message]], str], tokenizer: Tokenizer) -> Findings:
    """Render conversations of harmless contents, and inspect the literal text between them.

    Markers are the tokenizer's special pieces, every tag (`<...>`, `[...]`) in the literal text before a content, and
    labels: the rest of the line before a content, after any special piece or tag, that begins or ends with a sign such
    as "#" or ":". A label that the template writes only at the start of lines is a marker only there. Added tokens that
    are neither special nor before a content are no markers: some templates begin an answer with "<think>", and a
    model's answers contain it.

    An answer ends with the special piece that directly follows an assistant's content, or, where plain text follows,
    with the tag or label that this text begins with.
    """
    segments = [segment for text, roles in _renderings(render) for segment in _segments(text, roles)]
    heads = segments
    if any(segment.after == "assistant" for segment in segments):  # the text that begins an answer is there, too
        heads = [segment for segment in segments if segment.after]
    tags = {tag for segment in heads for tag in _TAG.findall(segment.text)}
    known = {piece: tokenizer.encode_template(piece) for piece in (*tags, *tokenizer.special_pieces()) if piece.strip()}
    pieces = {
        piece: ids[0]
        for piece, ids in known.items()
        if len(ids) == 1 and (piece in tags or ids[0] in tokenizer.special_ids or piece.startswith("<|"))
    }
    spoken = {piece.replace("▁", " ").strip() for piece in pieces}  # " <PRE>" becomes "▁<PRE>"
    fences = Markers({*tags, *pieces, *spoken})
    labels = [label for segment in heads for label in _labels(segment, fences)]
    anywhere = {text for text, line_start in labels if not line_start}
    markers = Markers({*fences.anywhere, *anywhere}, {text for text, line_start in labels if line_start})
    unknown = tokenizer.special_tokens.get("unk_token")
    guarded = frozenset(i for piece, i in pieces.items() if piece != unknown)

    stop_ids = [tokenizer.eos_token_id]
    stop: list[str] = []
    for segment in segments:
        text = segment.text.lstrip()
        if segment.before != "assistant" or not text:
            continue
        first = markers.find(text) or ""
        if first in pieces and text.startswith(first):
            stop_ids.append(pieces[first])
        elif first and text.startswith(first) and not any(piece in text for piece in pieces):
            stop.append(f"\n{first}" if first in markers.line_start else first)
    return Findings(markers, guarded, tuple(dict.fromkeys(stop)), tuple(dict.fromkeys(stop_ids)))


def _renderings(render: Callable[[Sequence[Message]], str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Renderings of the probes that the template accepts; where all fail, the first one's error is raised."""
    failures = []
    for roles in _PROBES:
        messages: list[Message] = [{"role": role, "content": placeholder(i)} for i, role in enumerate(roles)]
        try:
            yield render(messages), roles
        except TemplateBudgetError:
            raise
        except ValueError as error:
            failures.append(error)
    if len(failures) == len(_PROBES) and isinstance(failures[0], CheckpointError):
        raise failures[0]


def _segments(text: str, roles: Sequence[str]) -> Iterator[Segment]:
    contents = "|".join(placeholder(index) for index in range(len(roles)))
    parts = re.split(f"({contents})", text, flags=re.IGNORECASE)  # text, content, text, content, ..., text
    found = ["", *(roles[int(content[1:-1])] for content in parts[1::2]), ""]
    for literal, before, after in zip(parts[::2], found[:-1], found[1:], strict=True):
        yield Segment(literal, before, after)


def _labels(segment: Segment, fences: Markers) -> Iterator[tuple[str, bool]]:
    """The label right before a content or an answer, and whether it is at the start of a line."""
    *before, text = fences.split(segment.text)
    lines = text.rstrip().splitlines()
    if lines and _LABEL.fullmatch(label := lines[-1].strip()):
        yield label, len(lines) > 1 or bool(before) or not segment.before
