"""What a second thread gains on a machine that is busy with other programs, ours and llama.cpp's."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from tools.plots import style
from tools.plots.records import Record, busy_gains, day, gain_range, machine

MARKERS = {
    "fastllama bf12": "o", "fastllama": "s", "fastllama int8": "^", "fastllama int4": "D",
    "llama.cpp BF16": "s", "llama.cpp Q8_0": "^", "llama.cpp Q4_0": "D",
}  # fmt: skip
LABELS = {"fastllama": "fastllama bf16"}
TICKS = (0.1, 0.2, 0.5, 1, 2)


def draw(large: Record, tiny: Record, tiny_peers: Record) -> Figure:
    """Speed of two threads over one, by busy neighbours: a panel for each model."""
    models = busy_gains(large, tiny, tiny_peers)
    ranges = [
        f"{family} {'{:.2f} to {:.2f}'.format(*gain_range(models, family, [1, 2]))}"
        for family in ("fastllama", "llama.cpp")
    ]
    title = f"Two threads over one beside busy programs: {', '.join(ranges)}"
    conditions = (
        f"{machine(large)}, as many neighbours that never wait as the axis states. Medians of {_rounds(large)} rounds "
        f"(1.1B), {_rounds(tiny)} (tiny; llama.cpp {_rounds(tiny_peers)}),\none and two threads in the same run; "
        f"random weights, batch 1; {day(large)}. llama-cpp-python {large['llama_cpp'].split(',')[0]}."
    )
    figure = style.new(4.4, title, conditions)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (model, gains) in zip(panels, models.items(), strict=True):
        axes.set(title=f"Shape of {'a 1.1B Llama' if model == '1.1B' else 'the bundled model (4.5M)'}")
        _lines(axes, gains)
    panels[0].set_ylabel("decode speed: two threads over one")
    panels[1].legend(*panels[1].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rounds(record: Record) -> int:
    rounds: int = record["conditions"]["rounds"]
    return rounds


def _lines(axes: Axes, gains: dict[str, dict[int, float]]) -> None:
    axes.axhline(1, color=style.INK, lw=1)
    for name, marker in MARKERS.items():
        color = style.OURS if name.startswith("fastllama") else style.PEER
        line = gains[name]
        axes.plot([*line], [*line.values()], marker=marker, color=color, ms=5, lw=1.5, label=LABELS.get(name, name))
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.set_ylim(0.055, 2.4)
    axes.set_xticks([0, 1, 2], ["none", "one", "two"])
    axes.set_xlabel("busy neighbours on two cores")
    axes.margins(x=0.08)
    axes.grid(axis="y")
    lowest = min((value, name, count) for name, line in gains.items() for count, value in line.items())
    axes.annotate(
        f"{lowest[1]}: {lowest[0]:.2f}x", (lowest[2], lowest[0]), (4, -7), textcoords="offset points", va="top",
        ha="right", size=9, color=style.FAINT, bbox=style.PLATE,
    )  # fmt: skip
