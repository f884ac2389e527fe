"""Facts that a Hugging Face folder states twice, and wrong ones: read as by transformers 5, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from fastllama.layers.weights import EMBEDDING, HEAD, hf_tensors, slots
from tests.io.checkpoints import random_llama

State = dict[str, Tensor]
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def states() -> dict[bool, tuple[dict[str, Any], State]]:
    """config.json and tensors of an untied and of a tied model."""
    return {tied: (random_llama(tied=tied).config.to_dict(), _state(tied)) for tied in (False, True)}


def _state(tied: bool) -> State:
    state = {name: tensor.clone() for name, tensor in random_llama(tied=tied).state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not (tied and name == HEAD)}


def write(path: Path, config: dict[str, Any], *shards: State) -> Path:
    """A folder of safetensors, in several files with an index where there are several."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, path / f"model-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def renamed(change: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {change(name): tensor for name, tensor in state.items()}


NAMES: dict[str, tuple[bool, Callable[[State], State]]] = {
    "as they are": (False, lambda state: state),
    "without model.": (False, renamed(lambda name: name.removeprefix("model."))),
    "without model., tied": (True, renamed(lambda name: name.removeprefix("model."))),
    "some without model.": (False, renamed(lambda name: name.removeprefix("model.") if ".0." in name else name)),
    "model. twice": (False, renamed(lambda name: f"model.{name}")),
    "model. twice, tied": (True, renamed(lambda name: f"model.{name}")),
    "tied, as lm_head": (True, renamed(lambda name: HEAD if name == EMBEDDING else name)),
    "tied, as model.lm_head": (True, renamed(lambda name: f"model.{HEAD}" if name == EMBEDDING else name)),
    "tied, as both": (True, lambda state: state | {HEAD: state[EMBEDDING].clone()}),
    "tied, as both, one rounded to bf16": (
        True,
        lambda state: {name: tensor.bfloat16() for name, tensor in state.items()} | {HEAD: state[EMBEDDING].bfloat16()},
    ),
    "declared tied, and is not": (True, lambda state: state | {HEAD: state[EMBEDDING] + 1}),
    "a value head": (False, lambda state: state | {"v_head.summary.weight": torch.ones(1, 64)}),
    "rotary tables": (False, lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
}


@pytest.mark.parametrize(("tied", "change"), NAMES.values(), ids=NAMES)
def test_weights_are_those_that_transformers_loads(
    tmp_path: Path, states: Any, tied: bool, change: Callable[[State], State]
) -> None:
    config, state = states[tied]
    path = write(tmp_path / "model", config, change(state))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = load_model(path, dtype="float32")
    assert (model.lm_head.weight is model.embed_tokens.weight) == (
        theirs.lm_head.weight is theirs.get_input_embeddings().weight
    )
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.embed_tokens.weight)
    expected = theirs.state_dict()
    for name, tensor in hf_tensors(model):
        assert torch.equal(tensor, expected[name]), name
    checkpoint = open_checkpoint(path)
    names = {name for name, _ in checkpoint.tensors()}
    assert names >= slots(model.config).keys(), "under these names, whichever are stored"
    assert all(checkpoint.file_of(name) == path / "model.safetensors" for name in names)


def test_a_head_of_its_own_is_logged(tmp_path: Path, states: Any, caplog: pytest.LogCaptureFixture) -> None:
    config, state = states[True]
    open_checkpoint(write(tmp_path / "model", config, state | {HEAD: state[EMBEDDING] + 1}))
    assert caplog.messages == [
        f"{tmp_path / 'model' / 'config.json'}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}: "
        "not tied, as in transformers"
    ]


def test_a_tensor_may_lie_in_two_shards(tmp_path: Path, states: Any) -> None:
    config, state = states[False]
    path = write(tmp_path / "model", config, state, {HEAD: state[HEAD].clone()})
    assert torch.equal(load_model(path).lm_head.weight, state[HEAD])
    path = write(tmp_path / "other", config, state, {HEAD: state[HEAD] + 1})
    with pytest.raises(CheckpointError, match=rf"model-1.safetensors: tensor {HEAD} appears twice, with different"):
        load_model(path)


@pytest.mark.parametrize("rows", [39, 48])
def test_rows_of_the_embedding_that_are_not_the_vocabulary_are_both_named(
    tmp_path: Path, states: Any, rows: int
) -> None:
    config, state = states[False]
    path = write(tmp_path / "model", config, state | {EMBEDDING: torch.ones(rows, 64)})
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    message = f"{EMBEDDING} has shape [{rows}, 64], expected [40, 64] by the configuration (vocab_size, hidden_size)"
    assert message in str(raised.value)


def test_a_buffer_does_not_give_the_dtype(tmp_path: Path, states: Any) -> None:
    config, state = states[False]
    half = {name: tensor.half() for name, tensor in state.items()} | {"a.rotary_emb.inv_freq": torch.ones(2)}
    assert open_checkpoint(write(tmp_path / "model", config | {"dtype": None}, half)).config.dtype == "float16"


ENDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {  # of generation_config.json (`...`: no file), of config.json
    "config.json alone": (..., 7, (7,)),
    "generation_config.json comes first": (9, 7, (9,)),
    "several": ([9, 8], 7, (9, 8)),
    "null": (None, 7, (7,)),
    "-1 among several": ([9, -1], 7, (9,)),
    "none in config.json": (..., None, ()),
    "-1 in config.json": (..., -1, ()),
    "beyond in config.json": (..., [7, 40], (7,)),
}


@pytest.mark.parametrize(("generation", "config", "expected"), ENDS.values(), ids=ENDS)
def test_answers_end_by_the_files(
    tmp_path: Path, states: Any, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    settings, state = states[False]
    path = write(tmp_path / "model", settings | {"eos_token_id": config}, state)
    if generation is not ...:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert open_checkpoint(path).config.eos_token_ids == expected


def test_an_end_beyond_the_vocabulary_is_refused_by_its_file(tmp_path: Path, states: Any) -> None:
    config, state = states[False]
    file = write(tmp_path / "model", config, state) / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 300]}))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(file.parent)
    assert str(raised.value) == (
        f"{file}: eos_token_id is 300, and config.json has vocab_size=40; legal: an id that the model has"
    )


