"""what_is recognises files by their first bytes, whatever their names."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fastllama.io.formats.recognise import what_is

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "6" * 64 + "\nsize 499723\n"


def torch_file(*, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("config.json", "{}")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("config.json"))
    return buffer.getvalue()


def sentencepiece_model() -> bytes:
    buffer = io.BytesIO()
    text = iter(["the quick brown fox jumps over the lazy dog"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=buffer, vocab_size=50, model_type="bpe", minloglevel=2
    )
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(3))
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes | str], str]] = {
    "LFS": (lambda: POINTER, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "web page": (lambda: "\n<!DOCTYPE html>\n<html><body>Log in", "a web page saved under that name"),
    "web page without doctype": (lambda: "<HTML lang=en>", "a web page"),
    "S3's refusal": (
        lambda: '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "an XML answer of a server (AccessDenied)",
    ),
    "the Hub's refusal": (
        lambda: '{"error":"Repository not found"}',
        "an error message of a server ('Repository not found')",
    ),
    "the Hub's plain refusal": (lambda: "Entry not found", "text that begins with 'Entry not found'"),
    "JSON": (lambda: json.dumps({"model_type": "llama"}), "a JSON file"),
    "long JSON": (lambda: json.dumps({"vocab": list(range(5000))}), "a JSON file"),
    "GGUF": (lambda: b"GGUF" + bytes(60), "a GGUF file, which is not read"),
    "torch.save": (torch_file, "PyTorch weights (torch.save)"),
    "torch.save before 1.6": (lambda: torch_file(zipped=False), "PyTorch weights (torch.save's old format)"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a Python pickle"),
    "safetensors": (lambda: save({"a": torch.ones(2)}), "a safetensors file"),
    "SentencePiece": (sentencepiece_model, "a SentencePiece model"),
    "tiktoken": (lambda: "IQ== 0\nIg== 1\nIw== 2\n", "a tiktoken table, as Llama 3's own tokenizer.model; use its"),
    "zip": (lambda: archive("zip"), "a zip archive; unpack it"),
    "tar": (lambda: archive("tar"), "a tar archive; unpack it"),
    "gzip": (lambda: gzip.compress(b"abc"), "a gzip archive; unpack it"),
    "xz": (lambda: lzma.compress(b"abc"), "an xz archive; unpack it"),
    "bzip2": (lambda: bz2.compress(b"abc"), "a bzip2 archive; unpack it"),
    "NumPy": (numpy_file, "a NumPy array"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
    "ONNX": (lambda: b"\x08\x07\x12\x07pytorch\x1a", "an ONNX model"),
    "empty": (lambda: b"", "empty;"),
    "zeros": (lambda: bytes(10000), "zero bytes where its content should begin"),
    "few zeros": (lambda: bytes(10), "zero bytes where its content should begin"),
    "macOS": (lambda: b"\0\x05\x16\x07\0\x02", "macOS metadata of a file"),
    "UTF-16": (lambda: "{}".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "a link of git on Windows": (lambda: "../../blobs/abc", "text that begins with '../../blobs/abc'"),
    "text with escape codes": (lambda: "error\x1b[1m red", ""),
    "noise": (lambda: bytes(range(200, 256)), ""),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_known_by_what_is_in_it(tmp_path: Path, name: str) -> None:
    make, expected = FILES[name]
    data = make()
    (tmp_path / "model.bin").write_bytes(data if isinstance(data, bytes) else data.encode())
    found = what_is(tmp_path / "model.bin")
    assert (found or "").startswith(expected)
    assert bool(found) == bool(expected)


def test_what_is_no_file_is_reported(tmp_path: Path) -> None:
    assert what_is(tmp_path) == "a folder"
    assert what_is(tmp_path / "nowhere") is None
    (tmp_path / "link").symlink_to("../blobs/abc")
    assert str(what_is(tmp_path / "link")).startswith("a link that leads nowhere (to '../blobs/abc')")
    os.mkfifo(tmp_path / "pipe")
    assert what_is(tmp_path / "pipe") == "no regular file"


def test_a_text_cut_within_a_character_is_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 4095 + "é" + "y" * 100, encoding="utf-8")
    assert str(what_is(tmp_path / "a")).startswith("text that begins with 'xxxx")


@given(st.binary(max_size=300))
def test_no_bytes_make_it_fail_or_repeat_a_control_character(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    assert (what_is(path) or "").isprintable()
