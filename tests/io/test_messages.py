"""Errors for malformed model folders and files: each names the file, its fault and the remedy, in our own words."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from fastllama.layers.weights import hf_tensors
from tests.io.checkpoints import hf_state, random_llama

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6" * 64 + b"\nsize 499723\n"
PAGE = b"<!DOCTYPE html>\n<html><title>Log in</title></html>"
WEIGHTS = "model.safetensors"
# Words of torch, safetensors, json and Python about these files, which no message may repeat.
LIBRARY_WORDS = re.compile(
    r"mmap|weights_only|allowlist|add_safe_globals|miniz|PytorchStreamReader|unpickler|header too large|HeaderToo|"
    r"Metadata|NoneType|unpack_from|Expecting|codec|Errno|Traceback|please|\x1b",
    re.IGNORECASE,
)
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def original() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, original: Any) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    original.save_pretrained(folder)
    return folder


def only(*names: str) -> Spoil:
    """Leaves config.json, and writes these files as noise or as their suffix claims."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(b"GGUF" + bytes(60) if name.endswith(".gguf") else b"\xff" * 50)

    return spoil


def weights(data: bytes) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def header(entries: object, size: int = 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def torch_file(content: object, **options: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin", **options)

    return spoil


def damaged_torch_file(keep: slice, *, zipped: bool = True) -> Spoil:
    def spoil(folder: Path) -> None:
        torch_file({"a": torch.ones(99)}, _use_new_zipfile_serialization=zipped)(folder)
        file = folder / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[keep])

    return spoil


def bin_file(data: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(data)

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def index(content: object) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def in_place_of_file(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def moved(*to: str, extra: str = "") -> Spoil:
    """The folder's content one or more folders down, and an empty file of the name `extra` in its place."""

    def spoil(folder: Path) -> None:
        content = [*folder.iterdir()]
        for name in to:
            (folder / name).mkdir(parents=True)
            for file in content:
                shutil.copy(file, folder / name)
        for file in content:
            file.unlink()
        if extra:
            (folder / extra).parent.mkdir(exist_ok=True)
            (folder / extra).write_text("bbb\n")

    return spoil


def without_configuration(*names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for file in [*folder.iterdir()]:
            file.unlink()
        for name in names:
            (folder / name).write_bytes(b"\xff" * 9)

    return spoil


def shards(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    for number in (1, 3):
        save_file({f"a{number}": torch.ones(2)}, folder / f"model-{number:05d}-of-00003.safetensors")


WHOLE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
FOLDERS: dict[str, tuple[Spoil, str]] = {
    # the weights are something else
    "LFS pointer": (weights(POINTER), rf"{WEIGHTS} is a Git LFS pointer, .*; run `git lfs pull`"),
    "web page": (weights(PAGE), rf"{WEIGHTS} is a web page saved under that name, .* download it again"),
    "server's error": (weights(b'{"error":"Invalid credentials"}'), r"a server \('Invalid credentials'\)"),
    "empty": (weights(b""), rf"{WEIGHTS} is empty; download it again"),
    "zeros": (weights(bytes(9999)), "zero bytes where its content should begin, as an unfinished download"),
    "noise": (weights(b"\xff" * 99), rf"{WEIGHTS} is not a safetensors file; download or copy"),
    "GGUF by another name": (weights(b"GGUF" + bytes(60)), rf"{WEIGHTS} is a GGUF file, which is not read"),
    "torch file by another name": (
        lambda folder: torch.save({"a": torch.ones(2)}, folder / WEIGHTS),
        rf"{WEIGHTS} is PyTorch weights \(torch.save\); rename it to pytorch_model.bin",
    ),
    "folder by that name": (in_place_of_file(WEIGHTS), rf"{WEIGHTS} is a folder"),
    "link to nowhere": (link(WEIGHTS, "../../blobs/abc"), r"leads nowhere \(to '../../blobs/abc'\); copy what it"),
    # safetensors
    "truncated": (weights(header(WHOLE, 3)), r"is not a complete safetensors file: \d+ bytes, expected \d+ by its"),
    "too long": (weights(header(WHOLE, 30)), r"is not a complete safetensors file: \d+ bytes, expected \d+ by its"),
    "header cut": (weights(header(WHOLE)[:30]), r"30 bytes, and the header alone has \d+"),
    "header of a gigabyte": (weights(struct.pack("<Q", 10**9) + b"{"), "header of 1000000000 bytes, expected at most"),
    "header no JSON": (weights(header(b"{" * 9)), "its header is damaged"),
    "header nested deeply": (weights(header(b'{"a":' + b"[" * 99999)), "its header is damaged"),
    "header without offsets": (weights(header({"a": {"dtype": "F32"}})), "its header is damaged"),
    "header with wrong shape": (
        weights(header({"a": WHOLE["a"] | {"shape": [3]}})),
        r"has a header that contradicts itself, or a dtype that is unknown \(F32\)",
    ),
    "unknown dtype": (weights(header({"a": WHOLE["a"] | {"dtype": "F9"}})), r"a dtype that is unknown \(F9\)"),
    "no tensors": (weights(header({}, 0)), rf"{WEIGHTS} holds no tensors"),
    # torch files
    "bin an LFS pointer": (bin_file(POINTER), r"pytorch_model.bin is a Git LFS pointer"),
    "bin a page": (bin_file(PAGE), r"pytorch_model.bin is a web page"),
    "bin of safetensors": (bin_file(header(WHOLE)), "is a safetensors file; rename it to model.safetensors"),
    "bin noise": (bin_file(b"\xff" * 99), r"pytorch_model.bin cannot be read as PyTorch weights: it does not begin as"),
    "bin of objects": (
        torch_file({"a": torch.ones(2), "args": argparse.Namespace()}),
        r"holds Python objects \(argparse.Namespace\); only tensors are read, as unpickling runs code; save its state",
    ),
    "old bin of objects": (
        torch_file({"args": argparse.Namespace()}, _use_new_zipfile_serialization=False),
        r"holds Python objects \(argparse.Namespace\)",
    ),
    "bin of a module": (torch_file(torch.nn.Linear(2, 2)), r"holds Python objects \(torch.nn.modules.linear.Linear\)"),
    "bin of arrays": (torch_file({"a": numpy.ones(3)}), r"holds Python objects \(numpy.*\)"),
    "bin that would run code": (bin_file(b"cos\nsystem\n(S'true'\ntR."), "is text that begins with 'cos'"),
    "bin cut": (damaged_torch_file(slice(0, -100)), "it is truncated or damaged"),
    "old bin cut": (damaged_torch_file(slice(0, -4), zipped=False), "it is truncated or damaged"),
    "old bin's head": (damaged_torch_file(slice(0, 60), zipped=False), "it is truncated or damaged"),
    "bin of a list": (torch_file([torch.ones(2)]), "is not a plain dictionary of tensors"),
    "bin of a tensor": (torch_file(torch.ones(2)), "is not a plain dictionary of tensors"),
    "bin of numbers": (torch_file({"epoch": 3}), "is not a plain dictionary of tensors"),
    "bin of two models": (
        torch_file({"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}, "epoch": 3}),
        r"holds several sets of tensors \('model', 'ema'\); save one of them as a state dict",
    ),
    "bin of one and a half": (torch_file({"a": torch.ones(2), "ema": {"b": torch.ones(2)}}), "'ema' holds tensors bes"),
    "bin under numbers": (torch_file({"a": torch.ones(2), 1: torch.ones(2)}), "1 is not a tensor's name"),
    "bin of sparse": (torch_file({"a": torch.eye(3).to_sparse()}), "tensor a is sparse or quantized"),
    "bin of nothing": (torch_file({"a": torch.ones(3, device="meta")}), "tensor a has no data"),
    # which files
    "no weights": (only(), rf"holds no weights; expected one of {WEIGHTS}"),
    "shards without index": (shards, r"index.json is missing: 2 of 3 shards are there \(model-00001-of-00003"),
    "GGUF beside config.json": (only("llama.Q4_0.gguf"), r"holds no weights that are read, but llama.Q4_0.gguf: GGUF"),
    "Mistral's": (only("consolidated.safetensors"), "consolidated.safetensors: Mistral's own layout is not read"),
    "variant": (only("model.fp16.safetensors"), "model.fp16.safetensors: expected the name model.safetensors; rename"),
    "Lightning's": (only("last.ckpt"), "last.ckpt: a trainer's checkpoint; save its state dict"),
    "adapter beside config.json": (only("adapter_model.safetensors"), "those of an adapter alone"),
    "TensorFlow's": (only("tf_model.h5"), "tf_model.h5: TensorFlow's weights are not read"),
    "macOS's notes": (only("._model.safetensors"), "holds no weights; expected one of"),
    "index of nothing": (index({"weight_map": {}}), "has an empty weight_map, expected a file name for each tensor"),
    "index of a list": (index({"weight_map": [1]}), "has a list as weight_map"),
    "index without map": (index({}), "has no weight_map"),
    "index outside": (index({"weight_map": {"a": "../x.safetensors"}}), r"tensor a is in '../x.safetensors', expected"),
    "index of missing files": (
        index({"weight_map": {name: f"model-0000{number}-of-00004.safetensors" for number, name in enumerate("abcd")}}),
        r"model-00000-of-00004.safetensors does not exist, but .* has tensor a in it, and 3 more of its files are miss",
    ),
    # no configuration
    "empty folder": (without_configuration(), "is an empty folder"),
    "a .gguf alone": (without_configuration("llama.gguf"), r"but llama.gguf: a GGUF file, which is not read; give the"),
    "weights alone": (without_configuration(WEIGHTS), rf"but {WEIGHTS}: weights; config.json belongs beside them"),
    "Meta's weights alone": (without_configuration("consolidated.00.pth"), r"Meta's weights; params.json belongs"),
    "notes alone": (without_configuration("README.md"), r"holds neither config.json .* or a llama2.c file"),
    "adapter": (without_configuration("adapter_config.json"), "adapter_config.json is not UTF-8: byte 0xff"),
    "diffusers": (without_configuration("model_index.json"), r"is a pipeline of diffusers \(model_index.json\)"),
    "sentence-transformers": (without_configuration("modules.json"), "is a model of sentence-transformers"),
    "one folder down": (moved("7b"), r"but 7b in it does; give .*/7b$"),
    "two folders down": (moved("a", "b"), r"but a in it does, and 1 more folders in it do; give .*/a$"),
    "cache": (moved("snapshots/bbb"), r"is a folder of the Hub's cache; give .*/snapshots/bbb$"),
    "cache of two": (
        moved("snapshots/aaa", "snapshots/bbb", extra="refs/main"),
        r"give .*/snapshots/bbb \(or another of 2\)$",
    ),
    "the whole cache": (moved("models--a--b/snapshots/c"), "is the Hub's cache; give the Hub id of a model"),
    "configuration a link to nowhere": (link("config.json", "../abc"), "config.json is a link that leads nowhere"),
    "configuration a folder": (in_place_of_file("config.json"), "config.json is a folder"),
    # JSON
    "configuration an LFS pointer": (text("config.json", POINTER), "config.json is a Git LFS pointer"),
    "configuration a page": (text("config.json", PAGE), "config.json is a web page"),
    "configuration empty": (text("config.json", ""), "config.json is empty"),
    "configuration cut": (text("config.json", '{"a": 1,\n "b"'), r"is not valid JSON \(line 2, column 5\)"),
    "configuration with BOM": (text("config.json", b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
    "configuration in UTF-16": (text("config.json", "{}".encode("utf-16")), "is UTF-16 text; save it as UTF-8"),
    "configuration in Latin-1": (text("config.json", b'{"a": "\xe9"}'), "is not UTF-8: byte 0xe9 at offset 7"),
    "configuration nested": (text("config.json", '{"a":' + "[" * 99999), "is nested too deeply"),
    "configuration with a long number": (text("config.json", '{"a":' + "1" * 9999 + "}"), "is not valid JSON; downl"),
    "configuration twice": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "the key 'vocab_size' twice"),
    "null": (text("config.json", "null"), "config.json holds null, expected a JSON object"),
    "list": (text("config.json", "[]"), "holds a list, expected"),
    "number": (text("config.json", "3.5"), "holds a number, expected"),
    "string": (text("config.json", '"x"'), "holds a string, expected"),
    "truth": (text("config.json", "true"), "holds true or false, expected"),
    "generation settings null": (text("generation_config.json", "null"), "generation_config.json holds null"),
    "generation settings cut": (text("generation_config.json", "{"), "generation_config.json is not valid JSON"),
}


def refusal(path: Path) -> str:
    """The error of loading the path, which must be one line in our words."""
    with pytest.raises((CheckpointError, FileNotFoundError)) as raised:
        load_model(path, progress=False)
    line = str(raised.value)
    assert str(path) in line, "names the file or the folder"
    assert line.isprintable()
    assert not LIBRARY_WORDS.search(line.replace(str(path), "")), line
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None or raised.value.__suppress_context__
    return line


@pytest.mark.parametrize("name", FOLDERS)
def test_a_malformed_folder_is_reported_in_one_line(good: Path, tmp_path: Path, name: str) -> None:
    spoil, expected = FOLDERS[name]
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    spoil(folder)
    line = refusal(folder)
    assert re.search(expected, line), line


FILES: dict[str, tuple[str, bytes, str]] = {
    "weights": (WEIGHTS, header(WHOLE), "is one file of a model; give the folder that holds it"),
    "LFS pointer": ("stories.bin", POINTER, "is a Git LFS pointer"),
    "page": ("stories.bin", PAGE, "is a web page"),
    "empty": ("stories.bin", b"", "is empty"),
    "short": ("stories.bin", b"\x01\x02\xff", "has 3 bytes, too few for a llama2.c header"),
    "GGUF": ("llama.gguf", b"GGUF" + bytes(60), "is a GGUF file, which is not read"),
    "archive": ("model.tar.gz", b"\x1f\x8b" + bytes(60), "is a gzip archive; unpack it"),
    "noise": ("stories.bin", b"\xff" * 300, r"does not begin with a llama2.c header \(dim -1 and -1 heads\)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_reported_in_one_line(tmp_path: Path, name: str) -> None:
    file, data, expected = FILES[name]
    (tmp_path / file).write_bytes(data)
    assert re.search(expected, refusal(tmp_path / file))


def test_what_may_not_be_read_is_reported(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a file. Planted errors, since the user of the tests may be root, who may read everything."""
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    is_file, real_open = Path.is_file, Path.open

    def refuse(at: Path, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Path, *arguments: Any, **options: Any) -> Any:
            if self == at:
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "is_file", refuse(folder / "config.json", is_file))
    assert "config.json may not be read by this user; change its permissions" in refusal(folder)
    monkeypatch.setattr(Path, "is_file", is_file)
    monkeypatch.setattr(Path, "open", refuse(folder / "config.json", real_open))
    assert "config.json is a file that this user may not read; change its permissions" in refusal(folder)


def trained(state: dict[str, Any]) -> dict[str, object]:
    """State dicts as trainers write them."""
    flat = torch.cat([tensor.flatten() for tensor in state.values()]) if state else torch.ones(0)
    sizes = [tensor.numel() for tensor in state.values()]
    shared = {name: part.view_as(state[name]) for name, part in zip(state, flat.split(sizes), strict=True)}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    return {
        "plain": state,
        "ordered": OrderedDict(state),
        "parameters": parameters,
        "with extras": {**state, "epoch": 3, "name": "x", "nothing": None, "history": [1.5]},
        "DeepSpeed's": {"module": state, "param_shapes": [{"a": torch.Size([2])}], "global_steps": 3},
        "Lightning's": {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}]},
        "with optimizer": {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        "nested twice": {"state_dict": {"model": state}},
        "shared storage": shared,
        "strided": {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in state.items()},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("form", trained({}))
def test_every_torch_file_that_weights_only_reads_is_read(
    good: Path, tmp_path: Path, original: Any, form: str, zipped: bool
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    state = hf_state(original)
    torch_file(trained(state)[form], _use_new_zipfile_serialization=zipped)(folder)
    for name, tensor in hf_tensors(load_model(folder, progress=False)):
        assert torch.equal(tensor, state[name]), name


def test_transformers_order_of_files_is_ours(good: Path, tmp_path: Path, original: Any) -> None:
    """Safetensors before .bin, one file before an index; a link that leads nowhere is passed over for the next."""
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(b"broken")
    (folder / "model.safetensors.index.json").write_text("broken")
    load_model(folder, progress=False)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(hf_state(original), folder / "pytorch_model.bin")
    link(WEIGHTS, "../abc")(folder)
    assert open_checkpoint(folder).file_of("lm_head.weight") == folder / "pytorch_model.bin"
    in_place_of_file(WEIGHTS)(folder)
    assert open_checkpoint(folder).file_of("lm_head.weight") == folder / "pytorch_model.bin"
