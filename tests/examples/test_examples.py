"""Each program of examples/ runs as it stands, and prints what its docstring promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 80  # of a program: what one reads at once


def run(name: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, f"examples/{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_is_short_listed_and_run_here() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name: count for name, count in lines.items() if count > LINES} == {}
    assert set(re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == set(lines)
    assert set(re.findall(r'\brun\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))) == set(lines)


def test_generation_is_one_batch_with_seeds_and_ranks() -> None:
    printed = run("generate.py", "--device", "cpu", "--tokens", "8")
    assert re.findall(r"^'(.*)', seed (\d)", printed, re.MULTILINE) == [
        ("Once upon a time", "0"),
        ("The old baker had a secret.", "1"),
        ("One day, a fox", "2"),
    ]
    found = re.findall(r"least likely: .*, (\d+)%, rank (\d+) \(rank 1 had (\d+)%\)", printed)
    assert len(found) == 6
    for chance, rank, best in found:
        assert int(chance) <= int(best)
        assert int(rank) >= 1
    assert "\n6 samples in one batch: 48 tokens" in printed


def test_streams_end_each_in_its_own_way() -> None:
    *lines, counted = run("stream_async.py", "--device", "cpu").splitlines()
    ends = dict(re.findall(r" s  (.{19}) -- (.*)", "\n".join(lines)))
    assert {prompt.strip(): end.split()[0] for prompt, end in ends.items()} == {
        "Once upon a time": "48",
        "The old baker": "48",
        "The dog was hungry.": "deadline",
        "A fox met a bear.": "left:",
    }
    assert "samples ended: {" in counted
    for reason in ("'abort': 1", "'deadline': 1", "'length': 2"):
        assert reason in counted
    free, pages = re.findall(r"(\d+) of (\d+) KV pages free", counted)[0]
    assert free == pages


def test_a_kernel_is_proved_and_its_planted_fault_found() -> None:
    printed = run("own_kernel.py")
    ours, theirs = map(float, re.findall(r"error (\S+), plain torch's (\S+)\n", printed)[0])
    assert 0 < ours <= 2 * theirs + 2**-8
    assert "3000 bytes loaded for an input of 3000" in printed
    assert "without its mask: load out of bounds of x_ptr (bfloat16 [5, 300])" in printed
    rows = re.findall(r"^ +(sm_\d+|gfx\d+) +\d+ +\d+ +\d+ +(\d+) ", printed, re.MULTILINE)
    assert {spilled for _, spilled in rows} == {"0"}
    assert len(rows) == 5


def test_the_cascade_is_plain_attention_with_an_eighth_of_the_reads() -> None:
    printed = run("cascade.py", "--device", "cpu")
    difference, largest = map(float, re.findall(r"difference (\S+), of values up to (\S+)\n", printed)[0])
    assert difference < 1e-5 * largest
    read, plain = map(int, re.findall(r"of (\d+)", printed)[-2:])
    assert plain - read == 15 * 1024


def test_a_patched_model_writes_the_same_text() -> None:
    printed = run("patch_transformers.py", "--tokens", "24")
    assert "patched 5 of 5 layers\n" in printed
    assert re.search(r"patched: \d+\.\d tokens/s, the same text", printed)
