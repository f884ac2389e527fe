"""What each quantizer costs a model, with outliers and without: the picture of `benchmarks.quantizers`."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tools.plots import style
from tools.plots.records import Record, day

MODELS = {False: ("as it is", style.OURS, "o"), True: ("with planted outliers", style.SECOND, "s")}


def draw(record: Record) -> Figure:
    """KL divergences of a record by case, with standard errors, both models in each row."""
    cases, said, read = record["cases"], record["conditions"], record["cases"][0]["reference"]
    labels = list(dict.fromkeys(_label(case) for case in cases))
    conditions = (
        f"{said['model']}, {said['dtype']}: {read['documents']} documents, {read['tokens']} tokens; calibrated on "
        f"{said['calibration_documents']} others; {day(record)}.\nBars: standard errors by document. g128: 128 columns "
        "share a scale; rows: a whole row does, as in int8 and w8a8."
    )
    figure = style.new(
        1.9 + 0.26 * len(labels), "What each quantizer costs a model: KL divergence, less is better", conditions
    )
    axes = figure.subplots()
    for outliers, (title, color, marker) in MODELS.items():
        chosen = [case for case in cases if case["outliers"] == outliers]
        heights = [labels.index(_label(case)) + (0.19 if outliers else -0.19) for case in chosen]
        values = [1000 * case["kl"]["value"] for case in chosen]
        errors = [1000 * (case["kl"]["standard_error"] or 0) for case in chosen]
        axes.errorbar(values, heights, xerr=errors, fmt=marker, ms=4, capsize=2, color=color, label=title)
        for value, error, height in zip(values, errors, heights, strict=True):
            place = value + error, height
            axes.annotate(f"{value:#.2g}", place, (5, 0), textcoords="offset points", va="center", size=8, color=color)
    axes.set(xscale="log", xlabel="KL divergence from the unquantized model, thousandths of a nat per token")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1)
    axes.grid(which="major", axis="x")
    axes.legend(title="the model", loc="best", alignment="left")
    return figure


def _label(case: dict[str, Any]) -> str:
    return f"{case['weights']}, {case['method']}"
