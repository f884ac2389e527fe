"""When speculation pays on a CPU: what a step of several tokens costs, and what draft tokens gave."""

from __future__ import annotations

from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.plots import style
from tools.plots.records import Record, day, machine

FORMATS = {"none": ("bf16", style.OURS, "s"), "bf12": ("bf12", style.SECOND, "o"), "int8": ("int8", style.THIRD, "^")}
CONTENDERS = {
    "prompt_lookup": ("prompt lookup", style.OURS),
    "draft tiny": ("draft model (the model itself)", style.PEER),
}
TEXTS = {"a few words": "few words", "stories": "stories"}


def draw(steps: Record, answers: Record) -> Figure:
    """Left: times of a step beside the tokens that it gives. Right: answers with draft tokens over those without."""
    said, told = steps["conditions"], answers["conditions"]
    conditions = (
        f"{machine(steps)}; {day(steps)}. Left: a 1.1B Llama, random weights, drafts right with probability "
        f"{said['right']}, medians of {len(steps['samples'][0]['seconds'])} steps.\n"
        f"Right: the bundled model in {told['dtype']}, answers of {told['tokens']} tokens, at most "
        f"{told['num_draft_tokens']} draft tokens a step, medians of {told['rounds']} rounds;\n"
        "few words: a bias holds the answer to the words of one sentence, so that it repeats itself."
    )
    figure = style.new(
        4.3, "Speculation on a CPU gains where the text repeats, and costs little where it does not", conditions
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _steps(left, steps["samples"])
    _answers(right, answers["samples"])
    return figure


def _steps(axes: Axes, samples: list[Record]) -> None:
    for quantization, (label, color, marker) in FORMATS.items():
        line = {each["length"]: median(each["seconds"]) for each in samples if each["quantization"] == quantization}
        axes.plot([*line], [each / line[1] for each in line.values()], marker=marker, color=color, label=label)
    accepted = {each["length"]: each["tokens_per_step"] for each in samples}
    axes.plot(
        [*accepted], [*accepted.values()], "--", color=style.INK, lw=1.4, marker="x", label="tokens gained by the step"
    )
    axes.set(title="Time of a step, times that of one token", xlabel="tokens in a step of one sequence", xscale="log")
    axes.minorticks_off()
    axes.set_xticks([*accepted], [f"{length}" for length in accepted])
    axes.set_ylim(0, 5)
    axes.grid(axis="y")
    axes.legend(loc="upper left", title="a step pays below the dashed line", alignment="left")


def _answers(axes: Axes, samples: list[Record]) -> None:
    places: dict[str, float] = {}
    for text, title in TEXTS.items():
        for sampled in (False, True):
            place = len(places) + (0.35 if text == "stories" else 0)
            places[f"{title},\n{'sampled' if sampled else 'greedy'}"] = place
            found = {each["name"]: each for each in samples if (each["text"], each["sampled"]) == (text, sampled)}
            off = found["off"]["tokens_per_second"]
            for number, (name, (label, color)) in enumerate(CONTENDERS.items()):
                value = found[name]["tokens_per_second"] / off
                at = place + 0.38 * (number - 0.5)
                axes.bar(at, value, 0.36, color=color, label=None if place else label)
                axes.text(at, value + 0.04, f"{value:.2f}", ha="center", size=9, bbox=style.PLATE)
    axes.axhline(1, color=style.INK, lw=1, zorder=0.9)
    axes.set(title="Speed of answers, times without drafts")
    axes.set_xticks([*places.values()], [*places])
    axes.set_ylim(0, 2.9)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.legend(loc="upper right")
