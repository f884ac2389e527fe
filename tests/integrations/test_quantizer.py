"""FastLlamaConfig in from_pretrained: what it quantizes, when, and what such a model can do."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

import fastllama
from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.integrations.transformers.quantizer import FastLlamaQuantizer
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.integrations.models import IDS, NEW_TOKENS, SIZES, assert_close, llama
from tests.rounds import exhaustive

SCHEMES = tuple(HF_LINEARS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS = 7 * SIZES["num_hidden_layers"]
STREAMS = hasattr(HfQuantizer, "get_quantize_ops")  # transformers 5
WIDE = {"hidden_size": 128, "intermediate_size": 96}  # groups of 128, and of 32


def opened(folder: Path, *given: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model quantized as it is loaded; given: the arguments of FastLlamaConfig."""
    config = fastllama.FastLlamaConfig(*given)
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **options)


def saved(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    llama(dtype, **sizes).save_pretrained(folder)
    return folder


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_rounded_as_load_model_rounds_them(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = WIDE | {"attention_bias": True, "mlp_bias": True}
    model, report = opened(saved(tmp_path, dtype, **sizes), scheme, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    own = fastllama.load_model(tmp_path, quantization=scheme)
    assert own.dtype == dtype
    layers = quantized(model)
    assert len(layers) == LAYERS
    if scheme == "int4":
        assert {layer.group_size for layer in layers.values()} == {128, 32}
    for name, get in kept_tensors(own):
        expected = get()
        if isinstance(expected, QuantizedWeight):
            found = layers[name.removesuffix(".weight")]
            assert type(found) is HF_LINEARS[scheme]
            assert found.form == expected.form
            assert found.quantized_rows(0, found.out_features).equals(expected), name
        else:
            assert torch.equal(model.get_parameter(name), expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantized_model(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = opened(saved(tmp_path, dtype, attention_bias=True), scheme, dtype=dtype, device_map="cpu")
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert model.dtype == dtype
    found, fp32 = logits(model), copy.deepcopy(model).dequantize(*[torch.float32] * STREAMS).float()
    assert found.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_close(found, logits(fp32), bound=5e-2 if scheme == "w8a8" else bound)  # which rounds x to 8 bits


@pytest.mark.skipif(not STREAMS, reason="transformers 4.57 loads all weights first")
def test_one_loaded_weight_is_alive_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive, loaded = [], []

    def replace(self: Any, model: nn.Module, name: str, weight: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(weight))
        plain = [each for key, each in model.named_modules() if type(each) is nn.Linear and key != "lm_head"]
        loaded.append(sum(not each.weight.is_meta for each in plain))
        real(self, model, name, weight)

    real = FastLlamaQuantizer._replace
    monkeypatch.setattr(FastLlamaQuantizer, "_replace", replace)
    model = opened(folder, "int4")
    assert len(alive) == len(quantized(model)) == LAYERS
    assert max(alive) <= 1  # the one before goes when the next is in its variable
    assert max(loaded) == 0  # none waits in an nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_stays_as_it_is(tied: bool, tmp_path: Path) -> None:
    model = opened(saved(tmp_path, tie_word_embeddings=tied), "int8")
    assert type(model.lm_head) is nn.Linear
    assert len(quantized(model)) == LAYERS
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_models_of_other_heads_and_without_one(folder: Path) -> None:
    config = fastllama.FastLlamaConfig("int8")
    body = transformers.LlamaModel.from_pretrained(folder, quantization_config=config)
    classifier = transformers.LlamaForSequenceClassification.from_pretrained(folder, quantization_config=config)
    assert type(classifier.score) is nn.Linear
    assert len(quantized(classifier)) == len(quantized(body)) == LAYERS
    with torch.no_grad():
        found, expected = body(IDS).last_hidden_state, opened(folder, "int8").model(IDS).last_hidden_state
    assert torch.equal(found, expected)


class Bodiless(transformers.LlamaForCausalLM):
    """A model that names no body of its own: its head is known as its output embeddings."""

    base_model_prefix = ""


def test_a_head_inside_of_the_body_stays_too(folder: Path) -> None:
    model = Bodiless.from_pretrained(folder, quantization_config=fastllama.FastLlamaConfig("int8"))
    assert model.base_model is model
    assert type(model.lm_head) is nn.Linear
    assert len(quantized(model)) == LAYERS


def test_modules_not_to_be_converted(folder: Path) -> None:
    model = opened(folder, "int4", 32, ["k_proj", "layers.0"])
    assert len(quantized(model)) == 6 * (SIZES["num_hidden_layers"] - 1)
    assert not [name for name in quantized(model) if "k_proj" in name or ".0." in name]
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.get_parameter(name), load_file(folder / "model.safetensors")[name])
    with pytest.raises(ValueError, match="modules_to_not_convert has 'kproj', which is not a module of a Llama"):
        opened(folder, "int4", 32, ["kproj"])
    with pytest.raises(ValueError, match="in which no layer is left to convert"):
        opened(folder, "int4", 32, ["model"])


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_layer_takes_the_largest_group_that_divides_its_columns(group_size: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = opened(saved(tmp_path, **sizes), "int4", group_size)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.group_size == min(group_size, 64)
    assert layer.mlp.down_proj.group_size == 100  # the whole row


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (("int5",), ValueError, "scheme is 'int5' .*; legal values: 'int4', 'int8', 'w8a8'"),
        (("int4", 16), ValueError, "group_size is 16; legal values: 32, 64, 128"),
        (("int4", True), ValueError, "group_size is True; legal values"),
        (("int8", 64), ValueError, "group_size is 64 for scheme 'int8', which has one scale per row; legal: leave it"),
        (("int4", 64, "lm_head"), TypeError, "modules_to_not_convert is 'lm_head'; legal: a list of names"),
        (("int4", 64, 3), TypeError, "modules_to_not_convert is 3; legal: a list of names"),
    ],
)
def test_arguments_are_checked(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastllama.FastLlamaConfig(*given)


def test_what_cannot_be_loaded_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64; legal beside a FastLlamaConfig: torch.float32"):
        opened(folder, "int4", dtype=torch.float64)
    for places in ({"model": "disk", "lm_head": "cpu"}, {"model": "cpu", "lm_head": 0}):
        with pytest.raises(ValueError, match=r"device_map is .*; legal beside a FastLlamaConfig: accelerators alone"):
            opened(folder, "int4", device_map=places)


def test_a_dictionary_is_as_good(folder: Path) -> None:
    given = {"quant_method": "fastllama", "scheme": "int4", "group_size": 32}
    assert fastllama.FastLlamaConfig("int4", 32).to_dict() == given | {"modules_to_not_convert": None}
    assert '"scheme": "int4"' in repr(fastllama.FastLlamaConfig("int4", 32))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=given)
    assert {layer.group_size for layer in quantized(model).values()} == {32}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python source, run in a process of its own."""
    given = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=given)


def test_a_reloaded_module_registers_its_own_classes() -> None:
    done = run(
        "import importlib\n"
        "from fastllama.integrations.transformers import quantizer\n"
        "importlib.reload(quantizer)\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['fastllama'] is quantizer.FastLlamaQuantizer\n"
        "assert AUTO_QUANTIZATION_CONFIG_MAPPING['fastllama'] is quantizer.FastLlamaConfig\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["FastLlamaConfig", "patch"])
def test_without_transformers_the_extra_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('no such luck')")
    done = run(f"import fastllama; fastllama.{name}", PYTHONPATH=str(tmp_path))
    said = "fastllama.integrations.transformers needs 'transformers', which is installed but cannot be imported"
    assert said in done.stderr
    assert "no such luck" in done.stderr
    assert "pip install 'fastllama[hf]'" in done.stderr


def rewritten(folder: Path, settings: Mapping[str, Any], without: str | None = None) -> Path:
    """A folder with another configuration, and without some tensors."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    weights = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if without is None or without not in name}
    save_file(kept, weights, {"format": "pt"})
    return folder


def test_weights_and_biases_that_the_files_lack_are_initialised(tmp_path: Path) -> None:
    """Initialized as transformers does it, not left uninitialized."""
    expected = logits(opened(saved(tmp_path / "whole"), "int8"))
    folder = rewritten(saved(tmp_path / "bias"), {"attention_bias": True})
    model, report = opened(folder, "int8", output_loading_info=True)
    assert len(report["missing_keys"]) == 4 * SIZES["num_hidden_layers"]
    assert not any(layer.bias.any() for name, layer in quantized(model).items() if "self_attn" in name)
    assert torch.equal(logits(model), expected)
    folder = rewritten(saved(tmp_path / "weight"), {}, without="layers.0.mlp.up_proj")
    model, report = opened(folder, "int8", output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.layers.0.mlp.up_proj.weight"}
    assert len(quantized(model)) == LAYERS
    assert 0.015 < model.model.layers[0].mlp.up_proj.weight.std() < 0.025  # initializer_range is 0.02


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path), {"intermediate_size": 2 * SIZES["intermediate_size"]})
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|ignore_mismatched_sizes|has shape"):
        opened(folder, "int8")


@pytest.mark.parametrize("scheme", ["int4", exhaustive("int8"), exhaustive("w8a8")])
def test_a_compiled_forward_and_a_static_cache(scheme: str, folder: Path) -> None:
    model = opened(folder, scheme)
    expected = logits(model)
    assert model.hf_quantizer.is_compileable
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
    assert_close(found, expected)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(IDS, **options))


def test_copies_compute_the_same(folder: Path) -> None:
    model = opened(folder, "int4")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_dtype_rounds_the_scales(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = opened(saved(tmp_path, torch.bfloat16), scheme, dtype=torch.bfloat16)
    before = {name: layer.weight for name, layer in quantized(model).items()}
    expected = logits(model)
    for target in (dtype, torch.bfloat16):  # there and back
        model.to(target)
        for name, layer in quantized(model).items():
            assert layer.scales.dtype == torch.float32
            assert torch.equal(layer.weight, before[name])
        found = logits(model)
        assert found.dtype == target
        assert_close(found, expected, bound=5e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_gives_plain_layers(scheme: str, tmp_path: Path) -> None:
    model = opened(saved(tmp_path, attention_bias=True, mlp_bias=True), scheme)
    before = {name: layer.weight for name, layer in quantized(model).items()}
    biases = {name: layer.bias for name, layer in quantized(model).items()}
    model.dequantize()
    assert all(torch.equal(model.get_submodule(name).bias, bias) for name, bias in biases.items())
    assert not quantized(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())
    assert all(type(model.get_submodule(name)) is nn.Linear for name in before)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    model(IDS, labels=IDS).loss.backward()  # it can be trained, too


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_refused(scheme: str, folder: Path) -> None:
    model = opened(folder, scheme)
    assert not model.hf_quantizer.is_trainable
    for each in (model.train(), model.eval()):
        with pytest.raises(RuntimeError, match=r"x requires grad, and op .* has no backward: call it under"):
            each(IDS)
    model.requires_grad_(False)
    assert torch.equal(model(IDS).logits, logits(model))


def test_peft_names_the_layers_that_it_cannot_adapt(folder: Path) -> None:
    model = opened(folder, "int4")
    with pytest.raises(ValueError, match=r"Target module HfInt4Linear\(.*\) is not supported"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    expected = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert torch.equal(logits(adapted), expected)  # its B begins as 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_that_the_class_keeps_in_fp32_are_not_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    """T5's forward reads the dtype of its weights: here of wo."""
    sizes = {"vocab_size": 64, "d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4, "d_kv": 16}
    kind = transformers.T5ForConditionalGeneration
    kind(transformers.T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path)
    config = fastllama.FastLlamaConfig("int8")
    model = kind.from_pretrained(tmp_path, quantization_config=config, dtype=dtype).eval()
    assert {name.rpartition(".")[2] for name in quantized(model)} == {"q", "k", "v", "o", "wi"}
    with torch.no_grad():
        found = model(input_ids=IDS[:, :5] % 64, decoder_input_ids=IDS[:, :4] % 64).logits
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
def test_float64_is_refused_by_name_too(dtype: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is (torch\.)?float64; legal beside a FastLlamaConfig: torch.float32"):
        opened(folder, "int4", dtype=dtype)


def test_a_finder_that_keeps_transformers_out() -> None:
    done = run(
        "import sys, fastllama\n"
        "class Finder:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name == 'transformers': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "fastllama.patch\n"
    )
    assert "needs 'transformers', which is not installed: pip install 'fastllama[hf]'" in done.stderr
