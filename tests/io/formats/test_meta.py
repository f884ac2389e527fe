"""Meta's folders: 1, 2 and 8 files merge into the tensors that transformers has for the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.formats.meta import half_split
from fastllama.layers.config import LlamaConfig, RopeScaling
from tests.io.checkpoints import SHAPES, hf_state, interleaved, random_llama, write_meta


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("kv_heads", [16, 8])
def test_files_merge_bit_for_bit(tmp_path: Path, kv_heads: int, shards: int) -> None:
    model = random_llama(kv_heads=kv_heads, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_meta(model, tmp_path / "meta", shards=shards))
    found, expected = dict(checkpoint.tensors()), hf_state(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert checkpoint.config == LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=kv_heads,
        head_dim=4,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_half_split_undoes_metas_order(heads: int) -> None:
    weight = torch.randn(heads * 6, 5)
    assert torch.equal(half_split(interleaved(weight, heads), heads, "w"), weight)
    assert not torch.equal(half_split(weight, heads, "w"), weight)


@pytest.mark.parametrize("shape", [(9, 4), (8,)])
def test_half_split_needs_even_heads(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=rf"^w has shape \[{shape[0]}"):
        half_split(torch.zeros(shape), 2, "w")


def edit(path: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = {name: tensor.clone() for name, tensor in torch.load(path / file).items()}
    change(state)
    torch.save(state, path / file)


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


SECOND = "consolidated.01.pth"
WQ = "layers.0.attention.wq.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "first file missing": (
        lambda path: (path / "consolidated.00.pth").unlink(),
        "consolidated.00.pth does not exist, but",
    ),
    "last file missing": (
        lambda path: (path / SECOND).unlink(),
        "hold 32 of the 64 columns of tensor tok_embeddings.weight; are all files there?",
    ),
    "all files missing": (lambda path: [file.unlink() for file in path.glob("*.pth")], "holds no consolidated.00.pth"),
    "truncated": (lambda path: truncate(path / SECOND), f"{SECOND} cannot be read as PyTorch weights"),
    "not in all": (lambda path: edit(path, SECOND, lambda s: s.pop(WQ)), f"{SECOND}: tensor {WQ} is not in all of"),
    "no embedding": (
        lambda path: [edit(path, file.name, lambda s: s.pop("tok_embeddings.weight")) for file in path.glob("*.pth")],
        "tensor tok_embeddings.weight is missing",
    ),
    "params truncated": (lambda path: truncate(path / "params.json"), "params.json is not valid JSON"),
    "params of another model": (
        lambda path: (path / "params.json").write_text(json.dumps({"dim": 64, "moe": {"num_experts": 8}})),
        "params.json: moe is {'num_experts': 8}; legal: none",
    ),
    "uneven parts": (
        lambda path: edit(path, SECOND, lambda s: s.update({WQ: torch.zeros(8, 64)})),
        f"tensor {WQ} has shapes [[32, 64], [8, 64]]",
    ),
    "odd rows": (
        lambda path: [
            edit(path, file.name, lambda s: s.update({WQ: torch.zeros(9, 64)})) for file in path.glob("*.pth")
        ],
        f"tensor {WQ} has shape [18, 64], expected a matrix whose rows make 16 even heads",
    ),
    "vectors": (
        lambda path: [
            edit(path, file.name, lambda s: s.update({"layers.0.attention.wo.weight": torch.zeros(9)}))
            for file in path.glob("*.pth")
        ],
        "tensor layers.0.attention.wo.weight has shape [9], expected a matrix",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = write_meta(random_llama(), tmp_path / "meta", shards=2)
    damage(path)
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        list(open_checkpoint(path).tensors())
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_an_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    path = write_meta(random_llama(), tmp_path / "meta")
    edit(path, "consolidated.00.pth", lambda state: state.update({"layers.0.attention.gate.weight": torch.zeros(1)}))
    assert "layers.0.attention.gate.weight" in dict(open_checkpoint(path).tensors())


def rows_instead(path: Path) -> Path:
    """Split the embedding by rows, as Llama 3's files are."""
    files = sorted(path.glob("consolidated.*.pth"))
    whole = torch.cat([torch.load(file)["tok_embeddings.weight"] for file in files], 1)
    for file, part in zip(files, whole.chunk(len(files)), strict=True):
        edit(path, file.name, lambda state, part=part: state.update({"tok_embeddings.weight": part.clone()}))
    return path


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_an_embedding_split_by_rows_merges_bit_for_bit(tmp_path: Path, shards: int) -> None:
    model = random_llama()
    checkpoint = open_checkpoint(rows_instead(write_meta(model, tmp_path / "meta", shards=shards)))
    found = dict(checkpoint.tensors())
    assert checkpoint.config.vocab_size == 40
    assert all(torch.equal(found[name], tensor) for name, tensor in hf_state(model).items())


