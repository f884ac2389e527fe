"""Whole prompts: texts that clients have already formatted as Llama 2's, "<s>[INST] ... [/INST]"."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastllama.io.chat.messages import Markers, Tags

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_BETWEEN = re.compile(r"</s>\s*(?:(<s>)\s*)?(?=\[INST\])")  # linear time: no two repetitions of blanks are adjacent


class WholeTurn(NamedTuple):
    """The literal text of a turn, from "[INST]" on; begins: "<s>" precedes it."""

    text: str
    begins: bool


def turns_of(text: str) -> list[WholeTurn] | None:
    """The turns of a text that is a whole prompt, else None: `(<s>)? [INST] ... [/INST] ... </s>`, any number of them,
    of which the last has no answer yet and so ends with "[/INST]". The first counts as begun even without "<s>".

    Blanks at both ends of the text and between "<s>" and "[INST]" are dropped, all others stay. "</s>" and "<s>" are
    tags only between two turns.
    """
    first, *rest = _BETWEEN.split(text.strip().removeprefix("<s>").lstrip())
    turns = [WholeTurn(first, True)]
    turns += [WholeTurn(turn, bos is not None) for bos, turn in zip(rest[::2], rest[1::2], strict=True)]
    if not all(turn.text.startswith("[INST]") and "[/INST]" in turn.text for turn in turns):
        return None
    return turns if turns[-1].text.endswith("[/INST]") else None


def without_special(text: str, markers: Markers, tags: Tags) -> str:
    """The text with every marker in it escaped; ValueError for the first one if `tags` is "refuse"."""
    found = markers.find(text)
    if found is not None and tags == "refuse":
        raise special_inside(found)
    return markers.escape(text)


def special_inside(marker: str) -> ValueError:
    """The error for a special piece inside a turn of a whole prompt."""
    return ValueError(f"the prompt contains the special tag {marker!r} inside a turn; remove it or pass tags='escape'")
