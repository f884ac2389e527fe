"""Hugging Face folders: every layout reads as the same tensors, every damage is one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.formats.hf import HfCheckpoint
from fastllama.layers.config import LlamaConfig, RopeScaling
from tests.io.checkpoints import SHAPES, hf_state, random_llama, write_hf_bin

Q = "model.layers.1.self_attn.q_proj.weight"


def assert_reads_as(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = dict(open_checkpoint(path).tensors())
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "single"
    random_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "sharded"
    random_llama().save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint, to be damaged."""
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", SHAPES.values(), ids=SHAPES)
def test_what_transformers_saves_reads_bit_for_bit(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    model = random_llama(kv_heads=kv_heads, tied=tied, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_reads_as(tmp_path, hf_state(model))
    assert open_checkpoint(tmp_path).config == LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=kv_heads,
        head_dim=4,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("place", ["./", "weights/", "./weights/deep/"])
def test_an_index_may_name_files_in_folders_below(sharded: Path, copy: Callable[[Path], Path], place: str) -> None:
    path = copy(sharded)
    (path / place).mkdir(parents=True, exist_ok=True)
    for file in path.glob("*.safetensors"):
        file.rename(path / place / file.name)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: f"{place}{file}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    whole, moved = dict(open_checkpoint(sharded).tensors()), dict(open_checkpoint(path).tensors())
    assert whole.keys() == moved.keys()
    assert all(torch.equal(whole[name], moved[name]) for name in whole)


def test_shards_read_bit_for_bit(sharded: Path) -> None:
    assert_reads_as(sharded, hf_state(random_llama()))


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_bin_reads_bit_for_bit(tmp_path: Path, shards: int) -> None:
    model = random_llama()
    assert_reads_as(write_hf_bin(model, tmp_path / "bin", shards=shards), hf_state(model))


def test_safetensors_come_before_bin(single: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(single)
    (path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_reads_as(path, hf_state(random_llama()))


def test_a_file_is_named_for_every_tensor(single: Path, sharded: Path) -> None:
    assert HfCheckpoint(single).file_of(Q) == single / "model.safetensors"
    checkpoint = HfCheckpoint(sharded)
    assert Q in load_file(checkpoint.file_of(Q))
    assert checkpoint.file_of("nowhere") == sharded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_config_without_dtype_takes_that_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    random_llama(dtype=dtype).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"torch.{open_checkpoint(tmp_path).config.dtype}" == str(dtype)


def test_weights_in_a_dtype_nothing_runs_in_leave_it_open(tmp_path: Path) -> None:
    path = write_hf_bin(random_llama(dtype=torch.float64), tmp_path / "bin")
    edit_config(path, dtype=None)
    assert open_checkpoint(path).config.dtype is None


def test_rope_scaling_is_read_as_transformers_5_writes_it(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    random_llama(rope_parameters=rope).save_pretrained(tmp_path)
    config = open_checkpoint(tmp_path).config
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


def test_generation_stops_by_generation_config(single: Path, copy: Callable[[Path], Path]) -> None:
    path = copy(single)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert open_checkpoint(path).config.eos_token_ids == (2, 9)


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_index(path: Path, **changes: object) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))


def truncate(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "holds no weights; expected one of model.safetens",
    ),
    "truncated weights": (lambda path: truncate(path / "model.safetensors", 0.9), "is not a complete safetensors file"),
    "truncated header": (
        lambda path: truncate(path / "model.safetensors", 0.001),
        "is not a complete safetensors file",
    ),
    "empty weights": (lambda path: truncate(path / "model.safetensors", 0), "model.safetensors is empty"),
    "truncated config": (lambda path: truncate(path / "config.json", 0.5), "config.json is not valid JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "holds a list, expected a JSON object"),
    "config is binary": (
        lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is UTF-16 text; save it as UTF-8",
    ),
    "other model": (
        lambda path: edit_config(path, model_type="mistral"),
        "config.json: model_type is 'mistral'",
    ),
    "wrong type": (
        lambda path: edit_config(path, vocab_size="40"),
        "config.json: vocab_size is '40'; legal: an integer",
    ),
    "quantized": (lambda path: edit_config(path, quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_when_opened(
    single: Path, copy: Callable[[Path], Path], damage: Callable[[Path], object], message: str
) -> None:
    path = copy(single)
    damage(path)
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        open_checkpoint(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda path: edit_index(path, **{Q: "model-9.safetensors"}), f"has tensor {Q} in it; download"),
    "escaping shard": (
        lambda path: edit_index(path, **{Q: "../model.safetensors"}),
        "expected a .safetensors file",
    ),
    "foreign shard": (
        lambda path: edit_index(path, **{Q: "config.json"}),
        "expected a .safetensors file in its folder",
    ),
    "shard is no name": (lambda path: edit_index(path, **{Q: 3}), f"tensor {Q} is in 3, expected a .safetensors file"),
    "no map": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "truncated index": (lambda path: truncate(path / "model.safetensors.index.json", 0.5), "is not valid JSON"),
    "truncated shard": (
        lambda path: truncate(sorted(path.glob("*.safetensors"))[1], 0.5),
        "is not a complete safetens",
    ),
}


@pytest.mark.parametrize(("damage", "message"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused_when_opened(
    sharded: Path, copy: Callable[[Path], Path], damage: Callable[[Path], object], message: str
) -> None:
    path = copy(sharded)
    damage(path)
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        open_checkpoint(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


class Pickled:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_pytorch_bin_is_not_run(tmp_path: Path) -> None:
    path = write_hf_bin(random_llama(), tmp_path / "bin")
    torch.save({Q: Pickled(tmp_path / "touched")}, path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin holds Python objects \(getattr\); only tensors are read"
    ):
        list(open_checkpoint(path).tensors())
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 cut off", "is a zip archive"),
        (pickle.dumps({"a": 1}), "is a Python pickle"),
    ],
)
def test_a_broken_pytorch_bin_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_hf_bin(random_llama(), tmp_path / "bin")
    (path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        list(open_checkpoint(path).tensors())


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"step": 3}, {1: torch.zeros(1)}])
def test_a_pytorch_bin_must_be_a_state_dict(tmp_path: Path, content: object) -> None:
    path = write_hf_bin(random_llama(), tmp_path / "bin")
    torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a plain dictionary of tensors"):
        list(open_checkpoint(path).tensors())


def test_a_folder_without_any_configuration_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds neither config.json \(Hugging Face\) nor params.json \(Meta\)"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        open_checkpoint(tmp_path / "nothing")
