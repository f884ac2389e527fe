"""fastllama bench: what it prints and writes, and how it reports peers that are not installed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fastllama import LLM
from fastllama.bench import ceilings, decode, estimate, models, peers, runtime
from fastllama.bench.ops import comparison, suite
from fastllama.cli import bench, main
from fastllama.kernels.dispatch.backends import Implementation
from fastllama.layers.quantization import WORDS
from fastllama.runtime.options import KV_DTYPES
from tests.cli.conftest import Command
from tests.cli.models import write_model

SMALL = ("--requests", "3", "--tokens", "4", "--rounds", "2", "--loads", "0.5", "2", "--arrivals", "12")


def test_the_runtime_beside_transformers(command: Command, model: str, tmp_path: Path) -> None:
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    files = ("--output", output, "--plot", picture)
    done = command("bench", "runtime", "--model", model, *SMALL, "--peers", "generate", *files)
    assert done.status == 0, done.err
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["benchmark"] == "serving"
    assert found["conditions"]["prompt_tokens"] == [8, 252]  # 256 less the answer's 4
    assert (found["conditions"]["dtype"], found["conditions"]["device"]) == ("float32", "cpu")
    assert list(found["throughput"]) == ["fastllama", "transformers generate"]
    for figures in found["throughput"].values():
        assert (len(figures["seconds"]), figures["different"]) == (2, 0)
        assert 3 / max(figures["seconds"]) <= figures["requests_per_second"] <= 3 / min(figures["seconds"])
        assert f"{figures['requests_per_second']:.2f}  " in done.out
    first, second = found["arrivals"]
    for run in (first, second):
        assert (len(run["first_token_seconds"]), len(run["inter_token_seconds"])) == (12, 36)
    assert second["rate"] == pytest.approx(4 * first["rate"])
    line = r" 12 samples +[\d.]+ +[\d.]+ +- +36 samples +[\d.]+ +[\d.]+ +-$"  # of 12 and of 36 no p99
    assert re.search(r"^50% +[\d.]+ +" + line, done.out, re.MULTILINE)
    assert re.search(r"^200% +[\d.]+ +" + line, done.out, re.MULTILINE)
    assert "throughput: round 2 of 2\nlatency: 12 requests, " in done.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peers_that_cannot_run_are_named(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = (*SMALL[:6], "--loads", "--quiet")
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's own mark of what is not installed
    done = command("bench", "runtime", "--model", model, *alone)
    assert (done.status, done.err) == (0, "")
    for name in ("generate", "generate_batch"):
        assert f"transformers {name}: not installed: pip install 'fastllama[hf]'\n" in done.out
    without = command("bench", "runtime", "--model", model, *alone, "--peers").out
    assert "transformers" not in without
    assert "ours is" not in without, "a column of nothing"
    assert "ours is" not in done.out, "a column of nothing"


def test_a_peer_is_loaded_without_a_bar_and_one_of_anything_is_singular(command: Command, model: str) -> None:
    one = ("--requests", "1", "--tokens", "2", "--rounds", "1", "--loads", "1", "--arrivals", "1", "--quiet")
    done = command("bench", "runtime", "--model", model, *one, "--peers", "generate")
    assert (done.status, done.err) == (0, "")
    assert "\n1 request at once, 1 round\n" in done.out
    assert "\n1 request at random, by load; milliseconds\n" in done.out
    assert " 1 sample " in done.out
    assert "ours is" in done.out


def test_a_peer_that_does_not_load_is_named(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise MemoryError("no room for it")

    monkeypatch.setattr(peers, "load", load)
    done = command("bench", "runtime", "--model", model, *SMALL[:6], "--loads", "--quiet", "--peers", "generate")
    assert (done.status, done.err) == (0, "")
    assert "\ntransformers generate: MemoryError: no room for it\n" in done.out


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runtime, "measure", None)
    done = command("bench", "runtime", "--plot", tmp_path / "a.png")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fastllama: error: --plot needs 'matplotlib', which is not installed: pip install")
    assert done.err.count("\n") == 1


def test_quantized_weights_are_measured_where_the_options_ask(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = write_model(tmp_path / "model", tokenizer=False), tmp_path / "found.json"
    rest = (*SMALL[:6], "--loads", "--peers", "--quiet", "--quantize", "int8", "--output", output)
    passed: list[dict[str, object]] = []

    def watched(*args: object, **options: object) -> LLM:
        passed.append(options)
        return LLM(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime, "LLM", watched)
    runtime_options = (
        "--kv-cache-dtype",
        "int8",
        "--deterministic",
        "--speculation",
        folder,
        "--num-draft-tokens",
        "2",
    )
    done = command("bench", "runtime", "--model", folder, *rest, *runtime_options)
    assert (done.status, done.err) == (0, "")
    assert (
        f"float32, weights in int8, keys and values in int8, deterministic on cpu, 2 draft tokens by {folder}: "
        in done.out
    )
    conditions = json.loads(output.read_text(encoding="utf-8"))["conditions"]
    assert (conditions["quantization"], conditions["kv_cache_dtype"]) == ("int8", "int8")
    assert (conditions["deterministic"], conditions["num_draft_tokens"]) == (True, 2)
    names = ("kv_cache_dtype", "deterministic", "speculation", "num_draft_tokens")
    assert [[options[name] for name in names] for options in passed] == [["int8", True, str(folder), 2]]


TINY = (
    "bench",
    "decode",
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--context",
    "80",
    "--tokens",
    "12",
    "--batch",
    "1",
    "3",
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes no second."""
    monkeypatch.setitem(ceilings.COPY, "cpu", ceilings.TOY_COPY)


