"""fastllama perplexity: its figures and output, and one line for every mistake, before weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import fastllama
from fastllama import LLM, load_model, save_model
from fastllama.io.tokenizer import load_tokenizer
from fastllama.verify import compare, perplexity, text_documents
from tests.cli.conftest import Command
from tests.cli.models import WORDS, write_model

PROSE = (WORDS + ". ") * 6
INT4 = ("--quantize", "int4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PROSE + "\n\n" + WORDS + "\n", encoding="utf-8")
    return file


def measured(model: str, documents: list[list[int]], context: int, stride: int) -> float:
    with LLM(model, quantization=None, max_model_len=256, progress=False) as llm:
        return perplexity(llm, documents, context=context, stride=stride).perplexity.value


def test_without_a_text_it_is_the_bundled_models_card(command: Command) -> None:
    """The card's figure is transformers', each story on its own between BOS and EOS, in fp32 arithmetic."""
    card = (Path(fastllama.__file__).parent / "assets" / "tiny" / "README.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^\| `heldout_seed\.txt` \| 65 \|.*\| ([\d.]+) \|$", card, re.MULTILINE)
    done = command("perplexity", "--dtype", "float32")
    assert (done.status, done.err) == (0, "")
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in done.out.splitlines()]
    assert [line[0] for line in lines] == [
        *("model", "text", "protocol", "tokens", "perplexity"),
        "+- one standard error, by document",
    ]
    shown = {name: value for name, *rest in lines for value in rest}
    assert shown["model"] == "tiny (float32) on cpu"
    assert shown["text"] == "heldout_seed.txt, stories that the bundled model has not seen: 65 documents"
    assert shown["protocol"] == "65 windows, context 1024, stride 512"
    assert re.fullmatch(r"14,506, [\d,]+ a second", shown["tokens"])
    assert re.fullmatch(rf"{re.escape(told)} \+- 0\.\d{{4}}", shown["perplexity"])


def test_a_file_is_one_document_or_one_a_line(command: Command, model: str, text: Path) -> None:
    tokenizer = load_tokenizer(Path(model))
    for options, documents in (
        ((), text_documents(text.read_text().removesuffix("\n"), tokenizer)),
        (("--per-line",), text_documents(text.read_text(), tokenizer, per_line=True)),
    ):
        done = command("perplexity", "--model", model, "--file", text, "--context", "50", "--json", *options)
        assert (done.status, done.err) == (0, "")
        found = json.loads(done.out)
        assert (found["documents"], found["context"], found["stride"]) == (len(documents), 50, 25)
        assert found["tokens"] == sum(map(len, documents)) - len(documents)
        assert found["perplexity"]["value"] == pytest.approx(measured(model, documents, 50, 25), rel=1e-5)
        assert (found["text"], found["per_line"], found["against"]) == (str(text), bool(options), None)


def test_standard_input_is_read_as_a_file_is(command: Command, model: str, text: Path) -> None:
    args = ("perplexity", "--model", model, "--context", "40", "--stride", "40", "--json", "--file")
    mark = b"\xef\xbb\xbf"  # as Windows writes it
    outputs = [command(*args, text), command(*args, "-", stdin=mark + text.read_bytes())]
    figures = [{name: json.loads(done.out)[name] for name in ("nll", "tokens", "windows")} for done in outputs]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("options", [(), ("--per-line",)], ids=str)
def test_a_text_from_windows_gives_the_same_figures(
    options: tuple[str, ...], command: Command, model: str, text: Path
) -> None:
    args = ("perplexity", "--model", model, "--context", "40", "--json", *options, "--file", "-")
    unix = text.read_bytes()
    outputs = [command(*args, stdin=each) for each in (unix, unix.replace(b"\n", b"\r\n"))]
    figures = [{name: json.loads(done.out)[name] for name in ("nll", "tokens", "windows")} for done in outputs]
    assert figures[0] == figures[1]


def test_the_context_is_no_more_than_the_model_takes(command: Command, model: str, text: Path) -> None:
    done = command("perplexity", "--model", model, "--file", text, "--context", "5000", "--stride", "4000")
    assert done.status == 0
    assert ", context 256 (not 5000: the model takes no more), stride 256\n" in done.out
    done = command("perplexity", "--model", model, "--file", text, "--context", "256")
    assert "context 256, stride 128\n" in done.out


def test_against_the_same_model_not_quantized(command: Command, model: str, text: Path) -> None:
    args = ("perplexity", "--model", model, "--file", text, "--context", "64", "--per-line", *INT4, "--against")
    found = json.loads(command(*args, "--json").out)
    documents = text_documents(text.read_text(), load_tokenizer(Path(model)), per_line=True)
    with LLM(model, quantization=None, progress=False) as plain, LLM(model, quantization="int4", progress=False) as llm:
        expected = compare(llm, plain, documents, context=64, stride=32)
    for name in ("nll_difference", "kl", "top1"):
        assert found[name]["value"] == pytest.approx(getattr(expected, name).value, rel=1e-2), name
    assert found["kl"]["value"] > 1e-3
    assert found["described"] == f"{model} (float32, weights in int4) on cpu"
    assert found["against"] == f"{model} (float32) on cpu"
    assert {"nll", "perplexity", "tokens_per_second"} <= set(found["model"]) & set(found["reference"])
    done = command(*args)
    assert done.err == ""
    rows = [line.split()[0] for line in done.out.splitlines()]
    assert rows == [
        *("model", "text", "protocol", "tokens", "perplexity"),
        *("against", "perplexity", "dNLL", "KL", "top-1", "+-"),
    ]
    assert f"top-1       {100 * expected.top1.value:.2f} +- " in done.out
    assert ", comparing included\n" in done.out


def test_against_another_model_and_of_the_cache_alone(command: Command, model: str, text: Path) -> None:
    args = ("perplexity", "--model", model, "--file", text, "--context", "64")
    done = command(*args, "--kv-cache-dtype", "fp8", "--deterministic", "--against", "--json")
    found = json.loads(done.out)
    assert found["described"] == f"{model} (float32, KV cache in fp8, deterministic) on cpu"
    assert found["against"] == f"{model} (float32, deterministic) on cpu"
    assert found["kl"]["value"] > 1e-5
    same = json.loads(command(*args, "--against", model, "--json").out)
    assert (same["kl"]["value"], same["top1"]["value"]) == (pytest.approx(0, abs=1e-6), 1)


def test_quiet_is_one_line(command: Command, model: str, text: Path) -> None:
    args = ("perplexity", "--model", model, "--file", text, "--context", "64", "--quiet")
    number = r"[+-]?[\d.]+(?:e-\d+)? \+- [\d.]+(?:e-\d+)?"
    done = command(*args)
    assert done.err == ""
    assert re.fullmatch(rf"perplexity {number}\n", done.out)
    both = rf"dNLL {number} nats per token, KL {number} nats per token, top-1 {number} % of tokens"
    assert re.fullmatch(rf"perplexity {number}, {both}\n", command(*args, *INT4, "--against").out)


def test_one_window_has_no_standard_error(command: Command, model: str, text: Path) -> None:
    args = ("perplexity", "--model", model, "--file", "-")
    done = command(*args, *INT4, "--against", stdin=b"a small fox")
    assert "+-" not in done.out
    assert done.out.endswith("no standard errors: there is one window\n")
    found = json.loads(command(*args, "--json", stdin=b"a small fox").out)
    assert found["nll"]["standard_error"] is None


@pytest.mark.parametrize(
    ("options", "stdin", "says"),
    [
        (("--context", "0"), b"", "--context is 0; legal: at least 1"),
        (("--stride", "0"), b"", "--stride is 0; legal: 1 to 1024"),
        (("--context", "64", "--stride", "65"), b"", "--stride is 65; legal: 1 to 64"),
        (("--context", "many"), b"", "argument --context: invalid int value: 'many'"),
        (("--file", "no/such.txt"), b"", "no/such.txt: No such file or directory"),
        (("--file", "."), b"", ".: Is a directory"),
        (("--file", "-"), b"", "standard input is empty; legal: a text"),
        (("--file", "-"), b"\n", "standard input is empty; legal: a text"),
        (("--file", "-"), b"\xe9t\xe9", "standard input is not UTF-8: byte 0xe9 at offset 0"),
        (("--file", "-", "--per-line"), b"\n  \n\n", "each of the text's 3 lines is blank; legal: one that is not"),
        (("--against",), b"", "--against compares with the same model, not quantized, and so is this one; legal: with"),
        (("--against", "--quantize", "none"), b"", "--against compares with the same model"),
        (("--against", "nix"), b"", "--against is 'nix'; legal: 'tiny', an existing path"),
        (("--against", ""), b"", "--against is ''; legal: 'tiny', an existing path"),
        (("--against", "tiny", "--file", "-"), b"a fox", "which has a vocabulary of 2048 tokens and"),
        (("--dtype", "int4"), b"", "dtype is 'int4'; legal values: 'auto'"),
        (("--device", "cuda:99"), b"", "device is 'cuda:99'"),
        (("--tokenizer", "no/such"), b"", "no/such"),
        (("text.txt",), b"", "unknown argument 'text.txt'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_weights_are_read(
    options: tuple[str, ...], stdin: bytes, says: str, command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LLM, "__init__", unused)
    done = command("perplexity", "--model", model, *options, stdin=stdin)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fastllama: error: ")
    assert done.err.count("\n") == 1
    assert says in done.err


@pytest.mark.parametrize("options", [(), INT4, ("--kv-cache-dtype", "int8")], ids=str)
def test_a_quantized_folder_has_no_unquantized_self(
    options: tuple[str, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_model(tmp_path / "original")
    save_model(load_model(original, quantization="int4"), tmp_path / "int4")
    for file in original.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "int4")
    monkeypatch.delattr(LLM, "__init__")  # no weights are read for it
    done = command("perplexity", "--model", tmp_path / "int4", *options, "--against")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "fastllama: error: --against compares with the same model, not quantized, but the files of "
        f"'{tmp_path / 'int4'}' hold int4 weights; legal: a model after --against\n"
    )


def test_a_model_without_a_tokenizer_is_refused(command: Command, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tokenizer=False)
    done = command("perplexity", "--model", folder)
    assert (done.status, done.err) == (
        2,
        f"fastllama: error: there is no tokenizer with {folder}; give one with --tokenizer\n",
    )


def test_a_tokenizer_that_reads_the_text_otherwise_is_refused(
    command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer without BOS leaves a text of one token nothing to score."""
    monkeypatch.delattr(LLM, "__init__")  # no weights are read for it
    other = write_model(tmp_path / "other")
    (other / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    args = ("perplexity", "--model", model, "--file", "-", "--against", other)
    done = command(*args, stdin=b"a small fox")
    assert (done.status, done.out) == (2, "")
    assert f"--against is '{other}', whose tokenizer reads the text as other tokens than that of '{model}'" in done.err
    one = command("perplexity", "--model", other, "--file", "-", stdin=b"a")
    assert "document 0 has 1 token; legal: at least 2" in one.err