@pytest.mark.parametrize("value", ["2", 2.0, True, {"id": 2}, [2, "3"], [[2]]])
def test_a_broken_id_is_named_by_its_own_file(tmp_path: Path, states: Any, value: Any) -> None:
    config, state = states[False]
    path = write(tmp_path / "model", config, state)
    file = path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert str(raised.value) == f"{file}: eos_token_id is {value!r}; legal: a token id, several of them, or null"


KEYS = ["model_type", "architectures", "hidden_act", "vocab_size", "hidden_size", "intermediate_size", "head_dim"]
KEYS += ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
KEYS += ["rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "tie_word_embeddings", "dtype"]
KEYS += ["attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "torch_dtype", "quantization_config"]
KEYS += ["original_max_position_embeddings", "per_layer_config"]
SETTINGS = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"]
SETTINGS += ["rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"]
VALUES = [None, True, 0, -3, 1.5, 10**400, float("inf"), "many", [], [1], {}, {"a": 1}]


def short(value: Any) -> str:
    return repr(value)[:12]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", VALUES, ids=short)
def test_a_wrong_value_in_config_json_is_named(tmp_path: Path, states: Any, key: str, value: Any) -> None:
    config, state = states[False]
    path = write(tmp_path / "model", config | {key: value}, state)
    trouble = refusal(path)
    if trouble is not None:
        assert trouble.startswith(f"{path / 'config.json'}: ")
        assert key in trouble.removeprefix(str(path))
        assert "; legal" in trouble or "; expected" in trouble or trouble.endswith(f"the configuration lacks {key}")


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("value", VALUES, ids=short)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_wrong_value_among_rope_settings_is_named(
    tmp_path: Path, states: Any, place: str, key: str, value: Any
) -> None:
    yarn = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "mscale": 1,
        "mscale_all_dim": 1,
    }
    config, state = states[False]
    config = {name: held for name, held in config.items() if name != "rope_parameters"}
    trouble = refusal(write(tmp_path / "model", config | {place: yarn | {key: value}}, state))
    assert trouble is None or f"config.json: {place}.{key} is " in trouble


def refusal(path: Path) -> str | None:
    """The error where a folder is opened, None where there is none."""
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None
