"""The plot of the latencies: what it shows, and that a missing matplotlib is reported before the measurement."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama.bench.plot import check_plot, plot
from fastllama.errors import ExtraRequiredError


def record(samples: int) -> dict[str, Any]:
    """Two loads whose p50, p90 and p99 are near 50, 90 and 99 times a step."""

    def run(load: float, step: float) -> dict[str, Any]:
        seconds = [step * (number % 100) for number in range(samples)]
        return {"load": load, "rate": 8 * load, "first_token_seconds": seconds, "inter_token_seconds": seconds[:50]}

    return {
        "environment": {"device": "cpu"},
        "conditions": {"model": "tiny", "dtype": "float32"},
        "arrivals": [run(0.75, 0.002), run(0.25, 0.001)],  # plotted in order of load
    }


def test_a_png_is_a_picture_of_some_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    plot(path, record(1000))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert (width, height) == (1300, 572)
    assert len(data) > 20_000


def test_it_shows_percentiles_counts_and_conditions(tmp_path: Path) -> None:
    """Read from the SVG, in which each text is a comment beside its outline."""
    path = tmp_path / "a.svg"
    plot(path, record(1000))
    shown = re.findall("<!-- (.*?) -->", path.read_text())
    assert "fastllama, tiny, float32 on cpu: latency under Poisson arrivals" in shown
    assert {"Time to the first token", "Time from one token to the next", "milliseconds"} <= set(shown)
    assert {"(1000 samples at each point)", "(50 samples at each point)"} <= set(shown)
    assert {"49.5", "99"} <= set(shown)  # the medians of both loads
    assert shown.count("p50") == shown.count("p90") == 2
    assert shown.count("p99") == 1  # 50 samples have no p99
    assert shown.index("(25%)") < shown.index("(75%)")


def test_what_cannot_be_plotted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(Path("a.png"))
    check_plot(Path("a.svg"))
    with pytest.raises(ValueError, match=re.escape("'a.pdf'; legal: a file that ends in .png or .svg")):
        check_plot(Path("a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # Python's own mark of what is not installed
    with pytest.raises(ExtraRequiredError, match=re.escape("--plot needs 'matplotlib'")):
        check_plot(Path("a.png"))
