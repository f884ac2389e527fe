"""LoRA adapters are merged as peft merges them, bit for bit, whatever format their base has."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastllama.io.adapter import base_of, is_adapter, locate
from fastllama.io.load import load_model, open_model
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.weights import hf_tensors
from tests.io.adapters import LINEAR, base_in, edit_config, edit_weights, merged, peft, trained
from tests.io.checkpoints import random_llama, write_hf_bin, write_llama2c, write_meta


def check_against_peft(base: Path, adapter: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    expected = merged(base, adapter, dtype)
    ours = load_model(base, adapter=adapter, dtype=dtype, progress=False)
    state = expected.state_dict()
    for name, tensor in hf_tensors(ours):
        assert torch.equal(tensor, state[name].to(dtype)), name
    assert ours.config.tie_word_embeddings == expected.config.tie_word_embeddings
    return ours


SETTINGS: dict[str, dict[str, Any]] = {
    "q and v": {},
    "all linear": {"target_modules": "all-linear"},
    "every layer by name": {"target_modules": LINEAR},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 1, "model.layers.0.mlp.down_proj": 32},
    },
    "patterns and rslora": {"rank_pattern": {"v_proj": 9}, "use_rslora": True},
    "an expression": {"target_modules": r".*\.(0|1)\.self_attn\.(k|o)_proj"},
    "one layer": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "one layer as a number": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"target_modules": LINEAR, "exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]},
    "fan_in_fan_out, which peft ignores": {"fan_in_fan_out": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head replaced": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms replaced": {"modules_to_save": ["norm", "input_layernorm"]},
    "a layer replaced": {"modules_to_save": ["o_proj"]},
    "all of a block's MLP replaced": {"modules_to_save": ["mlp"]},
    "attention of one layer replaced": {"target_modules": ["up_proj"], "modules_to_save": ["layers.1.self_attn"]},
    "embeddings stored as peft does after a resize": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "save_embedding_layers": True,
    },
    "embeddings stored untouched": {"save_embedding_layers": True},
    "an embedding replaced, both stored": {"modules_to_save": ["embed_tokens"], "save_embedding_layers": True},
    "an embedding with factors, stored": {
        "target_modules": ["q_proj", "embed_tokens"],
        "save_embedding_layers": True,
    },
    "no scale, a negative one": {"alpha_pattern": {"q_proj": 0, "v_proj": -3}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.in_turn("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_are_those_that_peft_merges(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base = base_in(tmp_path / "base")
    check_against_peft(base, trained(random_llama(), tmp_path / "adapter", **SETTINGS[name]), dtype)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_the_bases(tmp_path: Path, bias: str) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    base = base_in(tmp_path / "base", **biases)
    adapter = trained(random_llama(**biases), tmp_path / "adapter", bias=bias)
    check_against_peft(base, adapter, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_in_bf16_on_a_base_in_bf16(tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_in(tmp_path / "base", dtype=torch.bfloat16)
    adapter = trained(random_llama(dtype=torch.bfloat16), tmp_path / "adapter", target_modules=LINEAR)
    edit_weights(adapter, lambda weights: weights.update({k: v.to(torch.bfloat16) for k, v in weights.items()}))
    check_against_peft(base, adapter, dtype)


@pytest.mark.parametrize(
    "saved", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"], ["norm"]], ids=lambda saved: "+".join(saved)
)
def test_a_tied_model_is_untied_where_its_matrices_part(tmp_path: Path, saved: list[str]) -> None:
    base = base_in(tmp_path / "base", tied=True)
    ours = check_against_peft(
        base, trained(random_llama(tied=True), tmp_path / "adapter", modules_to_save=saved), torch.float32
    )
    assert ours.config.tie_word_embeddings == (saved == ["norm"])


def test_a_tied_model_whose_embedding_and_head_were_trained_as_one_stays_tied(tmp_path: Path) -> None:
    """The one matrix may be stored once, which peft does not read."""
    base = base_in(tmp_path / "base", tied=True)
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = trained(random_llama(tied=True), tmp_path / "adapter", **settings)
    both = check_against_peft(base, adapter, torch.float32)
    assert both.config.tie_word_embeddings
    edit_weights(adapter, lambda weights: weights.pop("base_model.model.lm_head.weight"))
    assert same(load_model(base, adapter=adapter, progress=False), both)


def test_target_modules_select_which_factors_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_in(tmp_path / "base")
    adapter = trained(random_llama(), tmp_path / "adapter", target_modules=LINEAR)
    edit_config(adapter, target_modules=["q_proj", "up_proj"], r=4)
    check_against_peft(base, adapter, torch.float32)
    assert (
        "10 modules of the adapter are not used, as target_modules does not name them: model.layers.0." in caplog.text
    )


def test_rank_and_alpha_that_are_absent_are_pefts(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    adapter = trained(random_llama(), tmp_path / "adapter", r=8, lora_alpha=8)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["r"], config["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check_against_peft(base, adapter, torch.float32)


def test_an_adapter_beside_a_whole_model_is_merged_into_its_base_as_transformers_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_in(tmp_path / "base")
    adapter = trained(random_llama(), tmp_path / "adapter")
    edit_config(adapter, base_model_name_or_path=str(base))
    alone = load_model(adapter, progress=False)
    random_llama().save_pretrained(adapter)
    assert is_adapter(adapter)
    assert same(load_model(adapter, progress=False), alone)
    assert "is read as an adapter of its base, as in transformers" in caplog.text
    (adapter / "adapter_model.safetensors").unlink()
    assert not is_adapter(adapter), "a whole model that an adapter's settings were left with"


def test_the_logits_are_those_of_the_unmerged_model(tmp_path: Path) -> None:
    """Within 64 fp32 roundings of the largest logit: unmerged adds B (A x) to W x, merged is (W + B A) x."""
    base, settings = base_in(tmp_path / "base"), {"target_modules": LINEAR}
    adapter = trained(random_llama(), tmp_path / "adapter", **settings)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        plain = model(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unmerged = peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits
        ours = merged(base, adapter, torch.float32)
        ours.load_state_dict(dict(hf_tensors(load_model(base, adapter=adapter, progress=False))))
        logits = ours(ids).logits
    assert (logits - unmerged).abs().max() <= 64 * torch.finfo(torch.float32).eps * unmerged.abs().max()
    assert (plain - unmerged).abs().max() > 0.1 * unmerged.abs().max(), "the adapter does something"


def test_every_tensor_is_the_sum_written_by_hand(tmp_path: Path) -> None:
    """W + alpha / r * B A in fp64, within fp32's rounding of rank + 2 sums."""
    base, adapter = base_in(tmp_path / "base"), trained(random_llama(), tmp_path / "adapter", target_modules=LINEAR)
    before, factors = random_llama().state_dict(), load_file(adapter / "adapter_model.safetensors")
    for name, tensor in hf_tensors(load_model(base, adapter=adapter, progress=False)):
        module, weight = f"base_model.model.{name.removesuffix('.weight')}", before[name].double()
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.lora_{part}.weight"].double() for part in "AB")
            weight = weight + 6 / 4 * (b @ a)
        assert (tensor - weight).abs().max() <= 6 * torch.finfo(torch.float32).eps * weight.abs().max(), name


FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "bin": write_hf_bin,
    "shards": lambda model, path: write_hf_bin(model, path, shards=3),
    "meta": write_meta,
    "meta shards": lambda model, path: write_meta(model, path, shards=4),
    "llama2c": lambda model, path: write_llama2c(model, path, version=1),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_a_base_takes_an_adapter(tmp_path: Path, form: str) -> None:
    adapter = trained(random_llama(), tmp_path / "adapter", target_modules=[*LINEAR, "embed_tokens", "lm_head"])
    base = FORMATS[form](random_llama(), tmp_path / "base")
    expected = merged(base_in(tmp_path / "hf"), adapter, torch.float32).state_dict()
    for name, tensor in hf_tensors(load_model(base, adapter=adapter, progress=False)):
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_in(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(random_llama(), tmp_path / "adapter")


def same(ours: LlamaForCausalLM, theirs: LlamaForCausalLM) -> bool:
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(hf_tensors(ours), hf_tensors(theirs), strict=True))


def test_names_with_the_adapters_name_in_them_are_the_same(base: Path, adapter: Path) -> None:
    expected = load_model(base, adapter=adapter, progress=False)
    edit_weights(adapter, lambda weights: rename(weights, lambda key: key.replace(".weight", ".default.weight")))
    assert same(load_model(base, adapter=adapter, progress=False), expected)


def rename(weights: dict[str, torch.Tensor], to: Callable[[str], str]) -> None:
    for key in [*weights]:
        weights[to(key)] = weights.pop(key)


def test_weights_in_a_bin_are_read_without_running_code(base: Path, adapter: Path) -> None:
    expected = load_model(base, adapter=adapter, progress=False)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert same(load_model(base, adapter=adapter, progress=False), expected)


@pytest.mark.parametrize("place", ["absolute", "from here", "beside the adapter"])
def test_an_adapter_finds_its_base(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = load_model(base, adapter=adapter, progress=False)
    name = {"absolute": str(base), "from here": "base", "beside the adapter": "../base"}[place]
    monkeypatch.chdir(tmp_path if place == "from here" else "/")
    edit_config(adapter, base_model_name_or_path=name, revision="v1" if place == "from here" else None)
    assert same(load_model(adapter, progress=False), expected)
    assert is_adapter(adapter)
    assert not is_adapter(base)
    assert locate(base, None) == (base, None)


def test_an_adapter_names_a_base_on_the_hub_with_its_revision(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr("fastllama.io.adapter.resolve_model", lambda name: asked.append(name) or tmp_path)
    edit_config(adapter, base_model_name_or_path="owner/name", revision="v1")
    assert base_of(adapter) == tmp_path
    edit_config(adapter, base_model_name_or_path="owner/name", revision=None)
    assert base_of(adapter) == tmp_path
    assert asked == ["owner/name@v1", "owner/name"]


def test_what_verify_compares_the_model_with_is_merged_too(adapter: Path, base: Path) -> None:
    edit_config(adapter, base_model_name_or_path=str(base))
    checkpoint, dtype = open_model(adapter)
    state = dict(hf_tensors(load_model(adapter, progress=False)))
    assert dtype == torch.float32
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoint.tensors() if name in state)


def test_an_embedding_and_a_head_trained_with_more_tokens_bring_the_vocabulary(base: Path, adapter: Path) -> None:
    new = {f"base_model.model.{name}.weight": torch.randn(43, 64) for name in ("model.embed_tokens", "lm_head")}
    edit_weights(adapter, lambda weights: weights.update(new))
    edit_config(adapter, modules_to_save=["embed_tokens", "lm_head"])
    model = load_model(base, adapter=adapter, progress=False)
    assert model.config.vocab_size == 43
    assert torch.equal(model.lm_head.weight, new["base_model.model.lm_head.weight"])


def test_quantizing_sees_the_merged_weights(base: Path, adapter: Path) -> None:
    """The base is not read again: a merged model differs from its base wherever it is looked at."""
    merged_model, plain = load_model(base, adapter=adapter, progress=False), load_model(base, progress=False)
    assert not torch.equal(merged_model.layers[0].self_attn.qkv_proj.weight, plain.layers[0].self_attn.qkv_proj.weight)
