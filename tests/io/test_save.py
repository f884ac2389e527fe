"""save_model: transformers computes the same logits from what it writes, and an interrupted save leaves nothing."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open

from fastllama.errors import CheckpointError
from fastllama.io import save
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from fastllama.io.save import save_model
from fastllama.io.tokenizer import load_tokenizer
from fastllama.layers.model import LlamaForCausalLM
from tests.io import tokenizer_folders
from tests.io.checkpoints import SHAPES, random_llama, write_llama2c


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    return load_model(write_llama2c(random_llama(), tmp_path / "model.bin", version=1))


def logits(model: transformers.LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_the_same_logits(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    original = random_llama(kv_heads=kv_heads, tied=tied)
    original.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    back, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(back), logits(original))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {
            "max_position_embeddings": 64,
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        {"eos_token_id": [2, 5]},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_survive(tmp_path: Path, settings: dict[str, object]) -> None:
    original = random_llama(**settings)
    original.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == original.dtype
    assert back.generation_config.eos_token_id == original.config.eos_token_id
    assert torch.equal(logits(back), logits(original))
    assert open_checkpoint(tmp_path / "ours").config == open_checkpoint(tmp_path / "theirs").config


def test_the_dtype_written_is_that_of_the_weights(tmp_path: Path) -> None:
    write_llama2c(random_llama(), tmp_path / "fp32.bin", version=1)
    save_model(load_model(tmp_path / "fp32.bin", dtype="bfloat16"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config.dtype == "bfloat16"


def test_shards_have_an_index_and_a_size(tmp_path: Path, model: LlamaForCausalLM) -> None:
    original = random_llama()
    save_model(model, tmp_path / "out", max_shard_size=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    sizes = []
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as handle:
            names = list(handle.keys())
            bytes_here = sum(handle.get_tensor(name).nbytes for name in names)
        assert {index["weight_map"][name] for name in names} == {file}
        assert bytes_here <= 100_000 or len(names) == 1
        sizes.append(bytes_here)
    assert all(size + after > 100_000 for size, after in itertools.pairwise(sizes)), "a shard was closed too early"
    assert index["metadata"] == {"total_size": sum(sizes)}
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(original))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path, model: LlamaForCausalLM) -> None:
    save_model(model, tmp_path / "out", max_shard_size=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3 + 2 * 9


COMPANIONS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
COMPANIONS += ["chat_templates/a.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"]
VOCABULARIES = ["tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"]
WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_the_tokenizer_comes_along(tmp_path: Path, model: LlamaForCausalLM) -> None:
    source = tmp_path / "source"
    for name in (*VOCABULARIES, *COMPANIONS, "README.md", "optimizer.pt", "other/tokenizer.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    save_model(model, tmp_path / "folder", source)
    assert files(tmp_path / "folder") == {*WEIGHTS, *VOCABULARIES, *COMPANIONS}
    assert all((tmp_path / "folder" / name).read_text() == name for name in (*VOCABULARIES, *COMPANIONS))
    save_model(model, tmp_path / "file", source / "tokenizer.model")
    assert files(tmp_path / "file") == {*WEIGHTS, "tokenizer.model", *COMPANIONS}
    (source / "tokenizer.model").rename(source / "llama.model")
    save_model(model, tmp_path / "renamed", source / "llama.model")
    assert (tmp_path / "renamed" / "tokenizer.model").read_text() == "tokenizer.model"


@pytest.mark.parametrize("name", tokenizer_folders.names())
def test_transformers_and_we_read_the_same_tokenizer_from_what_is_saved(
    tmp_path: Path, model: LlamaForCausalLM, name: str
) -> None:
    source = tokenizer_folders.folder(name)
    save_model(model, tmp_path / "out", source)
    ours, back = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    theirs, theirs_back = (transformers.AutoTokenizer.from_pretrained(each) for each in (source, tmp_path / "out"))
    assert (len(theirs_back), type(theirs_back)) == (len(theirs), type(theirs))
    assert theirs_back.special_tokens_map == theirs.special_tokens_map
    assert theirs_back.chat_template == theirs.chat_template
    assert theirs_back.added_tokens_decoder == theirs.added_tokens_decoder
    assert (back.special_tokens, back.chat_template) == (ours.special_tokens, ours.chat_template)
    for line in (*tokenizer_folders.LINES, *theirs.all_special_tokens):
        assert back.encode(line) == ours.encode(line)
        assert theirs_back(line).input_ids == theirs(line).input_ids


def test_sampling_settings_are_kept_and_bos_and_eos_are_the_models(tmp_path: Path) -> None:
    random_llama(eos_token_id=[2, 5], bos_token_id=3).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "generation_config.json"
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 7, "pad_token_id": 0}
    file.write_text(json.dumps(settings | {"eos_token_id": 7, "bos_token_id": 1}))
    (tmp_path / "theirs" / "tokenizer.model").touch()
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written == settings | {"eos_token_id": 7, "bos_token_id": 3}
    save_model(model, tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "generation_config.json").read_text()).keys() == {
        "bos_token_id",
        "eos_token_id",
    }
    file.write_text("null")
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds null"):
        save_model(model, tmp_path / "never", tmp_path / "theirs")
    assert not (tmp_path / "never").exists()


def test_the_class_of_the_tokenizer_is_kept_where_config_json_names_it(tmp_path: Path, model: LlamaForCausalLM) -> None:
    shutil.copytree(tokenizer_folders.folder("llama2_json"), tmp_path / "source")
    config = {"model_type": "llama", "tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": 9}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save_model(model, tmp_path / "out", tmp_path / "source")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tokenizer_class"], written["vocab_size"]) == ("PreTrainedTokenizerFast", 40)


def test_a_tied_model_is_saved_tied(tmp_path: Path) -> None:
    random_llama(tied=True).save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as handle:
        assert "lm_head.weight" not in handle.keys()  # noqa: SIM118 (safe_open is no mapping)
    model = load_model(tmp_path / "ours")
    assert model.lm_head.weight is model.embed_tokens.weight
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_a_tokenizer_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    (tmp_path / "empty").mkdir()
    for tokenizer in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=rf"tokenizer is '.*{tokenizer}'; legal: a tokenizer file"):
            save_model(model, tmp_path / "out", tmp_path / tokenizer)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten(tmp_path: Path, model: LlamaForCausalLM) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    for name in ("full", "model.bin"):
        with pytest.raises(ValueError, match="which exists; legal: a new or an empty folder"):
            save_model(model, tmp_path / name)


@pytest.mark.parametrize("target", ["nowhere", "empty"])
def test_a_link_is_refused_before_anything_is_written(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "empty").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    monkeypatch.setattr("fastllama.io.save.save_file", lambda *arguments: pytest.fail("written"))
    with pytest.raises(ValueError, match=r"^path is '.*link', a link; legal: a new or an empty folder$"):
        save_model(model, link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "model.bin"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_cannot_be_replaced_is_refused_before_anything_is_written(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.save.save_file", lambda *arguments: pytest.fail("written"))
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for path in (".", empty):
        with pytest.raises(ValueError, match="the working directory, which cannot be replaced; legal: a new folder in"):
            save_model(model, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: path == empty)
    with pytest.raises(ValueError, match=r"^path is '.*empty', a mount point, which cannot be replaced; legal: a new"):
        save_model(model, empty)
    with pytest.raises(ValueError, match=r"nothing can be written into '.*model\.bin': Not a directory; legal"):
        save_model(model, tmp_path / "model.bin" / "a" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model.bin"]
    assert list(empty.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_model(model, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_who_may_read_other_new_files_may_read_these(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """safetensors 0.8 writes files that only the owner may read."""
    save_model(model, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_missing_parents_and_an_empty_folder_are_fine(tmp_path: Path, model: LlamaForCausalLM) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    save_model(model, tmp_path / "a" / "b")
    save_model(model, tmp_path / "c" / "d")
    assert open_checkpoint(tmp_path / "a" / "b").config == open_checkpoint(tmp_path / "c" / "d").config


@pytest.mark.parametrize("name", ["n" * 255, "\u00fc" * 127, "\U0001f999" * 63], ids=["ascii", "2 bytes", "4 bytes"])
def test_a_name_as_long_as_file_systems_allow_is_fine(tmp_path: Path, model: LlamaForCausalLM, name: str) -> None:
    save_model(model, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"model.bin", name}


def test_a_shard_size_must_be_positive(tmp_path: Path, model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="max_shard_size is 0; legal: at least 1"):
        save_model(model, tmp_path / "out", max_shard_size=0)


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write, calls = save.save_file, 0

    def interrupted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(save, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "out", max_shard_size=100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_a_failed_save_removes_the_parents_that_it_made_and_no_others(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    notes = tmp_path / "a" / "notes"
    monkeypatch.setattr(save, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for out in (tmp_path / "there" / "b" / "c" / "out", tmp_path / "a" / "b" / "out"):
        with pytest.raises(KeyboardInterrupt):
            save_model(model, out)
        assert {path.name for path in tmp_path.rglob("*")} == {"model.bin", "there"}

    def notes_come(*_: object) -> None:
        notes.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "save_file", notes_come)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "a" / "b" / "out")
    assert {path.name for path in tmp_path.rglob("*")} == {"model.bin", "there", "a", "notes"}