@pytest.mark.usefixtures("quick")
def test_decode_steps(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    done = command(*TINY, "--quantize", "none", "int8", "--output", output)
    assert done.status == 0, done.err
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [(case["quantization"], case["batch"]) for case in found["cases"]] == [
        ("none", 1),
        ("none", 3),
        ("int8", 1),
        ("int8", 3),
    ]
    assert (found["conditions"]["dtype"], found["conditions"]["device"]) == ("bfloat16", "cpu")
    copy = found["ceilings"]["copy_bytes_per_second"]
    for case in found["cases"]:
        assert len(case["seconds"]) == 12
        seconds = sum(case["seconds"])
        assert case["tokens_per_second"] == pytest.approx(case["batch"] * 12 / seconds)
        read = case["weight_bytes"] + case["kv_bytes"]
        assert case["of_copy"] == pytest.approx(12 * read / seconds / copy)
        assert case["of_read"] == pytest.approx(case["of_copy"] * copy / found["ceilings"]["read_bytes_per_second"])
        assert re.search(rf"^fastllama +{case['quantization']} +{case['batch']} +80 ", done.out, re.MULTILINE)
        assert f"batch {case['batch']}, context 80: {case['tokens_per_second']:.2f} tokens/s\n" in done.err
    assert "transformers StaticCache, compiled: measured on CUDA only" in done.out
    assert done.out.startswith("tiny, 4.5 M parameters, random weights, bfloat16 on cpu: 12 steps each; ")


@pytest.mark.usefixtures("quick")
def test_a_case_that_fails_is_the_commands_failure_and_leaves_the_others(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decode._Bench.ours

    def ours(self: decode._Bench, model: object, batch: int, context: int) -> object:
        if batch == 1:
            raise RuntimeError("no such graph")
        return right(self, model, batch, context)

    monkeypatch.setattr(decode._Bench, "ours", ours)
    done = command(*TINY, "--quiet", "--no-peers")
    assert (done.status, done.err) == (bench.FAILED, "")
    assert "fastllama, none, batch 1, context 80: failed: RuntimeError: no such graph" in done.out
    assert re.search(r"^fastllama +none +3 +80 +[\d.]+ ", done.out, re.MULTILINE)
    assert "transformers" not in done.out


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_in_memory_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_bytes", lambda device: 9_000_000)
    done = command(*TINY, "--quiet")
    assert done.status == 0
    # 4 of 5 layers of 786,944 numbers, of 2 bytes each: 6.3 MB. Of 3 sequences of 80 tokens, 384 slots of 2560 bytes.
    for batch in (1, 3):
        assert re.search(rf"^fastllama +none +{batch} +80 ", done.out, re.MULTILINE)
    monkeypatch.setattr(models, "available_bytes", lambda device: 900_000)
    done = command(*TINY, "--quiet")
    assert "skipped: fastllama, none: the weights take 0.0 GB, and 0.0 GB are free" in done.out
    assert not re.search("^fastllama ", done.out, re.MULTILINE)


class Enough(ValueError):
    """Ends the command before a weight is made."""


@pytest.mark.parametrize("options", [[], ["--batch", "100000"], ["--shape", "7b"], ["--model", "tiny"]])
def test_the_estimate_is_printed_before_anything_is_made(
    command: Command, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    def end(*args: object) -> None:
        raise Enough("enough")

    monkeypatch.setattr(decode, "bandwidths", end)
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 16e9)
    monkeypatch.setattr(estimate.Rates, "of", lambda dtype: estimate.Rates(1e11, 2e10))
    done = command("bench", "decode", "--device", "cpu", *options)
    assert done.status == 2
    *lines, end_line = done.err.splitlines()
    assert end_line == "fastllama: error: enough"
    said = r"[\w.]+: weights [\d.]+ [GM]B, keys and values up to [\d.]+ [GM]B; [\d,]+ tokens of prompts, "
    said += r"\d+ steps: about .+"
    assert lines[-1] == "copying and reading"
    assert re.fullmatch(said, lines[-2])
    chosen = {"": "1.1b", "--batch": "tiny"}.get(options[0] if options else "")
    if chosen:
        assert f"no --shape is given: {chosen} is the largest for this CPU" in lines
    else:
        assert not any("no --shape" in line for line in lines)


TOY_OPS = ("bench", "ops", "--shape", "toy", "--device", "cpu", "--ops", "rms_norm", "silu_mul", "--no-peers")


def test_ops(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    done = command(*TOY_OPS, "--output", output)
    assert done.status == 0, done.err
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [case["op"] for case in found["cases"]] == ["rms_norm", "silu_mul"]
    assert found["conditions"]["shape"] == "toy"
    for case in found["cases"]:
        assert re.search(rf"^{case['op']} \(\w+\) +toy, 3 rows +[\d.]+ +\d+ % ", done.out, re.MULTILINE)
        assert f"{case['op']}, toy, 3 rows: " in done.err
    assert done.out.startswith("bfloat16 on cpu: a copy moves ")


def test_an_op_that_is_wrong_is_named_and_the_commands_failure(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = comparison.implementation

    def zeros(*args: torch.Tensor) -> None:
        args[-1].zero_()

    def implementation(op: str, device: torch.device) -> Implementation:
        return Implementation("made up", zeros, "") if op == "rms_norm" else right(op, device)

    monkeypatch.setattr(comparison, "implementation", implementation)
    done = command(*TOY_OPS, "--quiet")
    assert (done.status, done.err) == (bench.FAILED, "")
    said = r"^rms_norm, toy, 3 rows: fastllama failed: wrong: error 1, bound 0\.0\d+$"
    assert re.search(said, done.out, re.MULTILINE)
    assert re.search(r"^silu_mul \(", done.out, re.MULTILINE)


def test_the_choices_are_those_of_what_is_called() -> None:
    def choices(command: str, option: str) -> set[str]:
        actions = main._parser()._subparsers._group_actions[0].choices["bench"]._subparsers._group_actions[0].choices
        return set(actions[command]._option_string_actions[option].choices)

    assert choices("decode", "--shape") == set(models.SHAPES)
    assert choices("decode", "--quantize") == set(WORDS)
    assert choices("ops", "--shape") == set(suite.SHAPES)
    assert choices("runtime", "--peers") == set(peers.PEERS)
    for command in ("decode", "runtime"):
        assert choices(command, "--kv-cache-dtype") == set(KV_DTYPES)
