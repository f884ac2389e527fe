"""Models quantized by FastLlamaConfig, saved: compressed-tensors that open with and without this package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import fastllama
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.integrations.models import IDS, NEW_TOKENS, SIZES, assert_close, llama

LAYERS = 7 * SIZES["num_hidden_layers"]
# By the folder's name: what FastLlamaConfig gets, the model's sizes, and how it is saved.
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "int4": (("int4", 32), {"attention_bias": True, "mlp_bias": True}, {"max_shard_size": "20KB"}),
    "int4-mixed": (("int4", 128, ["k_proj", "q_proj", "v_proj"]), {"intermediate_size": 96}, {}),
    "int4-tied": (("int4", 64), {"tie_word_embeddings": True}, {}),
    "int8": (("int8",), {}, {}),
    "w8a8": (("w8a8",), {"tie_word_embeddings": True}, {"max_shard_size": "20KB"}),
}
# What anybody runs who has no fastllama: the logits of each folder named.
REOPEN = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "fastllama"]
"""


def opened(folder: Path, *given: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = fastllama.FastLlamaConfig(*given)
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layers(model: Any) -> dict[str, QuantizedWeight]:
    """Each quantized layer's weight, as it is kept, by the name of its tensor."""
    return {
        f"{name}.weight": each.quantized_rows(0, each.out_features)
        for name, each in model.named_modules()
        if isinstance(each, QuantizedLinear)
    }


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def reopen(*folders: Path) -> None:
    for folder in folders:
        torch.save(IDS, folder / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", REOPEN, *map(str, folders)], capture_output=True, text=True, check=False, cwd=folders[0]
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each case, and "NAME from" with what it was quantized from; all opened in one process."""
    root = tmp_path_factory.mktemp("saved")
    for name, (given, sizes, options) in CASES.items():
        stock = llama(torch.bfloat16, **sizes)
        stock.generation_config.temperature, stock.generation_config.do_sample = 0.5, True
        stock.save_pretrained(root / f"{name} from")
        opened(root / f"{name} from", *given).save_pretrained(root / name, **options)
    reopen(*(root / name for name in CASES))
    return root


@pytest.mark.parametrize("name", CASES)
def test_files_name_compressed_tensors_and_not_this_package(name: str, root: Path) -> None:
    folder = root / name
    given, sizes, options = CASES[name]
    for file in folder.glob("*.json"):
        assert "fastllama" not in file.read_text(encoding="utf-8")
    config = settings(folder)
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    weights = [group["weights"] for group in config["config_groups"].values()]
    assert {each["num_bits"] for each in weights} == {4 if given[0] == "int4" else 8}
    assert "lm_head" in config["ignore"]
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == bool(options)
    stored: set[str] = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            stored |= set(file.keys())
            assert file.metadata() == {"format": "pt"}
    assert not [each for each in stored if each.endswith((".packed", ".scales", ".zeros"))]
    assert sum(each.endswith("weight_scale") for each in stored) == (
        4 * LAYERS // 7 if name == "int4-mixed" else LAYERS
    )
    assert ("lm_head.weight" in stored) != sizes.get("tie_word_embeddings", False)
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["temperature"] == 0.5


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_computes_the_dequantized_model(name: str, root: Path) -> None:
    found = torch.load(root / name / "logits.pt")
    model = opened(root / f"{name} from", *CASES[name][0])
    if name == "w8a8":  # what is multiplied is rounded to 8 bits in both, each in its own order
        assert_close(found, logits(model), bound=5e-2)
        return
    assert torch.equal(found, logits(model.dequantize()))


@pytest.mark.parametrize("name", CASES)
def test_load_model_and_llm_have_the_same_values(name: str, root: Path) -> None:
    expected = layers(opened(root / f"{name} from", *CASES[name][0]))
    model = fastllama.load_model(root / name)
    assert model.dtype == torch.bfloat16
    found = {key: get() for key, get in kept_tensors(model)}
    quantized = {key: weight for key, weight in found.items() if isinstance(weight, QuantizedWeight)}
    assert quantized.keys() == expected.keys()
    for key, weight in quantized.items():
        assert weight.form == expected[key].form
        assert weight.equals(expected[key])
    prompts = IDS.tolist()
    params = fastllama.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    tokens = []
    for given in (root / name, model):
        with fastllama.LLM(given, kv_cache_tokens=256, max_model_len=64) as llm:
            tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert tokens[0] == tokens[1]


def test_each_model_describes_itself(root: Path, tmp_path: Path) -> None:
    """A config object that two models share keeps the user's values; each model's own config describes that model."""
    config = fastllama.FastLlamaConfig("int4")
    before = config.to_dict()
    llama(intermediate_size=128).save_pretrained(tmp_path / "whole rows")  # of down_proj; others have groups of 32
    models = [
        transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
        for folder in (root / "int4-mixed from", tmp_path / "whole rows")
    ]
    assert config.to_dict() == before
    described = [model.config.to_dict()["quantization_config"] for model in models]
    assert described[0] != described[1]
    for model, expected in zip(models, described, strict=True):
        model.save_pretrained(tmp_path / "saved")
        assert settings(tmp_path / "saved") == expected


def test_what_changed_since_loading_is_saved_as_it_is(root: Path, tmp_path: Path) -> None:
    """A layer that is plain again, another dtype, a copy, and a model that `patch` runs."""
    model = copy.deepcopy(opened(root / "int4 from", "int4", 32))
    plain = copy.deepcopy(model).dequantize()
    model.model.layers[0].mlp.up_proj = plain.model.layers[0].mlp.up_proj
    expected = layers(model)
    assert len(expected) == LAYERS - 1
    fastllama.patch(model, strict=True)
    model.save_pretrained(tmp_path)
    assert settings(tmp_path)["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    reopen(tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(plain))


def test_a_model_can_be_dequantized_after_it_was_saved(root: Path, tmp_path: Path) -> None:
    model = opened(root / "int8 from", "int8")
    expected = logits(copy.deepcopy(model).dequantize())
    model.save_pretrained(tmp_path / "quantized")
    model.dequantize()
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text(encoding="utf-8")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(logits(again), expected)


def test_a_quantized_folder_is_not_quantized_again(root: Path) -> None:
    with pytest.raises(
        ValueError, match="quantized with CompressedTensorsConfig but you are passing a FastLlamaConfig"
    ):
        opened(root / "int8", "int4")


REOPEN_BODY = """
import sys, torch, transformers
model, report = transformers.AutoModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    torch.save(model(torch.load(f"{sys.argv[1]}/ids.pt"))[0], f"{sys.argv[1]}/hidden.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "fastllama"]
"""


def test_the_body_is_saved_for_itself(root: Path, tmp_path: Path) -> None:
    model = opened(root / "int8 from", "int8")
    model.model.save_pretrained(tmp_path)
    torch.save(IDS, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", REOPEN_BODY, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    plain = copy.deepcopy(model).dequantize()
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "hidden.pt"), plain.model(IDS)[0])
    assert model.config.quantization_config is not None
    model.save_pretrained(tmp_path / "whole")
    assert settings(tmp_path / "whole") == settings(root / "int8")
    plain.model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text(encoding="utf-8")
