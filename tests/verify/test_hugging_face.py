"""verify against transformers: right models agree, and a misread checkpoint fails, though our formulas agree."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastllama import LLM
from fastllama.errors import ExtraRequiredError
from fastllama.io.formats.hf import HfCheckpoint
from fastllama.io.load import load_model
from fastllama.io.save import save_model
from fastllama.layers.config import LlamaConfig, RopeScaling
from fastllama.verify import Report, check
from fastllama.verify.hugging_face import TransformersReference
from tests.cli.models import SIZES, write_model
from tests.io.adapters import base_in, trained
from tests.io.checkpoints import random_llama, write_llama2c, write_meta
from tests.rounds import exhaustive

NAME = f"transformers {transformers.__version__}"
NAMES = ["weights", "layer 0", "layer 1", "logits", "tokens", "replayed tokens"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa, tied": {"tie_word_embeddings": True},
    "mha, biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mqa, wide heads": {"num_key_value_heads": 1, "head_dim": 24},
    "theta, eps": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
}


@pytest.fixture(autouse=True)
def _no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops have their own tests."""
    monkeypatch.setattr("fastllama.verify.ops.rows", lambda dtype, device: iter(()))


def write(folder: Path, **settings: Any) -> Path:
    """A random model as this version of transformers writes it, without a tokenizer."""
    settings = {"vocab_size": 300, **SIZES, **settings}
    if "rope_scaling" in settings and int(transformers.__version__.split(".")[0]) >= 5:
        theta = settings.pop("rope_theta", 10000.0)
        settings["rope_parameters"] = {"rope_theta": theta, **settings.pop("rope_scaling")}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    for parameter in model.parameters():
        parameter.data.normal_(0 if parameter.dim() == 2 else 1, 0.3 if parameter.dim() == 2 else 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folders(shape)`: the model of a shape, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(shape: str) -> Path:
        path = root / shape
        return path if path.exists() else write(path, **SHAPES[shape])

    return folder


def failed(report: Report) -> list[str]:
    return [row.name for row in report.rows if not row.ok]


def unexpected(*args: Any, **options: Any) -> None:
    raise AssertionError("our model was loaded first")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", exhaustive("float16")])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_that_is_read_rightly_agrees(folders: Callable[[str], Path], shape: str, dtype: str) -> None:
    """Far within the bound: each of both has a bound to itself, and plain torch keeps half."""
    report = check(folders(shape), dtype=dtype, against="transformers")
    assert [row.name for row in report.rows] == NAMES
    assert report.ok, report.table()
    assert report.reference == NAME
    assert max(row.strain for row in report.rows if row.kind in ("layer", "logits")) < 0.75, report.table()


def test_frequencies_that_are_rounded_in_another_order_agree(tmp_path: Path) -> None:
    """YaRN of a low base, where some angles differ by an ulp: twice the bound against the formulas is not enough."""
    path = write(tmp_path / "model", **SHAPES["yarn"], rope_theta=7.0, head_dim=32)
    report, formulas = (check(path, dtype="float32", against=against) for against in ("transformers", "formulas"))
    assert report.ok, report.table()
    bounds = {row.name: row.bound for row in formulas.rows}
    layers = [row for row in report.rows if row.kind == "layer"]
    assert any(row.error > 2 * bounds[row.name] for row in layers), "the case shows nothing"


def config_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[LlamaConfig], LlamaConfig]) -> None:
    """Change how config.json is read from now on."""
    right = HfCheckpoint._read_config
    monkeypatch.setattr(HfCheckpoint, "_read_config", lambda self, raw: change(right(self, raw)))


def scaled(config: LlamaConfig, **changes: Any) -> LlamaConfig:
    scaling = config.rope_scaling
    assert isinstance(scaling, RopeScaling)
    return replace(config, rope_scaling=replace(scaling, **changes))


MISREAD: dict[str, tuple[str, Callable[[LlamaConfig], LlamaConfig]]] = {
    "theta": ("gqa, tied", lambda config: replace(config, rope_theta=10001.0)),
    "theta left at its default": ("theta, eps", lambda config: replace(config, rope_theta=10000.0)),
    "eps": ("gqa, tied", lambda config: replace(config, rms_norm_eps=1e-5)),
    "no scaling": ("linear", lambda config: replace(config, rope_scaling=None)),
    "factor of linear": ("linear", lambda config: scaled(config, factor=4.001)),
    "factor of dynamic": ("dynamic", lambda config: scaled(config, factor=2.001)),
    "factor of yarn": ("yarn", lambda config: scaled(config, factor=4.001)),
    "attention factor of yarn": ("yarn", lambda config: scaled(config, attention_factor=1.0)),
    "factor of llama3": ("llama3", lambda config: scaled(config, factor=8.01)),
    "low frequencies of llama3": ("llama3", lambda config: scaled(config, low_freq_factor=1.01)),
}


@pytest.mark.parametrize("misread", MISREAD)
def test_a_config_that_is_misread_is_found(
    folders: Callable[[str], Path], misread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer fails already; the fp64 formulas are given the same config, and agree."""
    shape, change = MISREAD[misread]
    path = folders(shape)
    config_read(monkeypatch, change)
    assert check(path, dtype="float32").ok, "the formulas saw it"
    report = check(path, dtype="float32", against="transformers")
    assert failed(report)[:3] == ["layer 0", "layer 1", "logits"], report.table()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_gross_misreading_is_found_in_16_bits_too(
    folders: Callable[[str], Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders("linear")
    config_read(monkeypatch, lambda config: replace(config, rope_scaling=None))
    assert "layer 0" in failed(check(path, dtype=dtype, against="transformers"))


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "lm_head"])
def test_weights_that_are_taken_for_others_are_found(
    folders: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads of q or k, or two rows of the head, in each other's place while they are read."""
    read, size = HfCheckpoint.tensors, 1 if kind == "lm_head" else SIZES["head_dim"]

    def swapped(self: HfCheckpoint) -> Iterator[Any]:
        for name, tensor in read(self):
            if f"{kind}.weight" in name:
                tensor = torch.cat([tensor[size : 2 * size], tensor[:size], tensor[2 * size :]])
            yield name, tensor

    path = folders("linear")
    monkeypatch.setattr(HfCheckpoint, "tensors", swapped)
    assert check(path).ok, "the formulas saw it"
    report = check(path, against="transformers")
    assert failed(report)[0] == ("logits" if kind == "lm_head" else "layer 0"), report.table()


def test_the_bound_does_not_go_by_how_far_transformers_is_off(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds do not depend on what transformers computed, and are at least twice those against the formulas."""
    path = folders("linear")
    config_read(monkeypatch, lambda config: replace(config, rope_scaling=None))
    formulas, theirs = (check(path, dtype="bfloat16", against=against) for against in ("formulas", "transformers"))
    bounds = {row.name: row.bound for row in formulas.rows}
    assert formulas.ok
    assert not theirs.ok
    forward = TransformersReference.forward
    monkeypatch.setattr(TransformersReference, "forward", lambda *given: [3 * each for each in forward(*given)])
    assert [row.bound for row in check(path, dtype="bfloat16", against="transformers").rows] == [
        row.bound for row in theirs.rows
    ]
    for row in theirs.rows:
        assert 2 * bounds[row.name] <= row.bound <= 4 * bounds[row.name], row.name


def test_transformers_computes_in_the_dtype_that_is_asked_for(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has another dtype."""
    forward, seen = TransformersReference.forward, []

    def watched(self: TransformersReference, ids: torch.Tensor, length: int) -> list[torch.Tensor]:
        seen.extend(forward(self, ids, length))
        return seen

    monkeypatch.setattr(TransformersReference, "forward", watched)
    assert check(folders("linear"), dtype="float16", against="transformers").ok
    assert [each.dtype for each in seen] == [torch.float16] * 3


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_folder_agrees_quietly(
    tmp_path: Path, kind: str, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}
    original = write_model(tmp_path / "original", **sizes)
    save_model(load_model(original, quantization=kind), tmp_path / kind)
    capfd.readouterr()
    report = check(tmp_path / kind, dtype=dtype, against="transformers", progress=False)
    assert report.ok, report.table()
    assert capfd.readouterr() == ("", ""), "a pipe gets the report alone"


def test_a_quantized_folder_needs_compressed_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_model(tmp_path / "original", hidden_size=128, intermediate_size=160, head_dim=32)
    save_model(load_model(original, quantization="int4"), tmp_path / "int4")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ValueError, match=r"weights are in int4: .*not installed; pip install compressed-tensors"):
        check(tmp_path / "int4", against="transformers")


def test_without_transformers_the_extra_is_named(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders("linear")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraRequiredError, match=r"against='transformers' needs 'transformers'.*fastllama\[hf\]"):
        check(path, against="transformers")
    assert check(path).ok


@pytest.mark.parametrize("kind", ["a checkpoint in Meta's format", "a llama2.c file", "an adapter"])
def test_what_is_no_hugging_face_model_is_refused_by_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    if kind == "an adapter":
        trained(transformers.LlamaForCausalLM.from_pretrained(base_in(tmp_path / "base")), path)
    elif kind == "a llama2.c file":
        write_llama2c(random_llama(), path, version=0)
    else:
        write_meta(random_llama(), path)
    assert check(path).ok
    monkeypatch.setattr(LLM, "__init__", unexpected)
    with pytest.raises(ValueError, match=f"{kind}; legal with against='transformers': a whole model as a Hugging"):
        check(path, against="transformers")


def test_what_transformers_cannot_load_is_refused_with_its_reason(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before our own model is loaded."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such\nlayer")

    path = folders("linear")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(LLM, "__init__", unexpected)
    with pytest.raises(ValueError, match=f"which {NAME} cannot load: RuntimeError: no such layer$"):
        check(path, against="transformers")


def test_weights_that_transformers_would_invent_are_refused(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained

    def without(*args: Any, **options: Any) -> Any:
        model, found = load(*args, **options)
        return model, {**found, "missing_keys": {"lm_head.weight"}}

    path = folders("linear")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", without)
    with pytest.raises(ValueError, match=r"does not find \['lm_head.weight'\]"):
        check(path, against="transformers")


def test_its_settings_are_the_users_again_afterwards(folders: Callable[[str], Path]) -> None:
    logging = transformers.utils.logging
    before, filters, stderr = logging.get_verbosity(), list(warnings.filters), sys.stderr
    logging.set_verbosity_info()
    try:
        assert check(folders("linear"), against="transformers").ok
        assert logging.get_verbosity() == logging.INFO
        assert (warnings.filters, sys.stderr) == (filters, stderr)
    finally:
        logging.set_verbosity(before)


def test_another_word_is_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"against is 'transformer' .did you mean 'transformers'.*'formulas'"):
        check(folders("linear"), against="transformer")
