"""The pictures of docs/images, and the committed results that each shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from tools.plots import cpu_busy, cpu_decode, quantizers, request, rooms, speculation, style
from tools.plots.records import BUSY, DECODE, ROOT, load

IMAGES = ROOT / "docs" / "images"


class Picture(NamedTuple):
    """A picture: its name below docs/images, its drawing function, and its records below benchmarks/results."""

    name: str
    draw: Callable[..., Figure]
    results: tuple[str, ...] = ()

    def png(self) -> bytes:
        """The picture as it should be committed."""
        with style.settings():
            return style.png(self.draw(*map(load, self.results)))


PICTURES = (
    Picture("cpu-decode.png", cpu_decode.draw, (DECODE,)),
    Picture("cpu-busy.png", cpu_busy.draw, BUSY),
    Picture("quantizers.png", quantizers.draw, ("quantizers_tiny.json",)),
    Picture("speculation.png", speculation.draw, ("speculation_1.1b_cpu.json", "speculation_tiny_cpu.json")),
    Picture("rooms.png", rooms.draw),
    Picture("request.png", request.draw),
)
