"""fastllama quantize: the library's result, written whole or not at all; an interrupted run resumes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllama
from fastllama import LLM, SamplingParams, load_model, quantize
from fastllama.cli.quantize import TEXT_OPTIONS
from fastllama.io.documents import calibration_documents
from fastllama.io.tokenizer import load_tokenizer
from fastllama.layers.quantization import METHODS, WITHOUT_TEXT
from tests.cli.conftest import Command
from tests.cli.models import WORDS, write_model
from tests.rounds import exhaustive

TEXT = "".join(f"{number} times {WORDS}\n" for number in range(9))
FEW = ("--samples", "5", "--context", "24")  # 120 tokens, of which the 96 columns of the widest layer need one each
RUNS = [(scheme, method) for method, schemes in METHODS.items() for scheme in schemes]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder to write, in one of its own: nothing may be left beside it."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(done: Any, says: str) -> None:
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fastllama: error: ")
    assert done.err.count("\n") == 1
    assert says in done.err


@pytest.mark.parametrize(("scheme", "method"), RUNS)
def test_what_is_written_is_what_the_library_gives(
    scheme: str, method: str, command: Command, model: str, text: Path, out: Path
) -> None:
    reads = method not in WITHOUT_TEXT
    options = ("--calibration", text, "--per-line", *FEW) if reads else ()
    done = command("quantize", model, out, "--scheme", scheme, "--method", method, *options)
    assert (done.status, done.err) == (0, "")
    expected, documents = load_model(model), []
    if reads:
        tokenizer = load_tokenizer(Path(model))
        documents = calibration_documents(TEXT, tokenizer, per_line=True, context=24, samples=5)
    quantize(expected, scheme, method, documents=documents)
    found = load_model(out).state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with LLM(out, progress=False) as llm:
        assert llm.quantization == scheme
        (output,) = llm.generate("once upon a time", SamplingParams(temperature=0, max_tokens=4))
        assert len(output.outputs[0].token_ids) == 4


def test_the_bundled_model_by_default(command: Command, out: Path) -> None:
    """int4 by gptq over the packaged stories; the last line, run, measures what it cost."""
    done = command("quantize", "tiny", out, "--samples", "6")
    assert (done.status, done.err) == (0, "")
    rows = dict(line.split(None, 1) for line in done.out.splitlines())
    assert list(rows) == ["wrote", "size", "quantized", "text", "measure"]
    assert rows["wrote"] == str(out)
    assert rows["size"] == f"{(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights, 8.9 MB before"
    assert rows["quantized"].startswith("int4 by gptq in ")
    assert rows["quantized"].endswith(" s on cpu")
    packaged = Path(fastllama.__file__).parent / "assets" / "calibration.txt"
    tokenizer = load_tokenizer(out)
    stories = calibration_documents(packaged.read_text(), tokenizer, per_line=True, context=1024, samples=6)
    tokens = sum(map(len, stories))
    assert rows["text"] == f"calibration.txt, packaged stories: 6 documents, {tokens:,} tokens"
    measure = rows["measure"].split()
    assert measure == ["fastllama", "perplexity", "--model", str(out), "--against", "tiny"]
    once = command(*measure[1:], "--file", "-", "--quiet", stdin=b"Once upon a time there was an owl.")
    assert (once.status, once.err) == (0, "")
    assert files(out).keys() >= {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}


def test_another_model_on_the_packaged_stories_is_a_warning(command: Command, model: str, out: Path) -> None:
    warning = "fastllama: warning: calibrated on the packaged stories; give a text like yours with --calibration\n"
    assert command("quantize", model, out, *FEW).err == warning
    quiet = command("quantize", model, out.with_name("quiet"), *FEW, "--quiet")
    assert quiet.err == ""
    assert quiet.out.startswith(f"{out.with_name('quiet')}: 0.")
    assert quiet.out.endswith(" MB before\n")
    assert quiet.out.count("\n") == 1
    assert files(out) == files(out.with_name("quiet"))


def test_standard_input_is_read_as_a_file_is(command: Command, model: str, text: Path, out: Path) -> None:
    assert command("quantize", model, out, "--calibration", text, *FEW).status == 0
    again = out.with_name("again")
    done = command("quantize", model, again, "--calibration", "-", *FEW, stdin=TEXT.encode())
    assert "text       standard input: 5 documents, " in done.out
    assert files(out) == files(again)


def test_a_context_is_no_more_than_the_model_takes(command: Command, model: str, out: Path) -> None:
    done = command("quantize", model, out, "--calibration", "-", "--samples", "2", stdin=TEXT.encode() * 9)
    assert done.status == 0
    assert ": 2 documents, 512 tokens\n" in done.out


def test_an_empty_folder_and_missing_parents_are_fine(command: Command, model: str, out: Path) -> None:
    out.mkdir()
    for folder in (out, out.with_name("a") / "b"):
        assert command("quantize", model, folder, "--method", "rtn").status == 0
        assert (folder / "config.json").is_file()


def test_a_model_without_a_tokenizer_is_rounded_and_not_calibrated(
    command: Command, model: str, tmp_path: Path, out: Path
) -> None:
    bare = write_model(tmp_path / "bare", tokenizer=False)
    refused(command("quantize", bare, out), f"there is no tokenizer with {bare}; give one with --tokenizer")
    done = command("quantize", bare, out, "--method", "rtn")
    assert done.status == 0
    assert "measure" not in done.out, "perplexity is of a text"
    assert not (out / "tokenizer.model").exists()
    given = out.with_name("given")
    assert command("quantize", bare, given, *FEW, "--tokenizer", Path(model) / "tokenizer.model").status == 0
    assert (given / "tokenizer.model").read_bytes() == (Path(model) / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scheme", "int3"), "argument --scheme: invalid choice: 'int3'"),
        (("--method", "magic"), "argument --method: invalid choice: 'magic'"),
        (("--scheme", "w8a8", "--method", "awq"), "method is 'awq' for scheme 'w8a8'; legal for it: rtn, gptq, smooth"),
        (("--group-size", "48"), "group_size is 48 for scheme 'int4'; legal: 32, 64, 128, -1 (-1: whole rows)"),
        (("--scheme", "w8a8", "--group-size", "128"), "group_size is 128 for scheme 'w8a8'; legal: -1"),
        (("--samples", "0"), "--samples is 0; legal: at least 1"),
        (("--context", "1"), "--context is 1; legal: at least 2"),
        *(
            (("--method", "rtn", option, *value), f"{option} is given, and method 'rtn' reads no text; legal: without")
            for option, value in zip(TEXT_OPTIONS, (("-",), (), ("5",), ("5",)), strict=True)
        ),
        (("--method", "hqq", "--per-line"), "--per-line is given, and method 'hqq' reads no text; legal: without it"),
        (("--calibration", "no/such.txt"), "--calibration is 'no/such.txt': No such file or directory; legal: a file"),
        (("--calibration", "-"), "--calibration: standard input is empty; legal: a text"),
        (("--resume", ""), "--resume is ''; legal: a folder"),
        (("--dtype", "int4"), "dtype is 'int4'; legal values: 'auto'"),
        (("--device", "cuda:99"), "device is 'cuda:99'"),
        (("--tokenizer", "no/such"), "no tokenizer at no/such"),
        (("more",), "unknown argument 'more'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_weights_are_read(
    options: tuple[str, ...], says: str, command: Command, model: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.load.load_model", lambda *_, **__: pytest.fail("weights are read"))
    refused(command("quantize", model, out, *options), says)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("stdin", "options", "says"),
    [
        (b"\xe9t\xe9", (), "--calibration: standard input is not UTF-8: byte 0xe9 at offset 0"),
        (b"\n", (), "--calibration: standard input is empty; legal: a text"),
        (b"\n \n\n", (), "--calibration: the text is blank; legal: one that is not"),
        (b"\n \n", ("--per-line",), "--calibration: each of the text's 2 lines is blank; legal: one that is not"),
    ],
    ids=str,
)
def test_a_text_that_is_none_is_refused(
    stdin: bytes, options: tuple[str, ...], says: str, command: Command, model: str, out: Path
) -> None:
    refused(command("quantize", model, out, "--calibration", "-", *options, stdin=stdin), says)


def test_a_place_that_cannot_be_written_is_refused_before_weights_are_read(
    command: Command, model: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllama.io.load.load_model", lambda *_, **__: pytest.fail("weights are read"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(out)
    legal = "legal: a new or an empty folder"
    refused(command("quantize", model, model), f"DST is '{model}', which exists; {legal}")
    refused(command("quantize", model, tmp_path / "link"), f"DST is '{tmp_path}/link', a link; {legal}")
    within = tmp_path / "file" / "out"
    nothing = f"and nothing can be written into '{tmp_path}/file': Not a directory; legal: a folder that may be written"
    refused(command("quantize", model, within), f"DST is '{within}', {nothing}")
    refused(command("quantize", model, out, "--resume", within), f"--resume is '{within}', {nothing}")
    for folder, which in ((out, "DST"), (out / "blocks", "DST"), (model, "SRC"), (f"{model}/blocks", "SRC")):
        said = f"--resume is '{folder}', which is {which} or in it; legal: a folder elsewhere"
        refused(command("quantize", model, out, "--resume", folder), said)
    refused(command("quantize", model, out.with_name("n" * 256)), f"{'n' * 256}: File name too long")
    monkeypatch.setattr("fastllama.cli.quantize.read_document", lambda *_, **__: pytest.fail("the text is read"))
    refused(command("quantize", model, model, "--calibration", "-"), f"DST is '{model}', which exists; {legal}")
    assert list(out.parent.iterdir()) == []


def test_a_source_that_cannot_be_quantized_is_refused_before_weights_are_read(
    command: Command, model: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("quantize", model, tmp_path / "int8", "--scheme", "int8", "--method", "rtn").status == 0
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "generation_config.json").write_text("[]")
    small = write_model(tmp_path / "small", vocab_size=280)
    monkeypatch.setattr("fastllama.io.load.load_model", lambda *_, **__: pytest.fail("weights are read"))
    said = f"SRC is '{tmp_path}/int8', whose files hold int8 weights; legal: a model that is not quantized"
    refused(command("quantize", tmp_path / "int8", out), said)
    refused(command("quantize", "nix", out), "SRC is 'nix'; legal: 'tiny', an existing path")
    refused(command("quantize", model, out, "--tokenizer", broken), f"{broken}/generation_config.json holds a list")
    refused(command("quantize", small, out), "; legal: 0 to 279")
    assert list(out.parent.iterdir()) == []


Moment = tuple[str, int]
MOMENTS: list[Moment] = [
    ("fastllama.io.load.load_weights", 1),
    ("fastllama.layers.quantizing.gptq", 1),
    ("fastllama.layers.quantizing.gptq", 6),
    ("fastllama.io.finished_blocks.write_tensors", 2),
    ("fastllama.io.save.save_file", 3),
    ("fastllama.io.save._write_json", 2),
]


def fail_at(moment: Moment, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the n-th call of a function raise."""
    path, number = moment
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(path, counted)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "fastllama: error: No space left on device\n"),
        exhaustive(MemoryError(), 2, "fastllama: error: out of memory: try fewer --samples or a smaller --context\n"),
    ],
    ids=["Ctrl-C", "disk", "memory"],
)
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("empty", [False, exhaustive(True)], ids=["new", "empty"])
def test_whatever_ends_it_leaves_dst_as_it_was_and_it_resumes_bit_for_bit(
    empty: bool,
    moment: Moment,
    error: BaseException,
    status: int,
    says: str,
    command: Command,
    model: str,
    text: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = text.with_name("blocks")
    args = ("quantize", model, out, "--calibration", text, *FEW, "--resume", blocks)
    if empty:
        out.mkdir()
    with monkeypatch.context() as patched:
        fail_at(moment, error, patched)
        done = command(*args)
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(says)
    assert [path.name for path in out.parent.rglob("*")] == ["out"] * empty
    finished = {path.name for path in blocks.glob("*")}
    assert all(name.endswith(".safetensors") for name in finished)
    again = command(*args)
    assert again.status == 0
    assert again.err == (f"resumed: {len(finished)} of 2 blocks were finished\n" if finished else "")
    assert not blocks.exists()
    assert command("quantize", model, out.with_name("whole"), "--calibration", text, *FEW).status == 0
    assert files(out) == files(out.with_name("whole"))


def test_without_resume_nothing_is_kept_and_with_it_only_what_others_left(
    command: Command, model: str, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, rest = text.with_name("blocks"), ("--calibration", text, *FEW)
    before = {path.name for path in text.parent.iterdir()}
    with monkeypatch.context() as patched:
        fail_at(("fastllama.io.save.save_file", 1), KeyboardInterrupt(), patched)
        assert command("quantize", model, out, *rest).status == 130
    assert {path.name for path in text.parent.iterdir()} == before
    blocks.mkdir()
    (blocks / "notes").touch()
    assert command("quantize", model, out, *rest, "--resume", blocks).err == "", "the packed model was resumed"
    assert [path.name for path in blocks.iterdir()] == ["notes"]


def test_quiet_does_not_report_what_was_finished(
    command: Command, model: str, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("quantize", model, out, "--calibration", text, *FEW, "--resume", text.with_name("blocks"), "--quiet")
    with monkeypatch.context() as patched:
        fail_at(("fastllama.io.save._write_json", 1), KeyboardInterrupt(), patched)
        assert command(*args).status == 130
    assert command(*args).err == ""


def test_a_damaged_block_is_named(
    command: Command, model: str, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("quantize", model, out, "--calibration", text, *FEW, "--resume", text.with_name("blocks"))
    with monkeypatch.context() as patched:
        fail_at(("fastllama.io.save._write_json", 1), KeyboardInterrupt(), patched)
        assert command(*args).status == 130
    file = min(text.with_name("blocks").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    refused(command(*args), f"{file} is damaged; delete it, and its block is quantized again")
    file.unlink()
    assert command(*args).err == "resumed: 1 of 2 blocks were finished\n"


def test_what_the_page_shows_runs_and_writes_what_the_command_writes(
    command: Command, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(fastllama.__file__).parents[1] / "docs" / "use" / "quantize.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(WORDS, encoding="utf-8")
    exec(code, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "text.txt", "tiny-int4"]
    assert command("quantize", "tiny", out, "--calibration", "text.txt").status == 0
    assert files(out) == files(tmp_path / "tiny-int4")
