"""An adapter that does not fit its base, or would be merged in part, is refused by the file's name and the key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from fastllama.io.save import save_model
from tests.io.adapters import Q, base_in, edit_config, edit_weights, trained
from tests.io.checkpoints import random_llama


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter of it."""
    folder = tmp_path_factory.mktemp("good")
    base_in(folder / "base")
    trained(random_llama(), folder / "adapter")
    return folder


@pytest.fixture
def base(good: Path) -> Path:
    return good / "base"


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "adapter", tmp_path / "adapter"))


Spoil = Callable[[Path], object]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    return lambda adapter: edit_weights(adapter, change)


def config(**changes: object) -> Spoil:
    return lambda adapter: edit_config(adapter, **changes)


def nested(*names: str) -> Spoil:
    def spoil(adapter: Path) -> None:
        for name in names:
            (adapter / name).mkdir()
            shutil.copy(adapter / "adapter_config.json", adapter / name)
        (adapter / "adapter_config.json").unlink()

    return spoil


OTHER = Q.replace("q_proj", "o_proj")
POINTER = "version https://git-lfs.github.com/spec/v1\n"
ONES = torch.ones(2)
WRONG: dict[str, tuple[Spoil, str]] = {
    "DoRA": (config(use_dora=True), r"adapter_config.json: use_dora is true \(DoRA\), which cannot be merged here"),
    "bias of LoRA": (config(lora_bias=True), "lora_bias is true"),
    "activated LoRA": (config(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens is a list \(activated LoRA"),
    "Megatron": (config(megatron_config={"a": 1}), "megatron_config is an object"),
    "trained tokens": (config(trainable_token_indices=[3]), r"trainable_token_indices is a list \(single trained"),
    "repeated layers": (config(layer_replication=[[0, 2]]), "layer_replication is a list"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which also changed the base; convert it"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'; legal: 'LORA'"),
    "no method": (config(peft_type=None), "peft_type is null; legal: 'LORA'"),
    "no target": (config(target_modules=[]), "adapter_config.json: target_modules names no module of the base"),
    "a target that is no expression's": (config(target_modules="all_linear"), "target_modules names no module of the"),
    "layers no numbers": (config(layers_to_transform="0"), "layers_to_transform is '0'; legal: a layer's number"),
    "pattern of layers no text": (
        config(layers_pattern=2, layers_to_transform=[0]),
        "layers_pattern is 2; legal: a list",
    ),
    "alpha NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan; legal: a number"),
    "MLX": (
        lambda adapter: (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors"),
        "holds adapters.safetensors, as MLX writes it; expected PEFT's adapter_model.safetensors",
    ),
    "another adapter below": (
        lambda adapter: shutil.copytree(adapter, adapter / "other"),
        "holds several adapters, its own and other; give a folder with one",
    ),
    "escape codes": (
        weights(lambda w: w.update({"\x1b[31mred\n": ONES})),
        r"tensor \\x1b\[31mred\\n is no part of a plain LoRA",
    ),
    "rank no number": (config(r="8"), "r is '8'; legal: an integer of at least 1"),
    "rank 0": (config(r=0), "r is 0; legal: an integer of at least 1"),
    "alpha null": (config(lora_alpha=None), "lora_alpha is null; legal: a number"),
    "pattern of words": (
        config(rank_pattern={"q_proj": "4"}),
        "rank_pattern of .q_proj. is .4.; legal: a number of at least 1",
    ),
    "broken expression": (
        config(target_modules="(q_proj"),
        r"target_modules is '\(q_proj'; legal: a regular expression",
    ),
    "modules no list": (config(target_modules=3), "target_modules is 3; legal: a list of module names, or a pattern"),
    "rank of the settings": (config(r=8), r"lora_A.weight has shape \[4, 64\], expected rank 8 by adapter_config.json"),
    "target without tensors": (
        config(target_modules=["q_proj", "v_proj", "up_proj"]),
        "holds no lora_A and lora_B of model.layers.0.mlp.up_proj, which adapter_config.json names as a target; was",
    ),
    "target in one layer without tensors": (
        config(target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[1]),
        "holds no lora_A and lora_B of model.layers.1.mlp.up_proj, which adapter_config.json names as a target; was",
    ),
    "saved module without tensors": (
        config(modules_to_save=["lm_head"]),
        "holds no weight of lm_head, one of modules_t",
    ),
    "half of a pair": (weights(lambda w: w.pop(f"{Q}.lora_B.weight")), rf"tensor {Q}.lora_A.weight has no lora_B bes"),
    "other half": (weights(lambda w: w.pop(f"{Q}.lora_A.weight")), rf"tensor {Q}.lora_B.weight has no lora_A beside"),
    "NaN": (
        weights(lambda w: w[f"{Q}.lora_B.weight"].fill_(float("nan"))),
        f"adapter_model.safetensors: tensor {Q}.lora_B.weight holds NaN or infinity",
    ),
    "integers": (
        weights(lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(64, 4, dtype=torch.int8)})),
        r"lora_B.weight has dtype torch.int8, expected float32, bfloat16 or float16",
    ),
    "overflow": (
        weights(lambda w: [w[f"{Q}.lora_{part}.weight"].fill_(3e38) for part in "AB"]),
        f"merging {Q}.lora_A.weight and {Q}.lora_B.weight into model.layers.0.self_attn.q_proj.weight gives NaN",
    ),
    "shape": (
        weights(lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(65, 4)})),
        r"make \[65, 64\], but model.layers.0.self_attn.q_proj.weight of the base has shape \[64, 64\]; was",
    ),
    "unknown module": (
        weights(lambda w: w.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})),
        "is for model.layers.9.mlp.up_proj.weight, which the base does not have",
    ),
    "extra tensor": (
        weights(lambda w: w.update(extra=ONES)),
        "tensor extra is no part of a plain LoRA; expected base_",
    ),
    "magnitudes of DoRA": (
        weights(lambda w: w.update({f"{Q}.lora_magnitude_vector": ONES})),
        "lora_magnitude_vector is no part of a plain LoRA",
    ),
    "two adapters in one file": (
        weights(
            lambda w: w.update(
                {f"{OTHER}.lora_A.one.weight": torch.ones(4, 64), f"{OTHER}.lora_B.two.weight": torch.ones(4, 64)}
            )
        ),
        r"is of a second adapter \(one, two\); one is merged",
    ),
    "two adapters, one without a name": (
        weights(lambda w: w.update({f"{Q}.lora_A.one.weight": torch.ones(4, 64)})),
        r"is the same part as base_model\..*; one adapter is merged",
    ),
    "embedding's kind on a layer": (
        weights(lambda w: w.update({f"{Q}.lora_embedding_A": torch.ones(4, 64)})),
        "is for the other kind of layer",
    ),
    "a number in place of a matrix": (
        weights(lambda w: w.update({"base_model.model.lm_head.weight": torch.tensor(1.0)})),
        "lm_head.weight is a single number, expected a vector or a matrix",
    ),
    "replaced by another shape": (
        weights(lambda w: w.update({"base_model.model.model.norm.weight": torch.ones(3)})),
        r"adapter_model.safetensors: tensor model.norm.weight has shape \[3\], expected \[64\]",
    ),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "LFS pointer": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_text(POINTER),
        "adapter_model.safetensors is a Git LFS pointer",
    ),
    "settings no JSON": (
        lambda adapter: (adapter / "adapter_config.json").write_text("{"),
        "adapter_config.json is not",
    ),
    "several adapters": (nested("first", "second"), r"holds 2 adapters \(first, second\); give .*/adapter/first"),
    "nothing": (
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        "holds no adapter_config.json; expected the",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_is_not_plain_lora_of_the_base_is_refused_by_name(base: Path, adapter: Path, name: str) -> None:
    spoil, message = WRONG[name]
    spoil(adapter)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as raised:
        load_model(base, adapter=adapter, progress=False)
    assert str(adapter) in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_lora_on_one_matrix_of_a_tied_model_is_refused(tmp_path: Path, module: str) -> None:
    base = base_in(tmp_path / "base", tied=True)
    adapter = trained(random_llama(tied=True), tmp_path / "adapter", target_modules=["q_proj", module])
    with pytest.raises(CheckpointError, match="would change head and embedding, which are one matrix in the base"):
        load_model(base, adapter=adapter, progress=False)


def test_a_missing_adapter_is_reported(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter is '\./nowhere', but no such"):
        load_model(base, adapter="./nowhere", progress=False)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is a safetensors file; give"):
        load_model(base, adapter=adapter / "adapter_model.safetensors", progress=False)
    with pytest.raises(CheckpointError, match="is an adapter itself; give its base as model beside adapter"):
        load_model(adapter, adapter=adapter, progress=False)
    with pytest.raises(CheckpointError, match="is an adapter and no model; give its base"):
        open_checkpoint(adapter)
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="base_model_name_or_path is null; give the base as model"):
        load_model(adapter, progress=False)
    edit_config(adapter, base_model_name_or_path="./gone")
    with pytest.raises(FileNotFoundError, match=r"base_model_name_or_path is '\./gone', but no such"):
        load_model(adapter, progress=False)


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_a_base_that_is_quantized_is_refused(base: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    save_model(load_model(base, quantization=kind), tmp_path / "quantized")
    with pytest.raises(
        CheckpointError, match=rf"quantized has weights in {kind}, and an adapter is merged before weig"
    ):
        load_model(tmp_path / "quantized", adapter=adapter)
