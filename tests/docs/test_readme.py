"""Figures of README.md and docs/use/laptop.md are those of the committed results; the README's tree is true."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import fastllama
from tools.plots.records import DECODE, DECODE_AVX512, day, decode_figures, figures, load, machine

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_figures_are_those_of_the_committed_results() -> None:
    found = figures()
    record = load(DECODE)
    rows = {
        "bf16, in 12 bits without loss (default)": "fastllama_bf12",
        "bf16 (`quantization=None`)": "fastllama",
        "int8": "fastllama_int8",
        "int4": "fastllama_int4",
    }
    for name, key in rows.items():
        cells = [
            f"{found[f'{phase}_{figure}_{key}']:.1f}"
            if figure == "tokens_per_s"
            else f"{found[f'{phase}_{key}_over_{figure}']:.2f}"
            for phase in ("decode", "prefill")
            for figure in ("tokens_per_s", "llama_cpp", "transformers")
        ]
        assert f"| {name} | {' | '.join(cells)} |" in README
    assert f"{machine(record)}, {day(record)}" in PROSE
    other = load(DECODE_AVX512)
    ratios = decode_figures(other)
    ends = [
        end([value for name, value in ratios.items() if re.fullmatch(rf"{phase}_\w+_over_llama_cpp", name)])
        for phase in ("decode", "prefill")
        for end in (min, max)
    ]
    assert f"2 threads, {day(other)}" in PROSE
    assert (
        "at {:.2f} to {:.2f} times the speed of llama.cpp and read prompts at {:.2f} to {:.2f}".format(*ends) in PROSE
    )
    assert (
        f"reads 4-bit prompts {1 / ratios['prefill_fastllama_int4_over_llama_cpp']:.2f} times as fast on AVX-512"
        in PROSE
    )
    busy = [found[f"busy_{family}_{end}"] for family in ("fastllama", "llama_cpp") for end in ("least", "most")]
    assert "at {:.2f} to {:.2f} times the speed of one, llama.cpp at {:.2f} to {:.2f}".format(*busy) in PROSE


def test_the_share_of_the_bandwidth_on_a_laptop_is_that_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "use" / "laptop.md").read_text(encoding="utf-8")
    record, found = load(DECODE), figures()
    bandwidth = median(record["read_bytes_per_second"])
    for name, size in record["bytes_per_token"].items():
        rate = found[f"decode_tokens_per_s_{name.replace(' ', '_')}"]
        kind = name.removeprefix("fastllama").strip() or "bf16"
        assert f"| {kind} | {size / 1e9:.2f} GB | {rate:.1f} | {rate * size / bandwidth:.2f} |" in page
    assert f"read {bandwidth / 1e9:.1f} GB/s" in " ".join(page.split())


def test_first_screen_shows_the_plot_the_demonstration_and_the_state_on_a_gpu() -> None:
    screen = README.split("\n## ")[0]
    assert len(screen.splitlines()) <= 30
    assert "](docs/images/cpu-decode.png)" in screen
    assert "\nmake demo\n" in screen
    assert "**Not yet run on a GPU.**" in screen


def test_tree_names_every_folder_of_the_package_and_folders_that_exist() -> None:
    (tree,) = re.findall(r"^```text\n(.*?)^```$", section("The tree"), re.DOTALL | re.MULTILINE)
    folders = [path for path in Path(fastllama.__file__).parent.iterdir() if path.is_dir()]
    named = re.findall(r"^  (\w+)/", tree, re.MULTILINE)
    assert sorted(named) == sorted(folder.name for folder in folders if folder.name != "__pycache__")
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, re.MULTILINE))
