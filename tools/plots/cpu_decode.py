"""Tokens/s of a 1.1B Llama on a CPU beside llama.cpp and transformers: the README's first picture."""

from __future__ import annotations

from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plots import style
from tools.plots.records import Record, day, decode_rates, machine

PANELS = {"decode": "Decode", "prefill": "Prefill"}
# By what weights are kept in, and of each contender its label.
GROUPS = {
    "bf16 weights": {
        "fastllama bf12": "fastllama, default (12 bits, lossless)",
        "fastllama": "fastllama, quantization=None",
        "llama.cpp BF16": "llama.cpp BF16",
        "transformers": "transformers",
    },
    "8-bit weights": {"fastllama int8": "fastllama int8", "llama.cpp Q8_0": "llama.cpp Q8_0"},
    "4-bit weights": {"fastllama int4": "fastllama int4", "llama.cpp Q4_0": "llama.cpp Q4_0"},
}
COLORS = {"fastllama": style.OURS, "llama.cpp": style.PEER, "transformers": style.OTHER_PEER}


def draw(record: Record) -> Figure:
    """Bars of both phases, side by side: medians, with the slowest and the fastest sample."""
    said, found = record["conditions"], record["environment"]
    llama_cpp = record["llama_cpp"].split(",")[0]
    title = f"fastllama on {found['threads']} CPU threads, 1.1B at batch 1, beside llama.cpp and transformers"
    conditions = (
        f"{record['model']}, prompt of {said['prompt_tokens']} tokens, {said['tokens']} generated. "
        f"{machine(record)}; {day(record)}.\n"
        f"All in one run, in turns: medians of {said['rounds']} rounds, lines from the slowest to the fastest sample; "
        f"transformers: the faster of two loops.\n"
        f"fastllama {found['fastllama']} ({found['commit']}), torch {found['torch']}, "
        f"llama-cpp-python {llama_cpp}, transformers {found['transformers']}."
    )
    figure = style.new(4.3, title, conditions)
    for axes, (phase, rates) in zip(figure.subplots(1, 2, sharey=True), decode_rates(record).items(), strict=True):
        _bars(axes, rates)
        axes.set(title=f"{PANELS[phase]} (tokens/s, more is better)")
    return figure


def _bars(axes: Axes, rates: dict[str, list[float]]) -> None:
    heights: list[float] = []
    labels: list[str] = []
    widest = max(max(taken) for taken in rates.values())
    for group, contenders in GROUPS.items():
        heights.append((heights[-1] + 1.25) if heights else 0.0)
        labels.append(group)
        for name, label in contenders.items():
            heights.append(heights[-1] + 1)
            labels.append(label)
            taken, middle = rates[name], median(rates[name])
            color = COLORS[name.split()[0]]
            axes.barh(heights[-1], middle, 0.78, color=color)
            axes.plot([min(taken), max(taken)], [heights[-1]] * 2, color=style.INK, lw=1.4, marker="|", ms=5)
            axes.text(max(taken) + widest / 60, heights[-1], f"{middle:.1f}", va="center", size=9.5, bbox=style.PLATE)
    axes.set_yticks(heights, labels)
    for tick, label in zip(axes.yaxis.get_major_ticks(), labels, strict=True):
        if label in GROUPS:
            tick.label1.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(heights[-1] + 0.6, -0.6)
    axes.set_xlim(0, widest * 1.2)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
