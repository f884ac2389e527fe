"""Decode steps: all sequences advance in each, and the KV cache has the lengths that the record states."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllama
from fastllama.bench import ceilings, decode, decode_report, static_cache
from fastllama.kernels.dispatch.op import OPS

TINY = decode.DecodeOptions(model="tiny", device="cpu", batch=(3,), context=(96,), tokens=5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPY, "cpu", ceilings.TOY_COPY)


def measure(options: decode.DecodeOptions) -> tuple[dict[str, Any], list[int]]:
    """The record, and how many cases it held each time it was kept."""
    kept: list[int] = []
    return decode.measure(options, lambda line: None, lambda record: kept.append(len(record["cases"]))), kept


def test_the_keys_that_are_read_are_those_that_are_counted(bind: Callable[..., None]) -> None:
    """The lengths of every attention call in a measured step; once for each layer."""
    op = OPS["attention_decode"]
    right = op.implementation("cpu").run
    lengths: list[list[int]] = []

    def noting(*args: Any, **kwargs: Any) -> None:
        lengths.append((kwargs | dict(zip(op.names, args, strict=False)))["seq_lens"].tolist())
        right(*args, **kwargs)

    bind("attention_decode", noting)
    record, kept = measure(TINY)
    (case,) = record["cases"]
    assert "failed" not in case, case
    assert kept == [1, 1]
    steps = [each for each in lengths[::5] if len(each) == 3][-TINY.tokens :]
    assert steps == [[length] * 3 for length in range(88, 93)]  # 96, less the traced 3 and the token sampled last
    values = 5 * 2 * 2 * 64  # layers, keys and values, heads, of 64 numbers
    assert case["kv_bytes"] == 2 * values * sum(map(sum, steps)) / len(steps)


def test_pages_of_8_bits_are_counted_so() -> None:
    record, _ = measure(replace(TINY, kv_cache_dtype="int8", deterministic=True))
    (case,) = record["cases"]
    values = 5 * 2 * 2 * (64 + 4)  # a scale for each head
    assert case["kv_bytes"] == values * sum(3 * length for length in range(88, 93)) / 5
    assert record["conditions"]["deterministic"]


def test_a_sequence_that_stands_still_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.LLM

    def narrow(*args: Any, **options: Any) -> Any:
        return right(*args, **options | {"max_num_seqs": 2})

    monkeypatch.setattr(decode, "LLM", narrow)
    record, _ = measure(TINY)
    assert record["cases"][0]["failed"] == "RuntimeError: a step advanced 2 of 3 sequences"


def test_a_checkpoint_is_measured_too() -> None:
    record, _ = measure(
        decode.DecodeOptions(model="tiny", checkpoint=True, device="cpu", batch=(1,), context=(64,), tokens=2)
    )
    assert len(record["cases"][0]["seconds"]) == 2
    assert decode_report.report(record).startswith(
        "tiny, 4.5 M parameters, bfloat16 on cpu: 2 steps each; a copy moves "
    )


def test_a_quantized_checkpoint_is_measured_as_it_is(tmp_path: Path) -> None:
    folder = str(tmp_path / "int4")
    fastllama.save_model(fastllama.load_model("tiny", quantization="int4"), folder)
    options = decode.DecodeOptions(model=folder, checkpoint=True, device="cpu", batch=(1,), context=(64,), tokens=2)
    record, _ = measure(options)
    assert [case["quantization"] for case in record["cases"]] == ["int4"]
    again, _ = measure(replace(options, quantization=("none", "int4")))
    assert [case["weight_bytes"] for case in again["cases"]] == [record["cases"][0]["weight_bytes"]]
    with pytest.raises(ValueError, match=r"of a checkpoint in int4 is 'int8'.*legal values: 'none', 'int4'"):
        measure(replace(options, quantization=("int8",)))


def test_transformers_is_timed_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's forward runs uncompiled here: compiling takes a compiler and half a minute."""
    monkeypatch.setattr(static_cache, "compiled", lambda model: model.forward)
    bench = decode._Bench.of(TINY, lambda line: None)
    figures = bench.theirs(bench.build_theirs(), 3, 96)
    assert len(figures["seconds"]) == 5
    own = bench.ours(bench.build("none"), 3, 96)
    assert {name: figures[name] for name in ("weight_bytes", "kv_bytes")} == {
        name: own[name] for name in ("weight_bytes", "kv_bytes")
    }


def test_the_kernels_of_a_step_are_listed_with_the_rest_in_one_line() -> None:
    launches = [
        {
            "name": f"kernel_{i}",
            "per_step": 2.0,
            "us": 10.0 - i / 2,
            "us_per_step": 20.0 - i,
            "end_to_end_us_per_step": 16.0 - i,
        }
        for i in range(14)
    ]
    case = {"name": "fastllama", "quantization": "none", "batch": 1, "context": 512, "seconds": [0.0004] * 3}
    text = decode_report._launches(case | {"launches": launches})
    head, header, *lines = text.splitlines()
    assert head == (
        "fastllama, none, batch 1, context 512: 133.0 us end to end, kernels' durations 189.0 us, of a step of 400.0 us"
    )
    assert header.split() == ["kernel", "a", "step", "us", "each", "us", "a", "step", "end", "to", "end"]
    assert lines[0].split() == ["kernel_0", "2", "10.0", "20.0", "16.0"]
    assert len(lines) == 13
    assert lines[-1].split() == ["2", "others", "4", "15.0", "7.0"]


def test_a_switch_that_was_moved_stands_in_the_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_PDL", "0")
    record, _ = measure(TINY)
    assert "bfloat16 on cpu, FASTLLAMA_PDL=0: 5 steps each" in decode_report.report(record)


@pytest.mark.parametrize(("free", "skipped"), [(9_000_000, [1, 1, 1]), (900_000, [1, 1])])
def test_what_is_skipped_is_kept_at_once(free: int, skipped: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After each case and each model: a run that is ended in the next one has written it."""
    monkeypatch.setattr(decode.models, "available_bytes", lambda device: free)
    kept: list[int] = []
    options = replace(TINY, batch=(400, 1), peers=False)
    decode.measure(options, lambda line: None, lambda record: kept.append(len(record["skipped"])))
    assert kept == skipped


def test_a_model_is_given_up_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them would not fit where one does."""
    built: list[str] = []
    made: list[weakref.ref[Any]] = []
    right = decode._Bench.build

    def build(self: decode._Bench, kind: str) -> Any:
        built.append(kind)
        assert [each() for each in made] == [None] * len(made)
        model = right(self, kind)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(decode._Bench, "build", build)
    options = decode.DecodeOptions(
        model="tiny", device="cpu", batch=(1, 2), context=(48, 64), tokens=2, quantization=("none", "int8"), peers=False
    )
    record, kept = measure(options)
    assert built == ["none", "int8"]
    assert kept == [*range(1, 9), 8]
    assert [(case["context"], case["batch"]) for case in record["cases"][:4]] == [(48, 1), (48, 2), (64, 1), (64, 2)]
    assert torch.is_grad_enabled()
