"""Plots latencies by load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastllama.bench.text import PERCENTILES, percentiles
from fastllama.errors import ExtraRequiredError, counted, why_unusable

KINDS = (".png", ".svg")
COLORS = ("#1b6ca8", "#d9822b", "#a82a2a")
PANELS = (("first", "Time to the first token"), ("inter", "Time from one token to the next"))


def check_plot(path: Path) -> None:
    """Raise ExtraRequiredError where matplotlib cannot be imported, ValueError for an unsupported file name."""
    if path.suffix not in KINDS:
        raise ValueError(f"plot is {str(path)!r}; legal: a file that ends in {' or '.join(KINDS)}")
    if why_unusable("matplotlib"):
        raise ExtraRequiredError("--plot", "matplotlib", "bench")


def plot(path: Path, record: dict[str, Any]) -> None:
    """Plot both latencies of a record of `runtime.measure` by load, a line per percentile that the samples support."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    runs, said = sorted(record["arrivals"], key=lambda run: float(run["rate"])), record["conditions"]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        rates = [run["rate"] for run in runs]
        lines = zip(*(percentiles(run[f"{name}_token_seconds"]) for run in runs), strict=True)
        for percent, color, line in zip(PERCENTILES, COLORS, lines, strict=True):
            points = [(rate, 1000 * value) for rate, value in zip(rates, line, strict=True) if value]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color)
                for place in points:
                    axes.annotate(f"{place[1]:.3g}", place, (0, 6), textcoords="offset points", ha="center", size=8)
                axes.annotate(f"p{percent}", points[-1], (9, 0), textcoords="offset points", va="center", color=color)
        axes.set_title(f"{title}\n({counted(len(runs[0][f'{name}_token_seconds']), 'sample')} at each point)", size=10)
        axes.set(xlabel="requests a second, at random (share of the throughput)", ylabel="milliseconds", yscale="log")
        axes.set_xticks(rates, [f"{run['rate']:.3g}\n({run['load']:.0%})" for run in runs])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12, y=0.15)
        axes.grid(which="major", alpha=0.3)
    device = record["environment"]["device"]
    figure.suptitle(f"fastllama, {said['model']}, {said['dtype']} on {device}: latency under Poisson arrivals", size=12)
    figure.savefig(path, dpi=130)
