"""Every mistake of a user: nothing on standard output, one line on standard error, exit status 2."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Command
from tests.cli.models import write_model

Spoil = Callable[[Path], None]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def change_config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def write(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data) and None


def only(name: str) -> Spoil:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def objects(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"args": argparse.Namespace()}, folder / "pytorch_model.bin")


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/abc")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6" * 64 + b"\nsize 499723\n"
CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncate, "model.safetensors is not a complete safetensors file"),
    "NaN": (
        change_weights(lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(float("nan"))),
        "tensor model.layers.1.mlp.up_proj.weight holds NaN or infinity",
    ),
    "missing tensor": (
        change_weights(lambda weights: weights.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "extra tensor": (
        change_weights(lambda weights: weights.update({"model.extra.weight": torch.ones(2)})),
        "tensor model.extra.weight is unexpected",
    ),
    "wrong shape": (change_config(hidden_size=128), "expected [300, 128] by the configuration"),
    "not a Llama": (change_config(model_type="gpt2"), "model_type is 'gpt2'"),
    "wrong type in config": (change_config(num_hidden_layers="two"), "num_hidden_layers is 'two'"),
    "config no JSON": (write("config.json", b"{"), "config.json is not valid JSON"),
    "broken tokenizer": (
        write("tokenizer.model", b"\xff" * 50),
        "tokenizer.model is broken or not a SentencePiece model",
    ),
    "LFS pointer": (write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "web page": (write("model.safetensors", b"<html>Log in"), "model.safetensors is a web page saved under that name"),
    "Python objects": (objects, "pytorch_model.bin holds Python objects (argparse.Namespace); only tensors are read"),
    "shard of many": (only("model-00001-of-00003.safetensors"), "model.safetensors.index.json is missing: 1 of 3"),
    "GGUF": (only("llama-2-7b.Q4_0.gguf"), "but llama-2-7b.Q4_0.gguf: GGUF is not read"),
    "link to nowhere": (dangling, "model.safetensors is a link that leads nowhere"),
    "config null": (write("config.json", b"null"), "config.json holds null, expected a JSON object"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "give one with --tokenizer"),
}

# arguments, standard input, part of the line; {model} and {folder} are filled in
ARGUMENTS: dict[str, tuple[str, bytes, str]] = {
    "unknown option": (
        "generate --tempreature 1",
        b"",
        "unknown argument '--tempreature'; did you mean --temperature?",
    ),
    "unknown option with value": ("verify --modle=a/b/c/d/e/f", b"", "'--modle=a/b/c/d/e/f'; did you mean --model?"),
    "unknown option like none": ("info --zzz", b"", "unknown argument '--zzz' (see fastllama info --help)"),
    "abbreviated option": ("generate --temp 1", b"", "unknown argument '--temp'"),
    "unknown command": ("genrate", b"", "invalid choice: 'genrate' (choose from"),
    "option before command": ("--prompt x", b"", "see fastllama --help"),
    "stray text": ("generate hello", b"", "unknown argument 'hello'; legal: '-' for standard input"),
    "value missing": ("generate --prompt", b"", "argument --prompt: expected one argument"),
    "no number": ("generate --temperature hot", b"", "argument --temperature: invalid float value: 'hot'"),
    "no integer": ("chat --max-tokens 1.5", b"", "argument --max-tokens: invalid int value: '1.5'"),
    "two prompts": ("generate --prompt x --prompt-file y", b"", "--prompt-file: not allowed with argument --prompt"),
    "prompt and input": ("generate --prompt x -", b"x", "not allowed with argument"),
    "temperature": ("generate --temperature -1", b"", "temperature is -1.0; legal: at least 0"),
    "temperature nan": ("generate --temperature nan", b"", "temperature is nan; legal: at least 0"),
    "top-k": ("generate --top-k -2", b"", "top_k is -2; legal: -1 to 9223372036854775807"),
    "top-p": ("generate --top-p 1.5", b"", "top_p is 1.5; legal: 0 to 1"),
    "top-p 0": ("generate --top-p 0", b"", "top_p is 0.0; legal: above 0"),
    "min-p": ("generate --min-p 2", b"", "min_p is 2.0; legal: 0 to 1"),
    "max-tokens": ("generate --max-tokens 0", b"", "max_tokens is 0; legal: at least 1"),
    "n": ("generate --n 0", b"", "n is 0; legal: at least 1"),
    "n too large": ("generate --model {model} --n 1000", b"", "n is 1000; legal: at most"),
    "seed": ("generate --seed -1", b"", "seed is -1; legal: 0 to"),
    "chat's seed": ("chat --model {model} --seed -1", b"", "seed is -1; legal: 0 to"),
    "stop": ("generate --stop=", b"", "legal: strings of at least one character"),
    "max-model-len": ("generate --model {model} --max-model-len 1", b"", "max_model_len is 1; legal: at least 2"),
    "max-model-len beyond": ("generate --model {model} --max-model-len 9999", b"", "max_model_len is 9999"),
    "dtype": ("generate --model {model} --dtype float61", b"", "did you mean 'float16'?"),
    "device": ("generate --model {model} --device gpu", b"", "device is 'gpu'; legal: 'auto', 'cpu', 'cuda'"),
    "device not there": ("verify --model {model} --device cuda:9", b"", "device is 'cuda:9'"),
    "model not there": ("generate --model ./nowhere", b"", "model is './nowhere', but no such file or folder exists"),
    "model no name": ("chat --model tiyn", b"", "did you mean 'tiny'?"),
    "model empty": ("verify --model=", b"", "model is ''"),
    "model a folder of nothing": ("generate --model {folder}", b"", "is an empty folder; give one that holds a model"),
    "model a weight file": ("info --model {model}", b"", "unknown argument '--model'"),
    "tokenizer not there": ("generate --model {model} --tokenizer {folder}/no.model", b"", "no.model"),
    "prompt file not there": ("generate --prompt-file {folder}/no.txt", b"", "no.txt: No such file or directory"),
    "prompt file a folder": ("generate --prompt-file {folder}", b"", "Is a directory"),
    "empty input": ("generate --model {model} -", b"", "standard input is empty; legal: text"),
    "input no UTF-8": ("generate --model {model} -", b"ab\xffc", "standard input is not UTF-8: byte 0xff at offset 2"),
    "chat's input no UTF-8": (
        "chat --quiet --model {model} --max-tokens 1",
        b"\xc3\n",
        "line 1 of standard input is not UTF-8: byte 0xc3 at offset 0",
    ),
    "prompt too long": (
        "generate --model {model} -",
        b"once upon a time " * 100,
        "the prompt has 1700 characters, which are 340 tokens or more; legal: at most 255 tokens, one less than ",
    ),
    "prompt too long once it is read": (
        "generate --model {model} -",
        b"once upon a time " * 70,
        "legal: at most 255, one less than max_model_len",
    ),
    "benchmark missing": ("bench", b"", "the following arguments are required: WHAT (see fastllama bench --help)"),
    "benchmark unknown": ("bench rutime", b"", "invalid choice: 'rutime'"),
    "drafts": ("generate --model {model} --num-draft-tokens 8", b"", "num_draft_tokens is 8; legal: 1 to 7"),
    "who drafts": ("chat --model {model} --speculation promt_lookup", b"", "promt_lookup"),
    "keys and values": ("generate --kv-cache-dtype int4", b"", "argument --kv-cache-dtype: invalid choice: 'int4'"),
    "drafts of a decode": ("bench decode --speculation tiny", b"", "unknown argument '--speculation'"),
    "requests": ("bench runtime --requests 0", b"", "requests is 0; legal: at least 1"),
    "tokens": ("bench runtime --tokens 1", b"", "tokens is 1; legal: at least 2"),
    "tokens beyond": ("bench runtime --model {model} --tokens 250", b"", "tokens is 250; legal: 2 to 248"),
    "rounds": ("bench runtime --rounds 0", b"", "rounds is 0; legal: at least 1"),
    "arrivals": ("bench runtime --arrivals 0", b"", "arrivals is 0; legal: at least 1"),
    "loads": ("bench runtime --loads 0.5 0", b"", "loads is 0.0; legal: 0.01 to 100"),
    "peers": ("bench runtime --peers vllm", b"", "argument --peers: invalid choice: 'vllm'"),
    "a model to measure": ("bench runtime --model tiyn", b"", "did you mean 'tiny'?"),
    "a device to measure": ("bench runtime --device cuda:9", b"", "device is 'cuda:9'"),
    "plot of what kind": ("bench runtime --plot {folder}/a.gif", b"", "legal: a file that ends in .png or .svg"),
    "plot of nothing": ("bench runtime --loads --plot {folder}/a.png", b"", "loads is empty while --plot is given"),
    "output where": ("bench runtime --output {folder}/b/c.json", b"", "/b' to write 'c.json' into"),
    "shape": ("bench decode --shape 8b", b"", "argument --shape: invalid choice: '8b'"),
    "shape and model": ("bench decode --shape 7b --model tiny", b"", "--model: not allowed with argument --shape"),
    "batch": ("bench decode --batch 1 0", b"", "batch is 0; legal: at least 1"),
    "steps": ("bench decode --tokens 0", b"", "tokens is 0; legal: at least 1"),
    "context": ("bench decode --context 64 --tokens 60", b"", "context beside 60 tokens is 64; legal: at least 69"),
    "context beyond": ("bench decode --model {model} --context 512", b"", "context is 512; legal: 1 to 256"),
    "decode's dtype": ("bench decode --dtype float61", b"", "did you mean 'float16'?"),
    "decode's device": ("bench decode --device cuda:9", b"", "device is 'cuda:9'"),
    "decode's bf12": ("bench decode --quantize none bf12 --dtype float32", b"", "legal: bfloat16 on a CPU"),
    "decode's output": ("bench decode --output {folder}/b/c.json", b"", "/b' to write 'c.json' into"),
    "prompt no Unicode": ("generate --model {model} --prompt \udcff", b"", "is not UTF-8: byte 0xff at offset 0"),
}


def check_line(command: Command, args: list[str], stdin: bytes, says: str) -> None:
    done = command(*args, stdin=stdin)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fastllama: error: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert "\x1b" not in done.err
    assert says in done.err


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_line(command: Command, model: str, tmp_path: Path, name: str) -> None:
    line, stdin, says = ARGUMENTS[name]
    check_line(command, [word.format(model=model, folder=tmp_path) for word in line.split()], stdin, says)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_is_one_line(command: Command, model: str, tmp_path: Path, name: str) -> None:
    spoil, says = CHECKPOINTS[name]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    spoil(folder)
    check_line(command, ["generate", "--model", str(folder), "--max-tokens", "1"], b"", says)


def test_a_prompt_of_tokens_that_the_model_does_not_have_is_one_line(
    command: Command, model: str, tmp_path: Path
) -> None:
    small = write_model(tmp_path / "small", tokenizer=False, vocab_size=200)
    args = ["generate", "--model", str(small), "--tokenizer", model, "--quiet", "--prompt", "zebra Quartz"]
    check_line(command, args, b"", "legal: integers from 0 to 199")


def test_a_file_in_place_of_a_folder_is_one_line(command: Command, model: str) -> None:
    check_line(command, ["generate", "--model", f"{model}/model.safetensors"], b"", "give the folder that holds it")