def test_a_file_that_is_missing_of_rows_is_seen_by_the_vocabulary(tmp_path: Path) -> None:
    path = rows_instead(write_meta(random_llama(), tmp_path / "meta", shards=2))
    set_params(path, vocab_size=40)
    (path / SECOND).unlink()
    message = r"params.json: vocab_size is 40, but tensor tok_embeddings.weight has 20 rows; are all files there\?$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def set_params(path: Path, **params: object) -> None:
    file = path / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | params))


def test_frequencies_in_every_layer_are_recomputed(tmp_path: Path) -> None:
    """Llama 1's files hold them there."""
    path = write_meta(random_llama(), tmp_path / "meta", shards=2)
    extra = {f"layers.{i}.attention.inner_attention.rope.freqs": torch.rand(2) for i in range(2)}
    for file in path.glob("*.pth"):
        edit(path, file.name, lambda state: state.update(extra))
    assert dict(open_checkpoint(path).tensors()).keys() == hf_state(random_llama()).keys()


CONTEXTS: dict[str, tuple[dict[str, object], int, float | None]] = {
    "Llama 1": ({"norm_eps": 1e-6}, 2048, None),
    "Llama 2": ({"norm_eps": 1e-5}, 4096, None),
    "Code Llama": ({"rope_theta": 1e6}, 16384, None),
    "Llama 3": ({"rope_theta": 5e5, "use_scaled_rope": False}, 8192, None),
    "Llama 3.1": ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, 8.0),
}


@pytest.mark.parametrize(("params", "context", "factor"), CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_is_that_of_the_generation(
    tmp_path: Path, params: dict[str, object], context: int, factor: float | None
) -> None:
    path = write_meta(random_llama(), tmp_path / "meta")
    set_params(path, **params)
    config = open_checkpoint(path).config
    assert config.context_length == context
    expected = None if factor is None else RopeScaling("llama3", factor, 8192, 1.0, 4.0)
    assert config.rope_scaling == expected


def test_keys_that_are_not_known_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_meta(random_llama(), tmp_path / "meta")
    set_params(path, model_parallel_size=1, date="2023-07-18", quantization_args=None)
    open_checkpoint(path)
    assert caplog.messages == ["params.json: date, model_parallel_size is not used, no Llama of Meta's has such a key"]


META_KEYS = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"]
META_KEYS += ["rope_theta", "use_scaled_rope", "max_seq_len", "quantization_args", "lora_args"]


@pytest.mark.parametrize("key", META_KEYS)
@pytest.mark.parametrize("value", [None, True, 0, -3, 1.5, float("inf"), "many", [], [1], {}, {"a": 1}], ids=repr)
def test_a_wrong_value_in_params_json_is_named(tmp_path: Path, key: str, value: object) -> None:
    path = write_meta(random_llama(), tmp_path / "meta")
    set_params(path, **{key: value})
    trouble = refusal(path)
    assert trouble is None or key in trouble.removeprefix(f"{path / 'params.json'}: ")


def refusal(path: Path) -> str | None:
    """The error where a folder is opened, None where there is none."""
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None
