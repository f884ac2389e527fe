"""The way of a request through the runtime, and what a step does: the second picture of architecture.md."""

from __future__ import annotations

from matplotlib.figure import Figure

from tools.plots import style
from tools.plots.boxes import Box, arrow, canvas, draw_box, frame

WIDTH, TALL, LOW = 188, 66, 54
LEFT, MIDDLE, RIGHT = 112, 324, 536
CALLERS, FIRST, SECOND, RESULTS = 372, 267, 154, 44  # heights of the rows
GREY = {"fill": style.GREY_PALE, "edge": style.PEER}
GREEN = {"fill": style.THIRD_PALE, "edge": style.THIRD}


def draw() -> Figure:
    """Callers above, the loop of steps in a frame, results below."""
    figure, axes = canvas(438, "The life of a request: every step computes the next tokens of all requests")
    frame(axes, (8, 104), 632, 222, "Engine.step, until no request is left")

    def box(x: float, y: float, height: float, name: str, *lines: str, **colors: str) -> Box:
        made = Box(x, y, WIDTH, height, name, "\n".join(lines), **colors)
        draw_box(axes, made)
        return made

    llm = box(LEFT, CALLERS, LOW, "LLM", "fastllama generate, chat, bench, eval", "threads take turns by steps", **GREY)
    engine = box(
        MIDDLE, CALLERS, LOW, "AsyncEngine", "one thread owns the engine;", "requests reach it through a queue", **GREY
    )
    serve = box(
        RIGHT, CALLERS, LOW, "fastllama serve", "OpenAI's API over HTTP:", "JSON to a request, deltas to JSON", **GREY
    )
    scheduler = box(
        LEFT, FIRST, TALL, "scheduler",
        "chunks of tokens under a budget,", "a decode is a chunk of one;", "preempts when pages run out",
    )  # fmt: skip
    runner = box(
        MIDDLE,
        FIRST,
        TALL,
        "runner",
        "chunks, and draft tokens, become",
        "one flat batch, in one copy",
        "to the device",
    )
    model = box(
        RIGHT, FIRST, TALL, "model step",
        "layers call kernels, which write keys", "and values into pages; decode steps", "are replayed from a capture",
        **GREEN,
    )  # fmt: skip
    pages = box(
        LEFT, SECOND, TALL, "KV pages",
        "shared by equal prefixes (prefix", "cache), evicted to host memory,", "copied before a shared one is written",
    )  # fmt: skip
    live = box(
        MIDDLE, SECOND, TALL, "live requests",
        "append the token, decode its text,", "look for the end: stop token,", "stop string, length",
    )  # fmt: skip
    sampler = box(
        RIGHT, SECOND, TALL, "sampler",
        "penalties, filters, one token a row", "with the request's own random", "numbers, log-probabilities",
        **GREEN,
    )  # fmt: skip
    outputs = box(
        MIDDLE,
        RESULTS,
        LOW,
        "outputs",
        "LLM: RequestOutput; AsyncEngine:",
        "a mailbox a request, read as a stream",
        **GREY,
    )

    turn, side = (FIRST + SECOND) / 2, LEFT - 30
    arrow(axes, [llm.bottom, scheduler.top], "token ids, parameters", (LEFT, 336))
    arrow(axes, [serve.left, engine.right])
    arrow(axes, [engine.bottom, (MIDDLE, 336), (LEFT + 72, 336), (LEFT + 72, FIRST + TALL / 2)])
    arrow(axes, [scheduler.right, runner.left])
    arrow(axes, [runner.right, model.left])
    arrow(axes, [model.bottom, sampler.top], "logits of the rows that need them", (RIGHT, turn))
    arrow(axes, [sampler.left, live.right])
    back = [live.top, (MIDDLE, turn), (LEFT + 60, turn), (LEFT + 60, FIRST - TALL / 2)]
    arrow(axes, back, "next step", ((LEFT + 60 + MIDDLE) / 2, turn))
    arrow(axes, [(side, turn), (side, FIRST - TALL / 2)])
    arrow(axes, [(side, turn), (side, pages.top[1])], "allocate, look up, free", (side - 2, turn))
    arrow(axes, [live.bottom, outputs.top])
    note = "On a GPU the next step is scheduled and\nlaunched before the host reads the tokens\nof this one."
    axes.text(RIGHT - WIDTH / 2, RESULTS, note, size=9, va="center", color=style.FAINT, linespacing=1.35)
    return figure
