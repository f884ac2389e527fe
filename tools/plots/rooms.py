"""The package's folders and what imports what, read from the sources: the first picture of architecture.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plots import style
from tools.plots.boxes import Box, arrow, canvas, draw_box, frame
from tools.rooms import rooms

HEIGHT, GAP = 32, 21


class Place(NamedTuple):
    """Where a folder is from left to right, and what is written in its box. Its row follows from the imports."""

    left: float
    right: float
    caption: str
    colors: tuple[str, str]


FRONT, CORE, OPS, PROOF = (
    (style.GREY_PALE, style.PEER),
    (style.OURS_PALE, style.OURS),
    (style.THIRD_PALE, style.THIRD),
    (style.SECOND_PALE, style.SECOND),
)
# Modules at the top of the package that stand for one box.
MERGED = {"arithmetic": "ground", "env": "ground", "errors": "ground", "progress": "ground", "__main__": "cli"}
NAMES = {"ground": "arithmetic, env, errors, progress"}
PACKAGE = {
    "cli": Place(12, 424, "the fastllama command", FRONT),
    "serve": Place(12, 84, "OpenAI's API", FRONT),
    "integrations": Place(92, 190, "into other stacks", FRONT),
    "verify": Place(198, 290, "parity, perplexity", PROOF),
    "bench": Place(298, 424, "speed on this machine", PROOF),
    "runtime": Place(12, 214, "engine, scheduler, paged KV cache, graphs", CORE),
    "catalogue": Place(226, 332, "each op's legal calls", PROOF),
    "testing": Place(342, 424, "of Triton kernels", PROOF),
    "io": Place(12, 214, "checkpoints, tokenizer, chat format, hub", CORE),
    "layers": Place(12, 332, "Llama as modules: configuration, weights, attention", CORE),
    "quant": Place(12, 332, "quantizers on tensors: GPTQ, AWQ, SmoothQuant, HQQ", CORE),
    "kernels": Place(12, 332, "ops: pure functions on tensors", OPS),
    "ground": Place(12, 424, "block arithmetic, environment variables, checks, progress bars", FRONT),
}
KERNELS = {
    "ops": Place(456, 566, "public, with checks", OPS),
    "compiling": Place(572, 634, "notices", OPS),
    "triton": Place(456, 540, "GPU kernels", OPS),
    "numba": Place(550, 634, "CPU kernels", OPS),
    "cpu": Place(550, 634, "torch's ops", OPS),
    "launch": Place(456, 540, "configurations", OPS),
    "reference": Place(550, 634, "the oracle", OPS),
    "dispatch": Place(456, 634, "check, choose, remember, record", OPS),
}


def draw() -> Figure:
    """A box for each folder, below all that import it; an arrow leads to each import that no others imply."""
    found = {room.name: room.arrows for room in rooms()}
    package, kernels = reduced(found["fastllama"], MERGED), reduced(found["fastllama.kernels"])
    rows = max(rows_of(package).values()) + 1
    height = rows * (HEIGHT + GAP) + 26
    figure, axes = canvas(height, "Imports go one way, downwards")
    _draw(axes, package, PACKAGE, height - 34)
    inner = max(rows_of(kernels).values()) + 1
    top, bottom = height - 54, height - 54 - inner * (HEIGHT + GAP) + GAP
    frame(axes, (446, bottom - 10), 198, top - bottom + 30, "inside kernels/")
    _draw(axes, kernels, KERNELS, top)
    note = (
        "An arrow: imports, read from the\nsources; an arrow that a longer path\nimplies is left out (cli to errors)."
    )
    axes.text(450, bottom - 24, note, size=9, va="top", color=style.FAINT, linespacing=1.35)
    return figure


def reduced(arrows: Mapping[str, set[str]], merged: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """The same graph with some boxes merged, without the arrows that longer ways imply."""
    merged = merged or {}
    whole: dict[str, set[str]] = {}
    for box, targets in arrows.items():
        name = merged.get(box, box)
        whole.setdefault(name, set()).update({merged.get(other, other) for other in targets} - {name})
    return {
        box: {each for each in targets if not any(each in _reached(whole, other) for other in targets)}
        for box, targets in whole.items()
    }


def rows_of(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Of each box the length of the longest way to it from above: 0 is the top row."""
    found: dict[str, int] = {}

    def row(box: str) -> int:
        if box not in found:
            found[box] = max((row(other) + 1 for other, targets in arrows.items() if box in targets), default=0)
        return found[box]

    return {box: row(box) for box in arrows}


def _reached(arrows: Mapping[str, set[str]], box: str) -> set[str]:
    found: set[str] = set()
    for other in arrows[box]:
        found |= {other} | _reached(arrows, other)
    return found


def _draw(axes: Axes, arrows: Mapping[str, set[str]], places: Mapping[str, Place], top: float) -> None:
    boxes = {}
    for name, row in rows_of(arrows).items():
        left, right, caption, (fill, edge) = places[name]
        y = top - HEIGHT / 2 - row * (HEIGHT + GAP)
        title = NAMES.get(name, name)
        boxes[name] = Box((left + right) / 2, y, right - left, HEIGHT, title, caption, fill, edge)
        draw_box(axes, boxes[name])
    for name, targets in arrows.items():
        for other in sorted(targets):
            arrow(axes, _way(boxes[name], boxes[other]))


def _way(source: Box, target: Box) -> list[tuple[float, float]]:
    """From a box down to another: straight where one is above the other, else by a corner just above the target."""
    start, end = source.bottom[1], target.top[1]
    left, right = max(source.left[0], target.left[0]), min(source.right[0], target.right[0])
    if left < right:
        middle = (left + right) / 2
        return [(middle, start), (middle, end)]
    if source.x > target.x:
        begin, finish, turn = source.left[0] + 6, target.right[0] - 22, end + 0.68 * GAP
    else:
        begin, finish, turn = source.right[0] - 6, target.left[0] + 22, end + 0.42 * GAP
    return [(begin, start), (begin, turn), (finish, turn), (finish, end)]
