"""fastllama generate beyond plain text: escapes, log-probabilities, infilling, and defaults that a checkpoint sets."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama import LLM, SamplingParams, save_model
from fastllama.cli.options import SAMPLING
from fastllama.io.tokenizer import SentencePieceTokenizer
from tests.cli.conftest import Command
from tests.cli.models import random_model, tokenizer_model
from tests.io.tokenizer_samples import CONTROL, INFILLING, with_pieces

PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has Code Llama's infilling pieces."""
    folder = tmp_path_factory.mktemp("models") / "code"
    save_model(random_model(vocab_size=304), folder)
    (folder / "tokenizer.model").write_bytes(with_pieces(tokenizer_model(), INFILLING, CONTROL))
    return str(folder)


def configured(model: str, folder: Path, **settings: object) -> str:
    """A model with a generation_config.json."""
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_an_escape_in_a_stop_text_is_what_it_stands_for(command: Command, model: str) -> None:
    args = ("generate", "--model", model, "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "24", "--json")
    text = json.loads(command(*args).out)["text"]
    end = next(place for place in range(4, len(text)) if text[place].isascii())
    found = json.loads(command(*args, "--stop", f"\\x{ord(text[end]):02x}").out)
    assert (found["text"], found["stop_reason"]) == (text[: text.index(text[end])], text[end])


@pytest.mark.parametrize(("options", "meant"), [([], r"a\tb\u00e9"), (["-e"], "a\tbé"), (["--escape"], "a\tbé")])
def test_a_prompt_is_literal_unless_escapes_are_asked_for(
    command: Command, model: str, options: list[str], meant: str
) -> None:
    args = ("generate", "--model", model, "-n", "1", "--json", *options)
    for done in (command(*args, "-p", r"a\tb\u00e9"), command(*args, stdin=rb"a\tb\u00e9")):
        assert json.loads(done.out)["prompt"] == meant


@pytest.mark.parametrize("count", [0, 1, 3])
def test_log_probabilities_are_those_of_the_runtime(command: Command, model: str, count: int) -> None:
    args = ("generate", "--model", model, "--prompt", PROMPT, "-n", "5", "--logprobs", str(count))
    found = json.loads(command(*args, "--json").out)
    with LLM(model) as llm:
        params = SamplingParams(max_tokens=5, temperature=0.8, top_p=0.95, seed=0, logprobs=count)
        ((sample,),) = (output.outputs for output in llm.generate(PROMPT, params))
        pieces = {i: llm.tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(300)}
    assert sample.logprobs is not None
    assert found["logprobs"] == [
        dataclasses.asdict(each) | {"top": [list(one) for one in each.top]} for each in sample.logprobs
    ]
    done = command(*args, "--quiet")
    text, table = done.out.split("\n\n", 1)
    assert text == f"{PROMPT}{sample.text}"
    header, *rows = table.splitlines()
    assert header.split("  ")[0] == "token"
    for row, each in zip(rows, sample.logprobs, strict=True):
        assert f" {each.logprob:.3f} " in row
        assert f" {100 * math.exp(each.logprob):.1f} %" in row
        piece = pieces[each.token_id]
        assert row.startswith(repr(piece.decode()) if piece.isascii() else repr(piece)[1:])
        assert row.count("%") == 1 + count


def test_each_sample_has_a_table_of_its_own(command: Command, model: str) -> None:
    done = command("generate", "--model", model, "-p", PROMPT, "-n", "2", "--n", "2", "--logprobs", "1", "--quiet")
    first, second = done.out.split("[2/2]")
    assert all(part.count("likeliest tokens here") == 1 and part.count("%") == 4 for part in (first, second))


def test_a_prompt_with_a_gap_is_filled_there(command: Command, code_llama: str) -> None:
    args = ("generate", "--model", code_llama, "--prompt", "once <FILL_ME> the fox", "-n", "9", "--temperature", "0")
    tokenizer = SentencePieceTokenizer(Path(code_llama) / "tokenizer.model")
    assert tokenizer.infilling is not None
    ids = tokenizer.encode_infilling("once ", " the fox")
    with LLM(code_llama) as llm:
        params = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=[tokenizer.infilling.end])
        (output,) = llm.generate(ids, params)
    text = output.outputs[0].text
    found = json.loads(command(*args, "--json").out)
    assert (found["prompt_token_ids"], found["text"]) == (ids, text)
    assert command(*args, "--quiet").out == f"once {text} the fox\n"
    assert command(*args, "--quiet", "--n", "2").out == "".join(f"[{i}/2] once {text} the fox\n\n" for i in (1, 2))


