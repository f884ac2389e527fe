"""Boxes and arrows for the pictures of the architecture; one unit is one point on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from tools.plots import style


class Box(NamedTuple):
    """A box: its centre, size, name in bold and a caption of one or more lines below it."""

    x: float
    y: float
    width: float
    height: float
    name: str
    caption: str = ""
    fill: str = style.OURS_PALE
    edge: str = style.OURS

    @property
    def top(self) -> tuple[float, float]:
        """The middle of the upper edge."""
        return self.x, self.y + self.height / 2

    @property
    def bottom(self) -> tuple[float, float]:
        """The middle of the lower edge."""
        return self.x, self.y - self.height / 2

    @property
    def left(self) -> tuple[float, float]:
        """The middle of the left edge."""
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> tuple[float, float]:
        """The middle of the right edge."""
        return self.x + self.width / 2, self.y


def canvas(height: float, title: str) -> tuple[Figure, Axes]:
    """A figure of 648 by `height` points, with a headline, measured from its lower left corner."""
    figure = Figure(figsize=(style.WIDTH, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 72 * style.WIDTH), ylim=(0, height))
    axes.text(8, height - 10, title, size=12, weight="bold", va="top")
    return figure, axes


def draw_box(axes: Axes, box: Box) -> None:
    """The box with its texts."""
    corner = box.x - box.width / 2, box.y - box.height / 2
    shape = FancyBboxPatch(
        corner, box.width, box.height, boxstyle="round,pad=0,rounding_size=4", fc=box.fill, ec=box.edge, lw=1.1
    )
    axes.add_patch(shape)
    lines = box.caption.count("\n") + 1 if box.caption else 0
    axes.text(box.x, box.y + 5.6 * lines, box.name, size=10, weight="bold", ha="center", va="center")
    if lines:
        axes.text(box.x, box.y - 6.5, box.caption, size=8.5, ha="center", va="center_baseline", linespacing=1.15)


def frame(axes: Axes, corner: tuple[float, float], width: float, height: float, title: str) -> None:
    """A dashed frame that encloses boxes that belong together; its title is at the upper right."""
    axes.add_patch(Rectangle(corner, width, height, fc="none", ec=style.FAINT, lw=0.9, ls=(0, (4, 3))))
    place = corner[0] + width - 8, corner[1] + height - 6
    axes.text(*place, title, size=9, ha="right", va="top", color=style.FAINT, weight="bold")


def arrow(axes: Axes, points: Sequence[tuple[float, float]], label: str = "", at: tuple[float, float] = (0, 0)) -> None:
    """A line through the points, with a head at the last, and a label centred at a place."""
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=style.FAINT, lw=1.1, solid_joinstyle="round", zorder=0.5)
    head = {"arrowstyle": "-|>", "color": style.FAINT, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", points[-1], points[-2], arrowprops=head, zorder=0.5)
    if label:
        axes.text(*at, label, size=8.5, ha="center", va="center", color=style.FAINT, bbox=style.PLATE)
