"""The plots of the documentation match their data, are shown on a page, and plot medians."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tools.plots import style
from tools.plots.pictures import IMAGES, PICTURES, Picture
from tools.plots.records import (
    DECODE,
    DECODE_AVX512,
    RESULTS,
    ROOT,
    day,
    decode_figures,
    decode_rates,
    load,
    thread_gains,
)
from tools.plots.rooms import reduced, rows_of

LINK = re.compile(r"!\[([^\]]+)\]\(([^)\s]+)\)")
SCREENSHOTS = {"serve-page.png", "serve-page-phone.png"}  # by tools.page_shot


def named(picture: Picture) -> str:
    return picture.name


@pytest.mark.parametrize("picture", PICTURES, ids=named)
def test_a_committed_plot_is_what_make_plots_writes(picture: Picture) -> None:
    """Its texts are equal in any matplotlib, its pixels in the one that rendered it."""
    fresh, committed = Image.open(io.BytesIO(picture.png())), Image.open(IMAGES / picture.name)
    assert fresh.text["Drawn"] == committed.text["Drawn"], "its data or script has changed: make plots"
    if committed.text["Matplotlib"] == matplotlib.__version__:
        assert fresh.size == committed.size
        new, old = (np.asarray(each.convert("RGB"), dtype=int) for each in (fresh, committed))
        assert (abs(new - old).max(-1) > 32).mean() < 1e-3, "its look has changed: make plots"


@pytest.mark.parametrize("picture", PICTURES, ids=named)
def test_a_picture_is_light_and_holds_no_date(picture: Picture) -> None:
    data = (IMAGES / picture.name).read_bytes()
    assert len(data) <= 120_000
    image = Image.open(io.BytesIO(data))
    assert set(image.text) == {"Drawn", "Matplotlib"}
    assert image.width == 1800


@pytest.mark.parametrize("picture", PICTURES, ids=named)
def test_no_text_is_cut_off(picture: Picture) -> None:
    """Conditions grow with the names of processors."""
    with style.settings():
        figure = picture.draw(*map(load, picture.results))
        figure.draw_without_rendering()
        boxes = {text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if text.get_text()}
    width, height = figure.bbox.size
    assert [text for text, box in boxes.items() if box.x0 < 0 or box.x1 > width or box.y0 < 0 or box.y1 > height] == []


def test_every_image_is_plotted_here_and_shown_on_a_page_by_its_finding() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    shown: dict[Path, list[str]] = {}
    for page in pages:
        for text, link in LINK.findall(page.read_text(encoding="utf-8")):
            shown.setdefault((page.parent / link).resolve(), []).append(text)
    drawn = {picture.name for picture in PICTURES}
    assert {path.name for path in IMAGES.iterdir()} == drawn | SCREENSHOTS
    for name in drawn:
        assert all(len(text.split()) >= 5 for text in shown[IMAGES / name]), f"{name}: its text names no finding"


def test_results_that_are_read_exist() -> None:
    names = [name for picture in PICTURES for name in picture.results]
    assert names
    assert all((RESULTS / name).is_file() for name in names)


@pytest.mark.parametrize("change", ["bar", "text", "tick", "point"])
def test_the_digest_distinguishes_figures(change: str) -> None:
    def figure(change: str) -> Figure:
        figure = Figure()
        axes = figure.subplots()
        axes.barh([0, 1], [1, 2.5 if change == "bar" else 2])
        axes.plot([0, 1], [1, 2.5 if change == "point" else 2])
        axes.set_yticks([0, 1], ["ours", "others" if change == "tick" else "theirs"])
        axes.annotate("ahead" if change == "text" else "behind", (1, 1))
        return figure

    assert style.drawn(figure("")) == style.drawn(figure(""))
    assert style.drawn(figure("")) != style.drawn(figure(change))


def test_users_settings_do_not_change_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = PICTURES[0].png()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    assert PICTURES[0].png() == before


def test_the_first_token_is_prefill_and_transformers_the_faster_loop() -> None:
    record: dict[str, Any] = {
        "conditions": {"tokens": 11, "prompt_tokens": 100},
        "samples": {
            "fastllama": [{"prefill": 1.0, "decode": 2.0}, {"prefill": 2.0, "decode": 1.0}],
            "transformers generate": [{"prefill": 4.0, "decode": 5.0}],
            "transformers forward": [{"prefill": 5.0, "decode": 4.0}],
        },
    }
    assert decode_rates(record) == {
        "decode": {"fastllama": [5, 10], "transformers": [2.5]},
        "prefill": {"fastllama": [100, 50], "transformers": [25]},
    }


def test_a_gain_is_of_medians_beside_the_same_neighbours() -> None:
    def samples(neighbours: int, threads: int, *seconds: float) -> list[dict[str, Any]]:
        shared = {"contender": "fastllama", "neighbours": neighbours, "threads": threads}
        return [{**shared, "prefill": 9.0, "decode": each} for each in seconds]

    record = {"samples": samples(0, 1, 2, 4, 9) + samples(0, 2, 1, 2, 9) + samples(1, 1, 3) + samples(1, 2, 4)}
    assert thread_gains(record) == {"fastllama": {0: 2, 1: 0.75}}


def test_every_record_states_its_day() -> None:
    days = [day(load(path.name)) for path in sorted(RESULTS.glob("*.json"))]
    assert days
    assert all(re.fullmatch(r"2\d{3}-\d\d-\d\d", each) for each in days)


@pytest.mark.parametrize("name", [DECODE, DECODE_AVX512])
def test_figures_are_those_of_the_page(name: str) -> None:
    """docs/measured/cpu.md has a table of each record, rounded, above the name of its file."""
    found, page = decode_figures(load(name)), (ROOT / "docs" / "measured" / "cpu.md").read_text(encoding="utf-8")
    rows = {
        "fastllama_bf12": '"bf12"', "fastllama": "quantization=None", "fastllama_int8": '"int8"',
        "fastllama_int4": '"int4"', "llama_cpp_bf16": "llama.cpp BF16", "llama_cpp_q8_0": "llama.cpp Q8_0",
        "llama_cpp_q4_0": "llama.cpp Q4_0",
    }  # fmt: skip
    head = "| | decode tokens/s | prefill tokens/s | times llama.cpp | times transformers |\n"
    (table,) = [each for each in page.split(head)[1:] if name in each.split("\n\n")[1]]
    for key, label in rows.items():
        cells = next(line for line in table.splitlines() if label in line).split("|")[1:]
        rates = [found[f"{phase}_tokens_per_s_{key}"] for phase in ("decode", "prefill")]
        assert [cell.strip() for cell in cells[1:3]] == [f"{rate:.1f}" for rate in rates]
        if key.startswith("fastllama"):
            ratios = [found[f"{phase}_{key}_over_{peer}"] for peer in ("llama_cpp", "transformers")
                      for phase in ("decode", "prefill")]  # fmt: skip
            assert re.findall(r"\d+\.\d+", cells[3] + cells[4]) == [f"{ratio:.2f}" for ratio in ratios]


def test_arrows_that_longer_ways_imply_are_left_out() -> None:
    arrows = {"top": {"middle", "low", "b"}, "middle": {"low"}, "low": {"b"}, "a": set(), "b": {"a"}}
    assert reduced(arrows, {"a": "ground", "b": "ground"}) == {
        "top": {"middle"}, "middle": {"low"}, "low": {"ground"}, "ground": set(),
    }  # fmt: skip
    assert rows_of(reduced(arrows)) == {"top": 0, "middle": 1, "low": 2, "b": 3, "a": 4}
