"""How every picture looks, and how it becomes a file whose bytes depend on its content alone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

WIDTH, DPI = 9.0, 200  # 1800 pixels, shown at 900
# Okabe and Ito's colours, which colour-blind readers can distinguish. Peers are grey: the eye finds our bars first.
OURS, SECOND, THIRD = "#0072b2", "#d55e00", "#009e73"
PEER, OTHER_PEER = "#8c8c8c", "#c4c4c4"
INK, FAINT, LINE, GROUND = "#1f2328", "#59636e", "#d0d7de", "#ffffff"
OURS_PALE, SECOND_PALE, THIRD_PALE, GREY_PALE = "#e3f0f8", "#fbe9dd", "#dff3ec", "#f3f4f6"

PLATE: dict[str, Any] = {"facecolor": GROUND, "edgecolor": "none", "pad": 0.8}  # under a text that crosses a line

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "figure.facecolor": GROUND,
    "legend.framealpha": 1,
    "legend.edgecolor": GROUND,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "svg.hashsalt": "fastllama",
}


@contextmanager
def settings() -> Iterator[None]:
    """Within, figures look alike, whatever the user's own matplotlib settings are."""
    with matplotlib.style.context(["default", _SETTINGS]):
        yield


def new(height: float, title: str, conditions: str = "") -> Figure:
    """A figure with a headline, and the conditions of the measurement below it in small print."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", size=12, weight="bold")
    if conditions:
        figure.supxlabel(conditions, x=0.012, ha="left", size=8.5, color=FAINT)
    return figure


def drawn(figure: Figure) -> str:
    """A digest of a figure: its texts, and its lines, bars and points in data coordinates.

    Unlike pixels it is the same in every matplotlib. Ticks that a locator chooses by the layout are left out.
    """
    said: list[Any] = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        said += [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
        legend = axes.get_legend()
        said += [text.get_text() for text in legend.get_texts()] if legend else []
        fixed = [each for each in (axes.xaxis, axes.yaxis) if isinstance(each.get_major_locator(), FixedLocator)]
        said += [[label.get_text() for label in each.get_ticklabels()] for each in fixed]
        for artist in (*axes.lines, *axes.patches, *axes.collections, *axes.texts):
            said.append(_content(artist))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _content(artist: Any) -> list[Any]:
    if isinstance(artist, Annotation):
        return [artist.get_text(), *_rounded(artist.xy), *_rounded(artist.xyann)]
    if isinstance(artist, Text):
        return [artist.get_text(), *_rounded(artist.get_position())]
    if isinstance(artist, Line2D):
        return _rounded(artist.get_xydata())
    if isinstance(artist, PathCollection):
        return _rounded(artist.get_offsets())
    if isinstance(artist, Patch):
        return _rounded(artist.get_patch_transform().transform_path(artist.get_path()).vertices)
    return [segment for path in artist.get_paths() for segment in _rounded(path.vertices)]


def _rounded(values: Any) -> list[str]:
    """Six digits: a processor's last place is no news."""
    return [f"{value:.6g}" for value in np.ravel(values)]


def png(figure: Figure) -> bytes:
    """A PNG of the figure. Its text chunks hold the digest and matplotlib's version, no date."""
    stream, chunks = io.BytesIO(), PngInfo()
    figure.savefig(stream, format="png", dpi=DPI)
    for key, value in {"Drawn": drawn(figure), "Matplotlib": matplotlib.__version__}.items():
        chunks.add_text(key, value)
    # A third of the bytes: flat colours and the greys of letters' edges are few.
    image = Image.open(stream).convert("RGB").quantize(48, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    image.save(stream, format="png", optimize=True, pnginfo=chunks)
    return stream.getvalue()


def save(figure: Figure, path: Path) -> None:
    """The figure as .png or .svg."""
    if path.suffix == ".svg":
        figure.savefig(path, format="svg", metadata={"Date": None})
    else:
        path.write_bytes(png(figure))