def test_the_infilling_end_token_ends_it(command: Command, code_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SentencePieceTokenizer(Path(code_llama) / "tokenizer.model")
    assert tokenizer.infilling is not None
    told: list[SamplingParams] = []
    made = LLM.start

    def watched(self: LLM, prompt: str, params: SamplingParams) -> object:
        told.append(params)
        return made(self, prompt, params)

    monkeypatch.setattr(LLM, "start", watched)
    command("generate", "--model", code_llama, "--prompt", "a<FILL_ME>b", "-n", "2", "--quiet")
    command("generate", "--model", code_llama, "--prompt", "ab", "-n", "2", "--quiet")
    assert [params.stop_token_ids for params in told] == [(tokenizer.infilling.end,), ()]


@pytest.mark.parametrize(
    ("which", "prompt", "says"),
    [
        ("plain", "a<FILL_ME>b", "cannot infill: its vocabulary lacks Code Llama's pieces"),
        ("plain", "<FILL_ME><FILL_ME>", "the prompt holds <FILL_ME> 2 times; legal: once"),
        ("code", "a<FILL_ME>b<FILL_ME>c<FILL_ME>", "the prompt holds <FILL_ME> 3 times; legal: once"),
    ],
)
def test_what_cannot_be_filled_is_one_line(
    command: Command, model: str, code_llama: str, which: str, prompt: str, says: str
) -> None:
    done = command("generate", "--model", model if which == "plain" else code_llama, "--prompt", prompt)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err


@pytest.mark.parametrize(
    ("settings", "options", "params", "said"),
    [
        ({}, [], {}, ""),
        (
            {"temperature": 0.6, "top_p": 0.9},
            [],
            {"temperature": 0.6, "top_p": 0.9},
            "; temperature 0.6, top-p 0.9: the model's",
        ),
        (
            {"temperature": 0.6, "top_k": 7},
            ["--temperature", "2"],
            {"temperature": 2, "top_k": 7},
            "; top-k 7: the model's",
        ),
        ({"do_sample": False}, [], {"temperature": 0}, "; temperature 0.0: the model's"),
        ({"do_sample": False}, ["--temperature", "1.5", "--top-p", "1"], {"temperature": 1.5, "top_p": 1}, ""),
        ({"max_new_tokens": 3}, [], {"max_tokens": 3}, "; max tokens 3: the model's"),
        ({"max_new_tokens": 3}, ["-n", "5"], {"max_tokens": 5}, ""),
        ({"repetition_penalty": 1.5}, [], {"repetition_penalty": 1.5}, "; repetition penalty 1.5: the model's"),
    ],
)
def test_the_checkpoint_sets_what_the_user_does_not(
    command: Command,
    model: str,
    tmp_path: Path,
    settings: dict[str, object],
    options: list[str],
    params: dict[str, object],
    said: str,
) -> None:
    folder = configured(model, tmp_path / "model", **settings)
    done = command("generate", "--model", folder, "--prompt", PROMPT, "-c", "40", *options)
    with LLM(model, max_model_len=40) as llm:
        (output,) = llm.generate(PROMPT, SamplingParams(**{"seed": 0} | SAMPLING | params))
    assert done.out == f"{PROMPT}{output.outputs[0].text}\n"
    assert done.err.endswith(f"; seed 0{said}\n")


@pytest.mark.parametrize(
    "options", [["--top-p", "0"], ["--repetition-penalty", "0"], ["--logprobs", "21"], ["--n", "0"]]
)
def test_what_is_illegal_is_refused_before_a_model_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(LLM, "__init__", None)
    done = command("generate", *options)
    assert (done.status, done.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "line",
    [
        "generate --dtype float61",
        "generate --device gpu",
        "chat --model tiyn",
        "chat --model ./nowhere",
        "verify --dtype bf61",
        "generate --speculation promt_lookup",
        "bench runtime --device mps",
        "bench decode --dtype x",
        "bench ops --dtype x",
        "generate --top-k -3",
    ],
)
def test_a_name_that_is_wrong_everywhere_is_refused_before_torch_is_imported(line: str) -> None:
    code = f"""
import sys
from fastllama.cli.main import main
status = main({line.split()!r})
print(status, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
    assert done.stderr.startswith("fastllama: error: ")


def test_an_adapter_reaches_the_model(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def watched(self: LLM, *args: object, **options: object) -> None:
        told.append(options["adapter"])
        raise ValueError("enough")

    monkeypatch.setattr(LLM, "__init__", watched)
    for name in ("generate", "chat"):
        assert command(name, "--model", model, "--adapter", "a/b").err == "fastllama: error: enough\n"
        command(name, "--model", model)
    assert told == ["a/b", None, "a/b", None]
